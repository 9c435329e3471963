"""Generalized score matching: every operator against its adjoint, its divergence and its minimiser on known laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.core.autodiff import divergence, gradient
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import DenoisingScore
from undiffuse.objectives.generalized import (
    DenoisingOperator,
    GeneralizedScoreMatching,
    Gradient,
    MatrixOperator,
    Operator,
    SecondOrder,
    check_adjoint,
)
from undiffuse.objectives.score_matching import SURE, ImplicitScoreMatching
from undiffuse.oracles import Gaussian, GaussianMixture

F64 = torch.float64
OPERATORS = [Gradient(), DenoisingOperator(0.7), DenoisingOperator(0.7, alpha=0.4), SecondOrder()]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def law() -> GaussianMixture:
    """Three wide modes in two dimensions, a noisy marginal for every operator."""
    means = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.4, 1.2]], dtype=F64)
    return GaussianMixture(means, torch.tensor([0.8, 1.1, 0.9], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def quadrature() -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights with `sum w f(x) = E f`: the trapezoid rule, whose error falls exponentially in 1 / step."""
    line = torch.arange(-8, 8.1, 0.25, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    return grid, 0.0625 * law().log_prob(grid).exp()


class Field(nn.Module):
    """A small smooth field of any shape, with parameters; answers under every method's name."""

    def __init__(self, *part: int, seed: int = 3):
        super().__init__()
        self.part = part
        self.inner = nn.Parameter(0.6 * numbers(3, 5, seed=seed))
        self.outer = nn.Parameter(0.5 * numbers(5, math.prod(part), seed=seed + 1))

    def score(self, x, cond=None):
        hidden = torch.tanh(x.flatten(1) @ self.inner[1:] + self.inner[0])
        return (hidden @ self.outer).reshape(len(x), *self.part)

    denoise = second = score


def field_for(operator: Operator) -> Field:
    return Field(2, 2) if isinstance(operator, SecondOrder) else Field(2)


def slopes(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_the_objective_is_the_divergence_less_a_constant(operator):
    """`E J - E 1/2 |s - L p / p|^2 = -E 1/2 |L p / p|^2`, and equal gradients, for a field that is not the truth."""
    x, weights = quadrature()
    model, objective = field_for(operator), GeneralizedScoreMatching(operator)
    target = operator.ratio(law().log_prob, x).detach()
    implicit = (weights * objective(model, x)).sum()
    explicit = (weights * objective.explicit(model, x, target)).sum()
    constant = -0.5 * (weights * target.reshape(len(x), -1).square().sum(1)).sum()
    assert float((implicit - explicit).detach()) == pytest.approx(float(constant), rel=1e-8)
    ours, truth = slopes(implicit, model), slopes(explicit, model)
    assert torch.allclose(ours, truth, rtol=0, atol=1e-8 * float(truth.abs().max()))


def test_the_targets_are_what_the_laws_say():
    """Against the laws' closed forms: score, posterior mean, and the Hessian from the posterior covariance."""
    x_0, x = law(), 2 * numbers(7, 2, seed=5)
    alpha, sigma = torch.tensor(0.4, dtype=F64), torch.tensor(0.7, dtype=F64)
    noisy = x_0.scaled(alpha, sigma)
    mean, pull = x_0.posterior_means(x, alpha, sigma, None)
    assert torch.allclose(Gradient().ratio(noisy.log_prob, x), -pull, atol=1e-12)
    assert torch.allclose(DenoisingOperator(0.7, alpha=0.4).ratio(noisy.log_prob, x), mean, atol=1e-12)
    covariance = x_0.flat_posterior_covariance(x, alpha, sigma, None)
    hessian = (alpha**2 / sigma**2 * covariance - torch.eye(2, dtype=F64)) / sigma**2
    truth = hessian + pull[:, :, None] * pull[:, None, :]
    assert torch.allclose(SecondOrder().ratio(noisy.log_prob, x), truth, atol=1e-11)


def test_denoising_is_the_mean_squared_error_without_clean_data():
    """For `D(x) = A x + b` and Gaussian data, `2 E[J] + E|x_0|^2 = E|D - x_0|^2` in closed form, any alpha."""
    alpha, sigma = 0.4, 0.7
    root = torch.eye(2, dtype=F64) + 0.4 * numbers(2, 2, seed=1)
    data = Gaussian(torch.tensor([0.5, -1.0], dtype=F64), covariance=root @ root.mT)
    matrix, shift = 0.8 * numbers(2, 2, seed=2), numbers(2, seed=4)
    noisy = alpha**2 * data.covariance + sigma**2 * torch.eye(2, dtype=F64)
    residual = alpha * matrix - torch.eye(2, dtype=F64)
    error = (
        (residual @ data.covariance @ residual.mT).trace()
        + sigma**2 * (matrix @ matrix.mT).trace()
        + (residual @ data.mean + shift).square().sum()
    )
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(4))
    grid, shares = torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)
    x = alpha * data.mean + grid @ torch.linalg.cholesky(noisy).mT
    objective = GeneralizedScoreMatching(DenoisingOperator(sigma, alpha), lambda _, y, __: y @ matrix.mT + shift)
    with torch.no_grad():
        mean = float((shares / shares.sum() * objective(None, x)).sum())
    clean = float(data.mean.square().sum() + data.covariance.trace())
    assert 2 * mean + clean == pytest.approx(float(error), rel=1e-12)
    assert clean == pytest.approx((float((shares / shares.sum() * x.square().sum(1)).sum()) - 2 * sigma**2) / alpha**2)


def test_gradient_and_sure_are_the_other_objectives():
    """To rounding: implicit score matching, and SURE `= 2 J + |x|^2 - dim sigma^2`; Jacobians by torch itself."""
    x, model, sigma = numbers(9, 2, seed=6), Field(2), 0.7
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda y: model.score(y[None])[0], row) for row in x])
    trace, value = jacobian.diagonal(dim1=1, dim2=2).sum(1), model.score(x)
    implicit = GeneralizedScoreMatching(Gradient())(model, x)
    assert torch.allclose(implicit, trace + 0.5 * value.square().sum(1), atol=1e-13)
    assert torch.allclose(implicit, ImplicitScoreMatching()(model, x), atol=1e-13)
    ours = 2 * GeneralizedScoreMatching(DenoisingOperator(sigma))(model, x) + x.square().sum(1) - 2 * sigma**2
    assert torch.allclose(ours, (value - x).square().sum(1) + 2 * sigma**2 * trace - 2 * sigma**2, atol=1e-13)
    sure = SURE(sigma, trace="exact")(DenoisingScore(model.denoise, sigma), x)
    assert torch.allclose(ours, sure, atol=1e-13)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_the_best_linear_model_is_the_truth_of_a_gaussian(operator):
    """On a Gaussian `L p / p` is a polynomial: least squares on monomials finds it to rounding."""
    root = torch.tensor([[1.0, 0.0], [0.6, 0.9]], dtype=F64)
    data = Gaussian(torch.tensor([0.3, -0.2], dtype=F64), covariance=root @ root.mT)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(6))
    x = data.mean + torch.cartesian_prod(nodes, nodes) @ root.mT
    shares = torch.cartesian_prod(weights, weights).prod(1) / weights.sum() ** 2
    part = operator.ratio(data.log_prob, x).shape[1:]
    powers = torch.tensor([[0, 0], [1, 0], [0, 1], [2, 0], [1, 1], [0, 2]])
    objective = GeneralizedScoreMatching(
        operator, lambda w, y, _: ((y[:, None] ** powers).prod(2) @ w).reshape(len(y), *part)
    )

    def loss(w):
        return (shares * objective(w, x)).sum()

    start = torch.zeros(6, math.prod(part), dtype=F64)
    slope = torch.autograd.functional.jacobian(loss, start).flatten()
    curvature = torch.autograd.functional.hessian(loss, start).reshape(len(slope), -1)
    best = torch.linalg.solve(curvature, -slope).reshape(start.shape)
    probe = numbers(5, 2, seed=7)
    truth = operator.ratio(data.log_prob, probe).reshape(5, -1)
    assert torch.allclose((probe[:, None] ** powers).prod(2) @ best, truth, atol=1e-9)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("operator", [Gradient, SecondOrder, lambda **k: DenoisingOperator(0.7, alpha=0.4, **k)])
def test_random_directions_estimate_the_exact_value(operator, kind):
    draws = 20_000
    model = Field(2, 2) if operator is SecondOrder else Field(2)
    x = numbers(1, 2, seed=8)
    exact = GeneralizedScoreMatching(operator())(model, x).item()
    values = GeneralizedScoreMatching(operator(probes=2, kind=kind))(
        model, x.expand(draws, 2), generator=Streams.of(5, draws)
    ).detach()
    # 5 standard errors: a false alarm in fewer than 1e-6 of the seeds; the seed is fixed.
    error = float(values.std()) / math.sqrt(draws)
    assert abs(float(values.mean()) - exact) < 5 * error
    assert 5 * error < 0.1


@pytest.mark.parametrize("operator", [Gradient, SecondOrder, lambda **k: DenoisingOperator(0.7, alpha=0.4, **k)])
def test_in_one_dimension_signs_leave_nothing_to_chance(operator):
    """`u^2 = 1`: the estimate is the exact value, whatever is drawn."""
    x = numbers(6, 1, seed=15)

    def field(_, y, __):
        return torch.sin(1.3 * y).reshape((len(y), 1, 1) if operator is SecondOrder else (len(y), 1))

    exact = GeneralizedScoreMatching(operator(), field)(None, x)
    assert torch.allclose(GeneralizedScoreMatching(operator(probes=3), field)(None, x), exact, rtol=1e-12)


# ---------------------------------------------------------------- operators of the user's own


class Weighted(Operator):
    """`L p = h grad p` with `h = 1 + x_1^2`; its adjoint is `-div(h s)`."""

    name = "weighted gradient"

    def __init__(self, scale: float = 1.0, forget: bool = False):
        self.scale, self.forget = scale, forget

    def h(self, x):
        return (1 + x[:, :1] ** 2).detach() if self.forget else 1 + x[:, :1] ** 2

    def adjoint(self, field, x, generator=None):
        return field(x), -self.scale * divergence(lambda y: self.h(y) * field(y), x)[1]

    def ratio(self, log_prob, x):
        return self.h(x) * gradient(log_prob, x)[1]


class Laplacian(Operator):
    """`L p = lap p`, a scalar field; L is its own adjoint."""

    name = "laplacian"
    event = (3,)

    def adjoint(self, field, x, generator=None):
        return field(x), divergence(lambda y: gradient(field, y)[1], x)[1]

    def ratio(self, log_prob, x):
        spread = divergence(lambda y: gradient(log_prob, y)[1], x)[1]
        return spread + gradient(log_prob, x)[1].square().sum(1)


@pytest.mark.parametrize("operator", [*OPERATORS, Weighted(), Laplacian(), SecondOrder(probes=1)], ids=lambda o: o.name)
def test_matching_adjoints_pass(operator):
    assert check_adjoint(operator) < 1e-12


@pytest.mark.parametrize("wrong", [Weighted(scale=1.01), Weighted(scale=0.99), Weighted(forget=True)])
def test_an_adjoint_that_does_not_match_is_refused_at_construction(wrong):
    with pytest.raises(ArgumentError, match=r"'weighted gradient' does not match.*differ by .* % of their size"):
        GeneralizedScoreMatching(wrong)


def test_the_gap_is_named_in_per_cent_of_the_size():
    """Where both sides have one sign, an adjoint 1 % too large is off by 1 / 201 of `|<L p, s>| + |<p, L† s>|`."""

    class Twice(Operator):
        name = "multiple"

        def adjoint(self, field, x, generator=None):
            value = field(x)
            return value, 1.01 * value

        def ratio(self, log_prob, x):
            return torch.ones(len(x), dtype=F64)

        def trial(self, generator):
            trial = super().trial(generator)
            return type(trial)(trial.x, trial.weights, trial.log_prob, lambda part: lambda y: y.square().sum(1))

    with pytest.raises(ArgumentError, match=r"differ by 0\.498 %"):
        check_adjoint(Twice())


def test_what_cannot_be_checked_says_so():
    class Large(Laplacian):
        event = (3, 8, 8)

    class Misshaped(Laplacian):
        def adjoint(self, field, x, generator=None):
            return field(x)[:, None], field(x)

    with pytest.raises(ArgumentError, match=r"set `event` to a smaller one"):
        GeneralizedScoreMatching(Large())
    with pytest.raises(ArgumentError, match="expected one shape"):
        GeneralizedScoreMatching(Misshaped())


# ---------------------------------------------------------------- finite sets


def differences(size: int) -> torch.Tensor:
    """The matrix of `(L p)(x)_k = p(x + 1 + k) - p(x)` on a ring, (n, 2, n)."""
    eye = torch.eye(size, dtype=F64)
    return torch.stack([eye.roll(1 + k, 1) - eye for k in range(2)], 1)


@pytest.mark.parametrize("matrix", [numbers(6, 6, seed=9), differences(6)], ids=["square", "vector-valued"])
def test_a_matrix_on_a_finite_set_is_matched_at_its_ratio(matrix):
    """Unconstrained tables: the gradient vanishes at `A p / p`, and the value there is `-1/2 E|A p / p|^2`."""
    p = (0.5 * numbers(6, seed=10)).softmax(0)
    states = torch.arange(6)
    operator = MatrixOperator.of(matrix)
    objective = GeneralizedScoreMatching(operator, lambda table, x, _: table[x])
    image = torch.tensordot(matrix, p, 1)
    truth = image / p.reshape(-1, *[1] * (image.ndim - 1))
    assert torch.allclose(operator.ratio(lambda x: p.log()[x], states), truth, atol=1e-14)
    best = truth.clone().requires_grad_()
    loss = (p * objective(best, states)).sum()
    assert loss.item() == pytest.approx(-0.5 * float((p * truth.reshape(6, -1).square().sum(1)).sum()), rel=1e-12)
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-14
    other = (truth + numbers(*truth.shape, seed=11)).requires_grad_()
    (ours,) = torch.autograd.grad((p * objective(other, states)).sum(), other)
    (wanted,) = torch.autograd.grad((p * objective.explicit(other, states, truth)).sum(), other)
    assert torch.allclose(ours, wanted, atol=1e-13)


def test_a_transpose_that_is_none_is_refused():
    matrix = numbers(5, 5, seed=12)
    good = MatrixOperator(5, lambda p: p @ matrix.mT, lambda s: s @ matrix)
    assert check_adjoint(good) < 1e-14
    with pytest.raises(ArgumentError, match="'matrix' does not match"):
        GeneralizedScoreMatching(MatrixOperator(5, lambda p: p @ matrix.mT, lambda s: s @ matrix.mT))


def test_a_condition_goes_with_its_row():
    """A field of the class: each row's value is that of the row alone, though all states are asked for each."""
    operator = MatrixOperator.of(numbers(4, 4, seed=13))
    table = numbers(3, 4, seed=14)
    objective = GeneralizedScoreMatching(operator, lambda _, x, cond: table[cond, x])
    x, cond = torch.tensor([2, 0, 3]), torch.tensor([1, 2, 0])
    for row in range(3):
        alone = GeneralizedScoreMatching(operator, lambda _, y, __, row=row: table[cond[row], y])
        assert float(objective(None, x, cond)[row]) == pytest.approx(float(alone(None, x[row : row + 1])), rel=1e-14)


def test_errors():
    with pytest.raises(ArgumentError, match="has no method 'second'"):
        GeneralizedScoreMatching(SecondOrder())(Gaussian(torch.zeros(2)), torch.zeros(1, 2))
    with pytest.raises(ArgumentError, match=r"expected \(3, 2, 2\)"):
        GeneralizedScoreMatching(SecondOrder())(Field(2), torch.zeros(3, 2, dtype=F64))
    with pytest.raises(ArgumentError, match="sigma > 0 and alpha not 0"):
        DenoisingOperator(1.0, alpha=0)
    with pytest.raises(ArgumentError, match="at least 1 pair"):
        GeneralizedScoreMatching(SecondOrder(probes=0))(Field(2, 2), torch.zeros(3, 2, dtype=F64))
