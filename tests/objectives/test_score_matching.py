"""Every score-matching objective on a correlated Gaussian in ten dimensions, against its closed form.

The model is linear, `s(x) = -A (x - b)`, so that every objective is a quadratic in the draws and its expectation is a
polynomial in the two first moments. Values are compared twice: exactly, on points whose moments are those of the
Gaussian, where the objective draws nothing or its probes do not matter; and by Monte Carlo through the public call.
"""

import math

import pytest
import torch
from torch import nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import DenoisingScore, Energy, FunctionEnergy, ScoreNetwork
from undiffuse.objectives.score_matching import (
    SCORE_MATCHING,
    SURE,
    DenoisingScoreMatching,
    ExplicitScoreMatching,
    FiniteDifferenceSliced,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)

F64 = torch.float64
D = 10
SIGMA, ALPHA = 0.8, 0.7


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class World:
    """N(mu, C): eigenvalues from 0.6 to 1.5, in a random basis."""

    def __init__(self, size=D):
        basis = torch.linalg.qr(drawn(1, size, size))[0]
        self.covariance = basis @ torch.diag(torch.linspace(0.6, 1.5, size, dtype=F64)) @ basis.mT
        self.mean = 0.3 * drawn(2, size)
        self.root = torch.linalg.cholesky(self.covariance)

    def sample(self, n, generator):
        return self.mean + torch.randn(n, len(self.mean), generator=generator, dtype=F64) @ self.root.mT

    def score(self, x):
        return -torch.linalg.solve(self.covariance, (x - self.mean).mT).mT

    def noisy(self, alpha, sigma):
        """The law of alpha x + sigma eps."""
        twin = World(len(self.mean))
        twin.mean = alpha * self.mean
        twin.covariance = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=F64)
        twin.root = torch.linalg.cholesky(twin.covariance)
        return twin


def nodes(size):
    """2 size points with mean 0 and covariance I exactly: a rule that is exact on quadratics."""
    return math.sqrt(size) * torch.cat([torch.eye(size, dtype=F64), -torch.eye(size, dtype=F64)])


class LinearScore(nn.Module):
    """s(x) = -A (x - b), A near half the inverse of C, not symmetric unless asked: far from the optimum, where the
    gradient is large, and with a value that is large beside its spread."""

    def __init__(self, world, symmetric=False):
        super().__init__()
        size = len(world.mean)
        noise = 0.1 * drawn(3, size, size)
        a = 0.5 * torch.linalg.inv(world.covariance) + (noise + noise.mT if symmetric else noise)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(world.mean + 0.2 * drawn(4, size))

    def score(self, x, cond=None):
        return -(x - self.b) @ self.a.mT

    def jacobian(self):
        return -self.a


class QuadraticEnergy(Energy):
    """E(x) = (x - b)^T A (x - b) / 2, whose score has the symmetric part of A."""

    def __init__(self, world):
        super().__init__()
        like = LinearScore(world)
        self.a, self.b = like.a, like.b

    def forward(self, x, cond=None):
        return 0.5 * ((x - self.b) @ self.a.mT * (x - self.b)).sum(1)

    def jacobian(self):
        return -0.5 * (self.a + self.a.mT)


# ---------------------------------------------------------------- closed forms


def second_moment(model, world):
    """E |s|^2 = tr(J C J^T) + |J (mu - b)|^2."""
    j = model.jacobian()
    return torch.trace(j @ world.covariance @ j.mT) + (j @ (world.mean - model.b)).square().sum()


def explicit(model, world):
    """E 1/2 |s - s*|^2: the difference is linear, with Jacobian J + C^-1 and mean J (mu - b)."""
    j = model.jacobian()
    gap = j + torch.linalg.inv(world.covariance)
    return 0.5 * (torch.trace(gap @ world.covariance @ gap.mT) + (j @ (world.mean - model.b)).square().sum())


def implicit(model, world):
    return torch.trace(model.jacobian()) + 0.5 * second_moment(model, world)


def denoising(model, world, alpha, sigma):
    """The explicit objective at p_sigma plus half of E|conditional score|^2 - E|score of p_sigma|^2."""
    noisy = world.noisy(alpha, sigma)
    constant = len(world.mean) / sigma**2 - torch.trace(torch.linalg.inv(noisy.covariance))
    return explicit(model, noisy) + 0.5 * constant


def squared_error(model, world, sigma):
    """E |D(x + sigma eps) - x|^2: D(x~) - x = sigma (I + sigma^2 J) eps + sigma^2 J (x - b)."""
    j = model.jacobian()
    gain = torch.eye(len(world.mean), dtype=F64) + sigma**2 * j
    return sigma**2 * gain.square().sum() + sigma**4 * second_moment(model, world)


# ---------------------------------------------------------------- exact comparisons


def models(world):
    return {
        "symmetric": LinearScore(world, symmetric=True),
        "not symmetric": LinearScore(world),
        "energy": QuadraticEnergy(world),
    }


WORLD, LINE = World(), World(1)
MODELS = models(WORLD)
BOTH = pytest.mark.parametrize("name", MODELS)


@BOTH
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_explicit_implicit_and_sure_on_exact_moments(name, mode):
    model = MODELS[name]
    x = WORLD.mean + nodes(D) @ WORLD.root.mT
    noisy = WORLD.noisy(1.0, SIGMA)
    observed = noisy.mean + nodes(D) @ noisy.root.mT
    for value, wanted in (
        (ExplicitScoreMatching(WORLD.score)(model, x), explicit(model, WORLD)),
        (ImplicitScoreMatching(mode=mode)(model, x), implicit(model, WORLD)),
        (SURE(SIGMA, trace="exact", mode=mode)(model, observed), squared_error(model, WORLD, SIGMA)),
    ):
        torch.testing.assert_close(value.mean(), wanted, rtol=1e-10, atol=0)


@BOTH
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, SIGMA), (ALPHA, 0.5)])
def test_denoising_on_exact_moments(name, alpha, sigma):
    model = MODELS[name]
    joint = nodes(2 * D)
    x, noise = WORLD.mean + joint[:, :D] @ WORLD.root.mT, joint[:, D:]
    value = DenoisingScoreMatching(sigma, alpha).at(model, x, noise).mean()
    torch.testing.assert_close(value, denoising(model, WORLD, alpha, sigma), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "objective",
    [
        SlicedScoreMatching(),
        SlicedScoreMatching(probe="sphere", probes=2),
        SlicedScoreMatching(variance_reduced=True),
        ImplicitScoreMatching("hutchinson", mode="forward"),
        FiniteDifferenceSliced(0.3),
        FiniteDifferenceSliced(0.3, of="score"),
    ],
)
def test_in_one_dimension_a_sign_is_no_chance(objective):
    """u = +-1 in one dimension: every estimate is its mean, and differences of a quadratic are exact."""
    model = models(LINE)["energy"]
    x = LINE.mean + nodes(1) @ LINE.root.mT
    torch.testing.assert_close(objective(model, x).mean(), implicit(model, LINE), rtol=1e-10, atol=0)
    exact = 2 * SIGMA**4 * implicit(model, LINE) + SIGMA**2  # E of SURE over data that are LINE's, not noisy ones
    torch.testing.assert_close(SURE(SIGMA)(model, x).mean(), exact, rtol=1e-10, atol=0)


# ---------------------------------------------------------------- one million draws

_CASES = {
    "explicit": ExplicitScoreMatching(WORLD.score),
    "implicit": ImplicitScoreMatching(),
    "implicit, hutchinson, gaussian": ImplicitScoreMatching("hutchinson", "gaussian"),
    "implicit, hutchinson, sphere, 2 probes": ImplicitScoreMatching("hutchinson", "sphere", 2),
    "sliced, rademacher": SlicedScoreMatching(),
    "sliced, gaussian, 2 probes": SlicedScoreMatching("gaussian", 2),
    "sliced, sphere": SlicedScoreMatching("sphere"),
    "sliced, 3 probes": SlicedScoreMatching(probes=3),
    "sliced-vr": SlicedScoreMatching(variance_reduced=True),
    "finite differences of an energy": FiniteDifferenceSliced(0.1),
    "finite differences of a score": FiniteDifferenceSliced(0.1, of="score"),
    "denoising": DenoisingScoreMatching(SIGMA),
    "denoising, alpha": DenoisingScoreMatching(SIGMA, ALPHA),
    "sure": SURE(SIGMA),
    "sure, exact": SURE(SIGMA, trace="exact"),
}


def world_of_the_draws(case):
    """The law whose explicit objective has the same gradient, and the law to draw x from."""
    objective = _CASES[case]
    if isinstance(objective, SURE):
        noisy = WORLD.noisy(1.0, objective.sigma)
        return noisy, noisy
    if isinstance(objective, DenoisingScoreMatching):
        return WORLD.noisy(objective.alpha, objective.sigma), WORLD
    return WORLD, WORLD


def expected_value(case, model):
    objective = _CASES[case]
    if isinstance(objective, ExplicitScoreMatching):
        return explicit(model, WORLD)
    if isinstance(objective, SURE):
        return squared_error(model, WORLD, objective.sigma)
    if isinstance(objective, DenoisingScoreMatching):
        return denoising(model, WORLD, objective.alpha, objective.sigma)
    return implicit(model, WORLD)


_WITH_ENERGY = ["finite differences of an energy", "implicit", "sliced, rademacher", "denoising", "sure"]
_PAIRS = [(c, "not symmetric") for c in _CASES if c != _WITH_ENERGY[0]] + [(c, "energy") for c in _WITH_ENERGY]


def values_and_gradients(case, model, draws, batches=100):
    """Per-batch means of the objective and of its gradient, (batches,) and (batches, parameters)."""
    law, parameters = world_of_the_draws(case)[1], list(model.parameters())
    generator = torch.Generator().manual_seed(2026)
    values, gradients = [], []
    for _ in range(batches):
        value = _CASES[case](model, law.sample(draws // batches, generator), generator=generator).mean()
        slopes = torch.autograd.grad(value, parameters)
        values.append(value.detach())
        gradients.append(torch.cat([g.flatten() for g in slopes]))
    return torch.stack(values), torch.stack(gradients)


@pytest.mark.parametrize("draws", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "name"), _PAIRS)
def test_value_and_gradient(case, name, draws):
    """Value within 4 standard errors, which are less than 1 % of it; gradient within 3 standard errors.

    False alarms, were the seed not fixed: value 1e-4 (t with 99 degrees of freedom). Gradient: of 110 components 0.37
    are expected beyond 3 standard errors, more than 4 with probability 5e-5; its projection on the explicit gradient,
    the one number that a wrong factor moves most, 0.3 %. So 6 % for the 19 cases together.
    """
    model = MODELS[name]
    values, gradients = values_and_gradients(case, model, draws)
    error = values.std() / math.sqrt(len(values))
    wanted = expected_value(case, model).detach()
    assert 4 * error < 0.01 * wanted.abs()
    assert (values.mean() - wanted).abs() < 4 * error

    law = world_of_the_draws(case)[0]
    loss = explicit(model, law) * (2 * _CASES[case].sigma ** 4 if case.startswith("sure") else 1.0)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    off = (gradients.mean(0) - slope) / (gradients.std(0) / math.sqrt(len(values)))
    along = gradients @ slope / slope.square().sum()
    assert (off.abs() > 3).sum() <= 4
    assert (along.mean() - 1).abs() < 3 * along.std() / math.sqrt(len(values))


# ---------------------------------------------------------------- SURE


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 32), nn.SiLU(), nn.Linear(32, D)).double()

    def forward(self, x):
        return 0.5 * x + self.net(x)


def soft_threshold(x):
    return x.sign() * (x.abs() - 1.1).clamp(min=0)


DENOISERS = {"linear": lambda x: 0.6 * x + 0.1 * x.roll(1, 1), "soft threshold": soft_threshold, "mlp": Perceptron()}


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", DENOISERS)
def test_sure_s_mean_is_the_mean_squared_error(name, trace):
    """On sparse data: one coordinate in four is there. The error is measured on the same draws, so that only what
    separates the two is left to chance; 1 % of it is more than 4 standard errors (false alarm 6e-5)."""
    n = 200_000
    generator = torch.Generator().manual_seed(8)
    there = torch.rand(n, D, generator=generator, dtype=F64) < 0.25
    clean = 3 * there * torch.randn(n, D, generator=generator, dtype=F64)
    noisy = clean + SIGMA * torch.randn(n, D, generator=generator, dtype=F64)
    denoise = DENOISERS[name]
    estimate = SURE(SIGMA, trace=trace)(DenoisingScore(denoise, SIGMA), noisy, generator=generator).detach()
    error = (denoise(noisy) - clean).square().sum(1).detach()
    gap = estimate - error
    assert 4 * gap.std() / math.sqrt(n) < 0.01 * error.mean()
    assert gap.mean().abs() < 0.01 * error.mean()


# ---------------------------------------------------------------- finite differences


class Wave(Energy):
    """E(x) = x^2 / 2 + cos(x), in one dimension: f = -E has f' = -x + sin x and derivatives of every order."""

    def forward(self, x, cond=None):
        return (x.square() / 2 + x.cos()).sum(1)


@pytest.mark.parametrize(("of", "trace_share", "square_share"), [("energy", 1 / 12, 1 / 6), ("score", 1 / 6, 1 / 2)])
def test_the_error_of_a_finite_difference_is_of_second_order(of, trace_share, square_share):
    """The docstring's coefficients of h^2, at u = +-1 and with the derivatives -sin x and -cos x of order 3 and 4."""
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    exact = ImplicitScoreMatching()(Wave(), x)
    third, fourth = -x.sin(), -x.cos()
    leading = (trace_share * fourth + square_share * (x.sin() - x) * third)[:, 0]
    steps = (0.1, 0.05, 0.025)
    coarse, middle, fine = ((FiniteDifferenceSliced(h, of=of)(Wave(), x) - exact) / h**2 for h in steps)
    torch.testing.assert_close((4 * fine - middle) / 3, leading, rtol=1e-5, atol=1e-6)  # free of the next order
    torch.testing.assert_close(coarse - middle, 4 * (middle - fine), rtol=1e-2, atol=1e-5)  # which is h^4


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("of", ["energy", "score"])
def test_a_tenth_of_the_length_scale_is_safe_in_float32(of, scale):
    """Waves of length `scale` in ten dimensions: within 1 %; at a thousandth an energy's differences are noise."""
    x = scale * drawn(3, 256, D).float()

    class Waves(Energy):
        def forward(self, x, cond=None):
            return (0.5 * (x / scale).square() + 0.5 * (x / scale).cos()).sum(1)

    def off(share):
        objective = FiniteDifferenceSliced(share * scale, of=of)
        got = objective(Waves(), x, generator=torch.Generator().manual_seed(0)).detach()
        wanted = SlicedScoreMatching()(Waves(), x, generator=torch.Generator().manual_seed(0)).detach()
        return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())

    assert off(0.1) < 0.01
    assert off(0.001) < 0.01 if of == "score" else off(0.001) > 0.1


# ---------------------------------------------------------------- the call


def test_variance_reduced_slicing_is_implicit_with_hutchinson():
    x = WORLD.mean + nodes(D) @ WORLD.root.mT
    for kind in ("rademacher", "gaussian", "sphere"):
        one, other = (
            objective(MODELS["not symmetric"], x, generator=Streams.of(1, 2 * D))
            for objective in (SlicedScoreMatching(kind, 2, True), ImplicitScoreMatching("hutchinson", kind, 2))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", _CASES)
def test_a_sample_keeps_its_value_whatever_the_batch(case):
    x = WORLD.sample(8, torch.Generator().manual_seed(0))
    whole = _CASES[case](MODELS["energy"], x, generator=Streams.of(5, 8))
    parts = [_CASES[case](MODELS["energy"], x[i : i + 4], generator=Streams.of(5, 4, first=i)) for i in (0, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-12, atol=0)


class Conditional(Energy):
    """E = |x - c|^2 / 2 on events of shape (2, 3); c = 0 where there is no condition."""

    def forward(self, x, cond=None):
        centre = torch.zeros_like(x) if cond is None else cond
        return 0.5 * (x - centre).flatten(1).square().sum(1)


@pytest.mark.parametrize("case", _CASES)
def test_conditions_reach_the_model_and_events_have_any_shape(case):
    """Shifting data and centre together changes nothing: every objective sees x - c alone."""
    if case == "explicit":
        objective, shifted = ExplicitScoreMatching(lambda x: -2 * x), ExplicitScoreMatching(lambda x: -2 * (x - 1.5))
    else:
        objective = shifted = _CASES[case]
    x = drawn(6, 5, 2, 3)
    centre = torch.full_like(x, 1.5)
    moved = x + centre / getattr(objective, "alpha", 1.0)
    plain = objective(Conditional(), x, generator=Streams.of(2, 5))
    torch.testing.assert_close(shifted(Conditional(), moved, centre, Streams.of(2, 5)), plain, rtol=1e-9, atol=1e-9)
    assert (shifted(Conditional(), moved, generator=Streams.of(2, 5)) - plain).abs().max() > 0.1


def test_the_registry_makes_each_of_them():
    made = {
        "implicit": ImplicitScoreMatching(trace="hutchinson"),
        "sliced": SlicedScoreMatching(),
        "sliced-vr": SlicedScoreMatching(variance_reduced=True),
        "finite-difference": FiniteDifferenceSliced(0.2, of="score"),
        "denoising-score-matching": DenoisingScoreMatching(0.3),
        "sure": SURE(0.3, probes=2),
    }
    options = {
        "implicit": {"trace": "hutchinson"},
        "finite-difference": {"step": 0.2, "of": "score"},
        "denoising-score-matching": {"sigma": 0.3},
        "sure": {"sigma": 0.3, "probes": 2},
    }
    assert {name: make(**options.get(name, {})) for name, make in SCORE_MATCHING.items()} == made


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImplicitScoreMatching(trace="hutchison"),
        lambda: ImplicitScoreMatching(probe="normal"),
        lambda: ImplicitScoreMatching(probes=0),
        lambda: ImplicitScoreMatching(mode="backward"),
        lambda: SlicedScoreMatching(probe="rademacker"),
        lambda: SlicedScoreMatching(probes=-1),
        lambda: SlicedScoreMatching(mode="jvp"),
        lambda: FiniteDifferenceSliced(0.0),
        lambda: FiniteDifferenceSliced(float("nan")),
        lambda: FiniteDifferenceSliced(of="density"),
        lambda: FiniteDifferenceSliced(probes=0),
        lambda: DenoisingScoreMatching(0.0),
        lambda: SURE(-1.0),
        lambda: SURE(0.5, trace="full"),
        lambda: SURE(0.5, probes=0),
    ],
)
def test_wrong_arguments_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


def test_a_score_given_as_an_energy_is_refused():
    class Twice(nn.Module):
        def forward(self, x, c_noise, cond):
            return 2 * x

    with pytest.raises(ArgumentError, match="of='score'"):
        FiniteDifferenceSliced()(ScoreNetwork(Twice()), drawn(0, 4, 3))
    with pytest.raises(ArgumentError, match="one number per sample"):
        ImplicitScoreMatching()(FunctionEnergy(lambda x: x.sum(1, keepdim=True)), drawn(0, 4, 3))
