"""Energies with a known partition function: log Z by quadrature and enumeration, scores, samplers, far away."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy
from undiffuse.oracles import Gaussian, GaussianMixture
from undiffuse.oracles.energies import Funnel, LawEnergy, Ring, Rosenbrock
from undiffuse.oracles.rbm import Bernoulli, BernoulliRBM, GaussianRBM

F64 = torch.float64


def numbers(*shape: int, seed: int = 0, dtype=F64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian_rbm(visible=2, hidden=3, seed=5) -> GaussianRBM:
    std = torch.linspace(0.5, 0.8, visible, dtype=F64)
    return GaussianRBM(numbers(visible, hidden, seed=seed), numbers(visible, seed=6), numbers(hidden, seed=7), std)


def binary_rbm(visible=5, hidden=3, seed=8) -> BernoulliRBM:
    return BernoulliRBM(1.5 * numbers(visible, hidden, seed=seed), numbers(visible, seed=9), numbers(hidden, seed=10))


def labelled_mixture() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[-1.0, 0.3], [0.8, 0.0], [0.2, 1.5]], dtype=F64),
        torch.tensor([0.3, 0.5, 0.4], dtype=F64),
        weights=torch.tensor([0.5, 0.2, 0.3], dtype=F64),
        labels=torch.tensor([0, 1, 1]),
    )


def quadrature(energy, x_range, y_range, n=1001) -> float:
    """log of the integral of exp(-E) over a rectangle, trapezoids (spectrally accurate: the integrand vanishes)."""
    x, y = (torch.linspace(*r, n, dtype=F64) for r in (x_range, y_range))
    grid = torch.cartesian_prod(x, y)
    total = torch.logsumexp(-energy(grid).detach(), 0)
    return float(total) + math.log((x[1] - x[0]) * (y[1] - y[0]))


@pytest.mark.parametrize(
    ("energy", "x_range", "y_range"),
    [
        (Ring(1.3, 0.2), (-3, 3), (-3, 3)),
        (Rosenbrock(), (-28, 30), (-15, 900)),
        (Rosenbrock(mu=0.2, a=2.0, b=0.7), (-4, 4.5), (-7, 22)),
        (gaussian_rbm(), (-8, 8), (-8, 8)),
        (LawEnergy(labelled_mixture()), (-5, 5), (-5, 5)),
        (LawEnergy(Gaussian(torch.tensor([0.3, -0.2], dtype=F64), std=0.7)), (-7, 7), (-7, 7)),
    ],
    ids=["ring", "banana", "rosenbrock", "gaussian-rbm", "mixture", "gaussian"],
)
def test_log_z_is_that_of_quadrature_on_the_plane(energy, x_range, y_range):
    if x_range[0] == -28:  # the banana is long and thin: integrate along its own coordinate, y = x^2 + u, of Jacobian 1
        bent = lambda p: energy(torch.stack([p[:, 0], p[:, 0].square() + p[:, 1]], 1))  # noqa: E731
        assert quadrature(bent, x_range, (-4, 4)) == pytest.approx(energy.log_z, abs=1e-6)
    else:
        assert quadrature(energy, x_range, y_range) == pytest.approx(energy.log_z, abs=1e-6)


@pytest.mark.parametrize(("radius", "width"), [(0.0, 0.7), (0.3, 0.8), (1.0, 0.5)])
def test_log_z_of_a_ring_whose_kink_counts(radius, width):
    """In polar coordinates, Simpson's rule on a smooth integrand."""
    rho = torch.linspace(0, radius + 12 * width, 200_001, dtype=F64)
    energy = Ring(radius, width)
    density = 2 * math.pi * rho * torch.exp(-energy(torch.stack([rho, torch.zeros_like(rho)], 1)))
    assert math.log(float(torch.trapezoid(density, rho))) == pytest.approx(energy.log_z, abs=1e-6)


@pytest.mark.parametrize(("dim", "scale"), [(2, 0.8), (3, 0.6)])
def test_log_z_of_a_funnel(dim, scale):
    """Over v by trapezoids, over the rest in units of its spread e^{v/2} (Jacobian e^{v (D - 1) / 2})."""
    energy, v, u = Funnel(dim, scale), torch.linspace(-9, 9, 201, dtype=F64), torch.linspace(-9, 9, 73, dtype=F64)
    mesh = torch.cartesian_prod(v, *[u] * (dim - 1))
    x = torch.cat([mesh[:, :1], mesh[:, 1:] * (mesh[:, :1] / 2).exp()], 1)
    integrand = -energy(x) + mesh[:, 0] * (dim - 1) / 2
    cell = math.log(v[1] - v[0]) + (dim - 1) * math.log(u[1] - u[0])
    assert float(integrand.logsumexp(0)) + cell == pytest.approx(energy.log_z, abs=1e-6)


def test_log_z_of_a_long_rosenbrock():
    """`E(x_1, x_1^2 + u_2, x_2^2 + u_3, ...)` is a sum of squares in u, whose integral factors: Jacobian 1."""
    energy = Rosenbrock(2, 3, mu=0.4, a=0.9, b=1.7)
    assert energy.event == (5,)
    log_z = 0.0
    for i in range(5):
        u = torch.zeros(4001, 5, dtype=F64)
        u[:, i] = torch.linspace(-20, 20, 4001, dtype=F64)
        u[:, 0] += 0.4 if i else 0.0
        x = u.clone()
        for first, second in ((1, 2), (3, 4)):  # two blocks of two
            x[:, first] = x[:, 0].square() + u[:, first]
            x[:, second] = x[:, first].square() + u[:, second]
        log_z += math.log(float(torch.trapezoid(torch.exp(-energy(x)), dx=0.01)))
    assert log_z == pytest.approx(energy.log_z, abs=1e-6)


@pytest.mark.parametrize(("visible", "hidden"), [(5, 3), (3, 5), (4, 4)])
def test_the_binary_machine_is_that_of_all_its_states(visible, hidden):
    energy = binary_rbm(visible, hidden)
    states = [torch.tensor(list(itertools.product([0.0, 1.0], repeat=k)), dtype=F64) for k in (visible, hidden)]
    x, h = states
    joint = -(x @ energy.visible_bias)[:, None] - (h @ energy.hidden_bias)[None] - x @ energy.weight @ h.mT
    assert torch.allclose(energy(x), -torch.logsumexp(-joint, 1), atol=1e-12)
    assert energy.log_z == pytest.approx(float(torch.logsumexp(-joint.flatten(), 0)), abs=1e-12)
    probability = (-joint).flatten().softmax(0).reshape(joint.shape)
    given_x = (probability / probability.sum(1, keepdim=True)) @ h
    given_h = (probability / probability.sum(0, keepdim=True)).mT @ x
    assert torch.allclose(energy.hidden_given(x), given_x, atol=1e-12)
    assert torch.allclose(energy.visible_given(h), given_h, atol=1e-12)
    # the sampler, 200,000 draws: a mean's standard error is at most 0.0011, 4.5 of them 0.005
    drawn = energy.sample(200_000, Streams.of(3, 200_000))
    assert torch.allclose(drawn.mean(0), probability.sum(1) @ x, atol=0.005)
    pair = drawn[:, 0] * drawn[:, 1]
    assert float(pair.mean()) == pytest.approx(float(probability.sum(1) @ (x[:, 0] * x[:, 1])), abs=0.005)


def test_independent_units():
    energy = Bernoulli(torch.tensor([0.3, -1.0, 2.0], dtype=F64))
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=F64)
    assert float(torch.logsumexp(-energy(x), 0)) == pytest.approx(energy.log_z, abs=1e-12)
    mean = energy.log_prob(x).exp() @ x
    drawn = energy.sample(200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), mean, atol=0.005)


def test_a_large_hidden_layer_enumerates_the_small_visible_one():
    wide = BernoulliRBM(numbers(3, 40, seed=1), numbers(3, seed=2), numbers(40, seed=3))
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=F64)
    assert wide.log_z == pytest.approx(float(torch.logsumexp(-wide(x), 0)), abs=1e-12)
    with pytest.raises(ArgumentError, match=r"21 binary units: .* annealed importance sampling"):
        BernoulliRBM(numbers(30, 21), numbers(30), numbers(21)).log_z  # noqa: B018


def test_the_gaussian_machine_is_a_mixture_and_trains():
    energy = gaussian_rbm(4, 6)
    x = numbers(200, 4, seed=1) * 2
    law = energy.mixture()
    assert torch.allclose(energy(x), -law.log_prob(x) - energy.log_z, atol=1e-9)
    assert torch.allclose(energy.score(x), law.score(x), atol=1e-9)
    assert torch.allclose(energy.log_prob(x), law.log_prob(x), atol=1e-9)
    # d log Z / d theta = -E[dE / d theta]: the law's own draws, against differences of log_z
    drawn = energy.sample(400_000, torch.Generator().manual_seed(0))
    energy.zero_grad()
    energy(drawn).mean().backward()
    with torch.no_grad():
        for parameter, index in ((energy.hidden_bias, 2), (energy.visible_bias, 1)):
            h, grad = 1e-4, -float(parameter.grad[index])
            parameter[index] += h
            above = energy.log_z
            parameter[index] -= 2 * h
            below = energy.log_z
            parameter[index] += h
            # per draw the derivative is 0 to 1, or (b - x) / s^2 of std under 8: standard errors under 0.013
            assert (above - below) / (2 * h) == pytest.approx(grad, abs=0.05)


SMOOTH = [Ring(1.3, 0.2), Funnel(4), Rosenbrock(2, 3), gaussian_rbm(3, 4)]


@pytest.mark.parametrize("energy", SMOOTH, ids=lambda e: type(e).__name__)
def test_scores_are_minus_the_gradient(energy):
    x = numbers(50, *energy.event, seed=3)
    plain = Energy.energy_and_score(energy, x)
    value, score = energy.energy_and_score(x)
    assert torch.allclose(value, plain[0], rtol=1e-12)
    assert torch.allclose(score, plain[1], rtol=1e-9, atol=1e-9)
    v, h = numbers(50, *energy.event, seed=4), 1e-5
    slope = (energy(x + h * v) - energy(x - h * v)) / (2 * h)
    assert torch.allclose(-(score * v).sum(1), slope, rtol=1e-5, atol=1e-5)
    assert torch.allclose(energy.log_prob(x), -value - energy.log_z, rtol=1e-12)


def test_the_law_s_score_and_its_labels():
    law = labelled_mixture()
    energy = LawEnergy(law)
    x, cond = numbers(50, 2, seed=3), torch.arange(50) % 3 - 1
    for labels in (None, cond):
        plain = Energy.energy_and_score(energy, x, labels)
        value, score = energy.energy_and_score(x, labels)
        assert torch.allclose(value, plain[0])
        assert torch.allclose(score, plain[1], atol=1e-10)
        assert torch.allclose(energy.log_prob(x, labels), -value)
    assert not torch.allclose(energy(x, cond), energy(x))
    assert energy.event == (2,)
    assert torch.equal(energy.sample(5, Streams.of(1, 5)), law.sample(5, Streams.of(1, 5)))


@pytest.mark.parametrize("energy", SMOOTH, ids=lambda e: type(e).__name__)
def test_samples_have_the_moments_of_the_energy(energy):
    """Stein: `E[s(x)] = 0` and `E[x_i s_j(x)] = -delta_ij`, each mean within 4.5 of its standard errors.

    At most 20 comparisons an energy: one false alarm in 7000 seeds. The scores of funnel and Rosenbrock have finite
    variance.
    """
    n = 400_000
    x = energy.to(F64).sample(n, torch.Generator().manual_seed(1))
    score = energy.score(x)
    for i, j in itertools.product(range(energy.event[0]), repeat=2):
        product = x[:, i] * score[:, j] + float(i == j)
        assert abs(float(product.mean())) < 4.5 * float(product.std()) / math.sqrt(n), (i, j)
        if isinstance(energy, Ring):
            assert float(product.std()) / math.sqrt(n) < 0.02
    mean = score.mean(0).abs() / (score.std(0) / math.sqrt(n))
    assert float(mean.max()) < 4.5


def test_the_ring_s_radius_is_distributed_as_it_should_be():
    """Second and fourth moments about r of 400,000 draws, against quadrature, within 4.5 standard errors (1 and 2 %).

    1 % off in width changes them by 2 and 4 %.
    """
    energy = Ring(2.0, 0.3).to(F64)
    off = energy.sample(400_000, torch.Generator().manual_seed(0)).norm(dim=1) - 2.0
    grid = torch.linspace(0, 5, 100_001, dtype=F64)
    density = grid * torch.exp(-energy(torch.stack([grid, torch.zeros_like(grid)], 1)))
    for power in (2, 4):
        values = off**power
        exact = torch.trapezoid(density * (grid - 2.0) ** power, grid) / torch.trapezoid(density, grid)
        error = float(values.std()) / math.sqrt(len(off))
        assert abs(float(values.mean() - exact)) < 4.5 * error
        assert 4.5 * error < 0.01 * power / 2 * 1.5 * float(exact)


def test_funnel_and_rosenbrock_are_made_of_independent_normals():
    """Variances of 800,000 draws within 0.75 % (4.7 standard errors): 1 % off in a spread changes them by 2 %."""
    n = 800_000
    x = Funnel(3).to(F64).sample(n, torch.Generator().manual_seed(0))
    units = [x[:, 0] / 3, x[:, 1] * (-x[:, 0] / 2).exp(), x[:, 2] * (-x[:, 0] / 2).exp()]
    law = Rosenbrock(2, 3, mu=0.4, a=0.9, b=1.7).to(F64)
    x = law.sample(n, torch.Generator().manual_seed(1))
    units += [(x[:, 0] - 0.4) * math.sqrt(1.8)]
    units += [(x[:, i] - x[:, j].square()) * math.sqrt(3.4) for i, j in ((1, 0), (2, 1), (3, 0), (4, 3))]
    assert [float(u.square().mean()) for u in units] == pytest.approx([1] * 8, rel=0.0075)


def test_the_funnel_stays_steep_past_its_neck():
    """At v = -50, 5 beyond the knee, the energy still falls with v, at the slope that it had at the knee."""
    energy = Funnel(2)
    x = torch.tensor([[-50.0, 1.0], [-45.0, 1.0], [-40.0, 1.0]], dtype=F64)
    slopes = energy.score(x)[:, 0].detach()
    assert torch.allclose(slopes[0], slopes[1])
    assert float(slopes[1] / slopes[2]) == pytest.approx(math.exp(5), rel=1e-6)
    assert float(energy(x)[0] - energy(x)[1]) == pytest.approx(5 * float(slopes[1]), rel=1e-6)


ALL = [
    Ring(),
    Funnel(),
    Rosenbrock(3, 4),
    gaussian_rbm().float(),
    LawEnergy(labelled_mixture().float()),
    LawEnergy(Gaussian(torch.zeros(3), std=0.1)),
]


@pytest.mark.parametrize("energy", ALL, ids=lambda e: type(e).__name__)
def test_energies_and_scores_are_finite_far_out_in_float32(energy):
    units = torch.cat([torch.eye(*energy.event * 2), -torch.eye(*energy.event * 2)])
    spread = numbers(200, *energy.event, seed=1, dtype=torch.float32)
    x = 1e4 * torch.cat([units, spread / spread.norm(dim=1, keepdim=True), torch.zeros(1, *energy.event)])
    value, score = energy.energy_and_score(x)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(score).all())
    exact = energy.double().energy_and_score(x.double())
    assert torch.allclose(value.double(), exact[0], rtol=1e-4)
    assert torch.allclose(score.double(), exact[1], rtol=1e-3, atol=1e-6 * float(exact[1].abs().max()))
    energy.float()


def test_rows_of_streams_are_their_own():
    for energy in (Ring(), Funnel(3), Rosenbrock(2, 3), gaussian_rbm().float(), binary_rbm().float()):
        both = energy.sample(6, Streams.of(4, 6))
        assert torch.equal(both[:2], energy.sample(2, Streams.of(4, 2))), type(energy).__name__
        assert both.dtype == torch.float32
        assert energy.double().sample(2, Streams.of(4, 2)).dtype == F64


def test_what_is_refused():
    for energy in (Ring(), Funnel(), Rosenbrock(2, 2), gaussian_rbm(3)):
        with pytest.raises(ArgumentError, match=rf"{type(energy).__name__}: x has shape \(4, 7\)"):
            energy(torch.zeros(4, 7))
        with pytest.raises(ArgumentError, match="has no labels"):
            energy(torch.zeros(4, *energy.event), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="zeros and ones: x holds other values"):
        binary_rbm()(torch.full((2, 5), 0.5))
    with pytest.raises(ArgumentError, match="radius -1"):
        Ring(-1.0)
    with pytest.raises(ArgumentError, match="width 0"):
        Ring(1.0, 0.0)
    with pytest.raises(ArgumentError, match="dim 1"):
        Funnel(1)
    with pytest.raises(ArgumentError, match="length 1"):
        Rosenbrock(1, 1)
    with pytest.raises(ArgumentError, match=r"expected \(V, H\), \(V,\) and \(H,\)"):
        BernoulliRBM(torch.zeros(3, 2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"number or shape \(3,\), all positive"):
        GaussianRBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2), 0.0)
    with pytest.raises(ArgumentError, match=r"must be a Bernoulli of 5 units: given Ring"):
        binary_rbm().anneal(Ring(), 0.5)
