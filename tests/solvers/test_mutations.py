"""A coefficient of a solver that is off by 1 % makes a test of this folder fail."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import pytest

from solvers import test_annealed, test_corrector, test_identities, test_noise_share, test_orders, test_reverse
from solvers.measuring import DETERMINISTIC
from undiffuse.paths import VP
from undiffuse.solvers import (
    annealed,
    exponential,
    multistep,
    noise_share,
    reverse,
    runge_kutta,
    singlestep,
    stochastic,
)
from undiffuse.solvers.noise_share import NoiseShare

ORDER = test_orders.test_the_declared_order_is_the_measured_one
RECURSION = test_annealed.test_a_gaussian_keeps_to_the_exact_recursion
BEST = test_annealed.test_the_chosen_steps_are_the_best_of_the_exact_recursion
CHAIN = test_reverse.test_reverse_diffusion_is_the_published_chain
NOISY = "multistep 1, corrected, with noise"
RUN = test_noise_share.test_a_run_on_a_gaussian_is_the_exact_recursion
STEP = test_noise_share.test_a_step_is_the_sde_s_wherever_the_noise_begins_and_ends
FIRST = test_noise_share.test_out_of_alpha_0_the_noise_is_what_is_kept_and_what_is_fresh
SETTLED = test_corrector.test_many_steps_settle_at_the_closed_form
# module, function, index of the coefficient (None: the function returns one number), test, its arguments
MUTATIONS = [
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("euler", "vp")) for i in range(2)],
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("heun", "linear")) for i in range(2)],
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("midpoint", "linear")) for i in range(2)],
    *[(runge_kutta, "velocity_coefficients", i, ORDER, ("rk4", "vp")) for i in range(2)],
    *[(runge_kutta, "stage_coefficients", i, ORDER, ("heun", "vp")) for i in range(3)],
    *[(runge_kutta, "stage_coefficients", i, ORDER, ("midpoint", "vp")) for i in range(3)],
    *[(runge_kutta, "stage_coefficients", i, ORDER, ("rk4", "linear")) for i in range(5)],
    (runge_kutta, "between", None, ORDER, ("midpoint", "linear")),
    (runge_kutta, "between", None, ORDER, ("rk4", "vp")),
    *[(exponential, "exponential_coefficients", i, ORDER, ("ddim", "vp")) for i in range(2)],
    *[(exponential, "exponential_coefficients", i, ORDER, ("ddim eta=0.5", "vp")) for i in (0, 2)],
    *[(multistep, "flow_weights", 0, ORDER, (name, "vp")) for name in ("abm-4", "dpmpp-2m", "deis-3", "ipndm")],
    *[(multistep, "flow_weights", i, ORDER, ("unipc-3", "linear")) for i in range(3)],
    *[(multistep, "time_weights", i, ORDER, ("ab4", "vp")) for i in range(4)],
    *[(noise_share, "noisy_weights", i, ORDER, ("dpmpp-2m-sde", "vp")) for i in range(2)],
    *[(noise_share, "noisy_weights", i, RUN, (True, 3, (0.4, 2.1), VP())) for i in range(4)],
    *[(NoiseShare, "spread", i, ORDER, (NOISY, "vp")) for i in range(2)],
    *[(NoiseShare, "spread", i, FIRST, (None,)) for i in range(2)],
    *[(singlestep, "flow_weights", 0, ORDER, (name, "vp")) for name in ("dpm-2", "dpm-3", "dpmpp-2s")],
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
    *[(annealed, "langevin_coefficients", i, RECURSION, ("vp", "delta", 4)) for i in range(3)],
    *[(annealed, "scales", i, RECURSION, ("trig", "settled", 1)) for i in range(2)],
    (annealed, "_smallest_level", None, RECURSION, ("karras", "delta", 1)),
    (annealed, "settled_step", None, RECURSION, ("ncsn-table", "settled", 4)),
    (annealed, "snr_relative_step", None, test_annealed.test_the_snr_rule_is_score_sde_s_in_x_itself, ("vp",)),
    *[(reverse, "reverse_coefficients", i, ORDER, ("euler-maruyama", "vp")) for i in range(3)],
    *[(reverse, "reverse_coefficients", i, ORDER, ("stochastic-heun", "linear")) for i in range(3)],
    *[(reverse, "chain_coefficients", i, CHAIN, (1.0,)) for i in range(3)],
    *[(reverse, "posterior_coefficients", i, ORDER, ("srk", "vp")) for i in range(3)],
    *[(annealed, "langevin_coefficients", i, SETTLED, ("vp", 0.4)) for i in range(3)],
    (annealed, "snr_relative_step", None, test_corrector.test_the_step_is_the_published_one_for_each_sample, ("ve",)),
    (test_annealed, "nearest_step", None, BEST, (1.3, 3)),
    (test_annealed, "settled_step", None, BEST, (1.3, 3)),
    (test_annealed, "langevin_step", None, BEST, (1.3, 3)),
    (test_annealed, "settled_variance", None, BEST, (1.3, 3)),
    (test_annealed, "noise_variance", None, BEST, (1.3, 3)),
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


@pytest.mark.parametrize(("place", "function"), [(noise_share, "snr_weights"), (NoiseShare, "spent")])
def test_one_percent_in_the_noise_s_own_integrals_is_noticed(place, function):
    original, kept = getattr(place, function), noise_share.noisy_weights.__wrapped__  # nothing wrong may be kept
    with (
        mock.patch.object(place, function, lambda *args: 1.01 * np.array(original(*args))),
        mock.patch.object(test_noise_share, "noisy_weights", kept),
        pytest.raises(AssertionError),
    ):
        STEP(1.0, (0.7, 1.2), (-0.4, -0.8, -1.1, -1.9))


@pytest.mark.parametrize("name", ["_STAGE", "_CORRELATION"])
def test_one_percent_in_the_scheme_of_srk_is_noticed(name):
    with mock.patch.object(reverse, name, 0.99 * getattr(reverse, name)), pytest.raises(AssertionError):
        test_reverse.test_srk_is_the_scheme_for_additive_noise_in_the_snr("vp")


@pytest.mark.parametrize("solver", [runge_kutta.Euler, runge_kutta.Heun, runge_kutta.Midpoint, runge_kutta.RK4])
def test_one_percent_in_a_tableau_is_noticed(solver):
    """Every number of it: nodes, rows and weights."""

    def scaled(row, i):
        return tuple(1.01 * v if j == i else v for j, v in enumerate(row))

    changes = [("nodes", scaled(solver.nodes, i)) for i, v in enumerate(solver.nodes) if 0 < v < 1]
    changes += [("weights", scaled(solver.weights, i)) for i, v in enumerate(solver.weights) if v]
    for k, row in enumerate(solver.rows):
        for i in (i for i, v in enumerate(row) if v):
            changes += [("rows", (*solver.rows[:k], scaled(row, i), *solver.rows[k + 1 :]))]
    name = next(name for name, made in DETERMINISTIC.items() if type(made) is solver)
    for attribute, value in changes:
        with mock.patch.object(solver, attribute, value), pytest.raises(AssertionError):
            ORDER(name, "vp")
