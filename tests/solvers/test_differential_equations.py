"""What a course on differential equations says of solutions, of those of the probability flow (appendix A.1)."""

from __future__ import annotations

import math
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

from solvers.measuring import F64, mixture
from undiffuse.oracles import Gaussian, GaussianMixture, exact_flow
from undiffuse.paths import Trig
from undiffuse.solvers import Bound, Picard, sample
from undiffuse.solvers.picard import _Iteration
from worlds import PATHS

SMOOTH = ["vp", "ve", "sub-vp", "cosine", "linear", "trig", "karras"]


def along(path, law):
    """Start, end, nodes and weights of Gauss and Legendre's rule between them, and the exact states there."""
    start, end = path.time_of(torch.tensor([-1.0, 1.3], dtype=F64)).tolist()
    places, weights = np.polynomial.legendre.leggauss(20)
    times = torch.tensor(0.5 * (start + end) + 0.5 * (end - start) * places, dtype=F64)
    x = law.perturbed(path, start).sample(8, torch.Generator().manual_seed(1))
    states = [x]
    for t, s in pairwise([torch.tensor(start, dtype=F64), *times]):
        states.append(exact_flow(law.denoiser(path), states[-1], t, s))
    return start, end, list(zip(times, 0.5 * (end - start) * weights, states[1:])), x


@pytest.mark.parametrize("name", SMOOTH)
def test_a_solution_is_the_integral_of_the_velocity_along_it(name):
    path, law = PATHS[name], mixture()
    start, end, nodes, x = along(path, law)
    field = law.denoiser(path)
    found = x + sum(w * field.velocity(x_t, t) for t, w, x_t in nodes)
    assert torch.allclose(found, exact_flow(field, x, start, end), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_integrating_factor_takes_the_linear_part_out(name):
    """Eq. A.1.4: `x_s = E(t, s) x_t + integral of E(tau, s) g^2 / (2 sigma) E[eps | x_tau] d tau`, E of the drift."""
    path, law = PATHS[name], mixture()
    start, end, nodes, x = along(path, law)
    field, s = law.denoiser(path), torch.tensor(end, dtype=F64)

    def factor(t):
        return 1 / path.transition(s, torch.as_tensor(t, dtype=F64))[0]

    assert float(factor(start)) == pytest.approx(math.exp(sum(w * float(path.drift(t)) for t, w, _ in nodes)), rel=1e-8)
    rest = [0.5 * path.diffusion(t) ** 2 / path.sigma(t) * field.noise(x_t, t) for t, _, x_t in nodes]
    found = factor(start) * x + sum(w * factor(t) * value for (t, w, _), value in zip(nodes, rest))
    assert torch.allclose(found, exact_flow(field, x, start, end), rtol=1e-7, atol=1e-7)


def line() -> GaussianMixture:
    means, stds = torch.tensor([[-1.0], [0.4], [1.5]], dtype=F64), torch.tensor([0.3, 0.5, 0.2], dtype=F64)
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def share_below(law: GaussianMixture, x: torch.Tensor) -> torch.Tensor:
    """The distribution function."""
    z = (x - law.flat_means[:, 0]) / law.variances.flatten().sqrt()
    return (law.weights * 0.5 * torch.special.erfc(-z / math.sqrt(2))).sum(1, keepdim=True)


@pytest.mark.parametrize("name", [*SMOOTH, "zero-snr-table"])
def test_on_the_line_no_solutions_cross(name):
    """Two that met would be one (corollary A.1.1): as many samples stay below each, who keeps its quantile."""
    path, law = PATHS[name], line()
    x = path.prior_std * torch.linspace(-2.2, 2.2, 25, dtype=F64)[:, None]
    before = share_below(law.perturbed(path, path.t_max), x)
    exact = exact_flow(law.denoiser(path), x, path.t_max, path.t_min)
    after = law.perturbed(path, path.t_min)
    assert torch.allclose(share_below(after, exact), before, rtol=0, atol=1e-8)
    made = sample(law.denoiser(path), noise=x, steps=60)
    assert bool((made.diff(dim=0) > 0).all())
    assert torch.allclose(share_below(after, made), before, rtol=0, atol=1e-3)


def picard_iterates(law, path, grid, rounds):
    """Where Picard's iteration of Euler's rule has the end of x = 1, after each of its rounds."""
    work = _Iteration(
        Picard("euler", window=len(grid), tolerance=1e-300), Bound(law.denoiser(path), grid=grid),
        torch.ones(1, 1, dtype=F64), grid, False,
    )  # fmt: skip
    with torch.no_grad():
        for k in range(1, rounds + 1):
            work.advance()
            yield float(work.now.y[0, len(grid) - 1 - k, 0])


def euler_factors(angles, std):
    """`h L` of `dx / d angle = L x`, the flow of N(0, std^2) on x = cos(angle) x_0 + sin(angle) eps."""
    rate = (1 - std**2) * angles.sin() * angles.cos() / (std**2 * angles.cos() ** 2 + angles.sin() ** 2)
    return (rate[:-1] * angles.diff()).tolist()


def test_picards_iterates_are_the_partial_sums_of_the_solution_and_contract_as_a_factorial():
    """Of `x' = L x` the k-th is `sum over j <= k of e_j`, e_j the elementary symmetric polynomials of the h L: nearly
    `Lambda^j / j!`, Lambda their sum. What is left after it is at most the next term where signs alternate.
    """
    law = Gaussian(torch.zeros(1, dtype=F64), std=0.3)
    angles = torch.linspace(1.3, 0.2, 41, dtype=F64)
    factors = euler_factors(angles, 0.3)
    total = sum(factors)
    assert total < -0.8
    terms = np.polynomial.polynomial.polyfromroots([-1 / f for f in factors])
    terms = terms / terms[0]  # prod (1 + z h L) = sum_j z^j e_j
    end = math.prod(1 + f for f in factors)
    for k, found in enumerate(picard_iterates(law, Trig(), 2 / math.pi * angles, 10), 1):
        assert found == pytest.approx(float(terms[: k + 1].sum()), rel=1e-9)
        assert abs(found - end) <= abs(total) ** (k + 1) / math.factorial(k + 1) + 1e-12


@pytest.mark.parametrize("name", ["drift", "diffusion"])
def test_one_percent_is_noticed(name):
    kind = type(PATHS["vp"])
    original = getattr(kind, name)
    with mock.patch.object(kind, name, lambda self, t: 1.01 * original(self, t)), pytest.raises(AssertionError):
        test_the_integrating_factor_takes_the_linear_part_out("vp")
