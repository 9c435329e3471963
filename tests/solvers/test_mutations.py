"""A coefficient of a solver that is off by 1 % makes a test of this folder fail."""

from __future__ import annotations

import functools
from unittest import mock

import pytest

from solvers import test_identities, test_orders
from undiffuse.solvers import exponential, runge_kutta, stochastic

ORDER = test_orders.test_the_declared_order_is_the_measured_one
# module, function, index of the coefficient (None: the function returns one number), test, its arguments
MUTATIONS = [
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("euler", "vp")) for i in range(2)],
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("heun", "linear")) for i in range(2)],
    *[(runge_kutta, "heun_coefficients", i, ORDER, ("heun", "vp")) for i in range(3)],
    *[(exponential, "exponential_coefficients", i, ORDER, ("ddim", "vp")) for i in range(2)],
    *[(exponential, "exponential_coefficients", i, ORDER, ("dpmpp-2m", "linear")) for i in range(3)],
    *[(exponential, "exponential_coefficients", i, ORDER, ("ddim eta=0.5", "vp")) for i in (0, 2)],
    (exponential, "extrapolation_weight", None, ORDER, ("dpmpp-2m", "vp")),
    *[(stochastic, "posterior_coefficients", i, ORDER, ("ddpm", "linear")) for i in range(3)],
    *[(stochastic, "exponential_coefficients", i, ORDER, ("edm", "vp")) for i in range(2)],
    (stochastic, "correction_weight", None, ORDER, ("edm", "vp")),
    (stochastic, "correction_weight", None, ORDER, ("edm churn=2", "linear")),
    (
        stochastic,
        "correction_weight",
        None,
        test_identities.test_edm_without_churn_is_heun_on_the_karras_path,
        ("karras",),
    ),
]


@pytest.mark.parametrize(
    ("module", "function", "index", "test", "arguments"),
    MUTATIONS,
    ids=[f"{name}[{index}] {args[0]}" for _, name, index, _, args in MUTATIONS],
)
def test_one_percent_is_noticed(module, function, index, test, arguments):
    original = getattr(module, function)

    @functools.wraps(original)
    def mutated(*args, **kwargs):
        value = original(*args, **kwargs)
        if index is None:
            return 1.01 * value
        return tuple(1.01 * v if i == index else v for i, v in enumerate(value))

    with mock.patch.object(module, function, mutated), pytest.raises((AssertionError, ValueError)):
        test(*arguments)
