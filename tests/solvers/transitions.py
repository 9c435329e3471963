"""One step of a Markov kernel as an operator, by quadrature over its own random numbers: no Monte-Carlo error.

A kernel asks `Draws` for normals and uniforms; given chosen ones, a step is a function. Averages over the normals are
Gauss-Hermite sums, averages over acceptance use the probability that the kernel states.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from undiffuse.fields.energy import Energy
from undiffuse.solvers.markov import Draws

F64 = torch.float64


class Chosen(Draws):
    """Normals given one after the other; uniforms all 0 (every proposal is taken) or as given."""

    def __init__(self, *normals: Tensor, uniform: float = 0.0):
        super().__init__(normals[0])
        self.normals, self.value = list(normals), uniform

    def normal(self) -> Tensor:
        return self.normals.pop(0)

    def uniform(self) -> Tensor:
        return torch.full(self.shape[:1], self.value, dtype=self.dtype)


class Wavy(Energy):
    """`x^2 / 2 + a sin(k x)` summed over the event: smooth, skewed, no Gaussian."""

    def __init__(self, amplitude: float = 0.4, frequency: float = 2.0):
        super().__init__()
        self.amplitude, self.frequency = amplitude, frequency

    def forward(self, x, cond=None):
        return (x.square() / 2 + self.amplitude * torch.sin(self.frequency * x)).flatten(1).sum(1)

    def energy_and_score(self, x, cond=None):
        return self(x), -(x + self.amplitude * self.frequency * torch.cos(self.frequency * x))


class Spread(Energy):
    """N(0, diag(variances))."""

    def __init__(self, *variances: float):
        super().__init__()
        self.variances = torch.tensor(variances, dtype=F64)

    def forward(self, x, cond=None):
        return (x.square() / (2 * self.variances.to(x))).sum(1)


def hermite_rule(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of averages over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes, dtype=F64), torch.tensor(weights / math.sqrt(2 * math.pi), dtype=F64)


def hermite_basis(x: Tensor, n: int) -> Tensor:
    """Hermite polynomials 0 ... n - 1, orthonormal under N(0, 1): (..., n)."""
    values = [torch.ones_like(x), x]
    for k in range(1, n - 1):
        values.append((x * values[k] - math.sqrt(k) * values[k - 1]) / math.sqrt(k + 1))
    return torch.stack(values[:n], -1)


def grid(half_width: float, n: int) -> tuple[Tensor, float]:
    """Points of a line and the weight of each (the trapezium rule, whose ends carry nothing)."""
    x = torch.linspace(-half_width, half_width, n, dtype=F64)
    return x, 2 * half_width / (n - 1)


def expectation(energy: Energy, f, half_width: float = 12.0, n: int = 4001) -> float:
    """`E f` under `exp(-E)` on the line."""
    x, _ = grid(half_width, n)
    weight = torch.softmax(-energy(x[:, None]), 0)
    return float((weight * f(x)).sum())


def cumulative(energy: Energy, half_width: float = 12.0, n: int = 20001):
    """The distribution function of `exp(-E)` on the line, as a function of numpy arrays."""
    x = grid(half_width, n)[0]
    density = torch.softmax(-energy(x[:, None]), 0).numpy()
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda y: np.interp(y, x.numpy(), total / total[-1])


def affine_map(step, size: int, draws: int) -> tuple[Tensor, Tensor]:
    """`(A, C)` of `v -> A v + C z`, from a step that is affine: v of `size` numbers, z of `draws` standard normals."""
    rows = torch.cat([torch.zeros(1, size + draws, dtype=F64), torch.eye(size + draws, dtype=F64)])
    out = step(rows[:, :size], rows[:, size:]).detach()
    slopes = (out[1:] - out[0]).T
    return slopes[:, :size], slopes[:, size:]


def stationary_covariance(a: Tensor, c: Tensor) -> Tensor:
    """V with `V = A V A^T + C C^T`."""
    n = len(a)
    flat = torch.linalg.solve(torch.eye(n * n, dtype=F64) - torch.kron(a, a), (c @ c.T).reshape(-1))
    return flat.reshape(n, n)


def stationary_mean(step, f, size: int, degree: int, nodes: int) -> float:
    """`E f(v_1)` under the stationary law of `v' = step(v, z)`, v of `size` numbers (1 or 2), z one standard normal.

    Galerkin: the transition operator on Hermite polynomials of v; the left eigenvector of eigenvalue 1 is the
    stationary density over that of N(0, I), which is smooth.
    """
    v, weight = hermite_rule(nodes)
    z, chance = hermite_rule(40)
    places = torch.cartesian_prod(*[v] * size).reshape(-1, size)
    weights = torch.cartesian_prod(*[weight] * size).reshape(-1, size).prod(1)
    rows = places.repeat_interleave(len(z), 0)
    landed = step(rows, z.repeat(len(places))[:, None])

    def basis(at: Tensor) -> Tensor:
        parts = [hermite_basis(at[:, i], degree) for i in range(size)]
        return parts[0] if size == 1 else (parts[0][:, :, None] * parts[1][:, None, :]).flatten(1)

    moved = (basis(landed).reshape(len(places), len(z), -1) * chance[:, None]).sum(1)
    operator = basis(places).T @ (weights[:, None] * moved)
    # Coefficients c with c = operator^T c, the first (the total mass) 1.
    system = (operator - torch.eye(len(operator), dtype=F64)).T
    rest = torch.linalg.solve(system[1:, 1:], -system[1:, 0])
    density = torch.cat([torch.ones(1, dtype=F64), rest])
    return float((weights * f(places[:, 0])) @ (basis(places) @ density))


def slope(steps: list[float], errors: list[float]) -> float:
    """Least-squares slope of log error against log step."""
    return float(np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0])


def invariance_defect(kernel, energy: Energy, f, half_width: float = 9.0, n: int = 700) -> float:
    """`E[f(x')] - E[f(x)]`, x from `exp(-E)`, x' one step of a kernel that accepts or rejects: 0 where it is exact.

    Trapezium rule over x and over the momentum; the acceptance has kinks, so the error is O(spacing^2), some 1e-6.
    """
    x, _ = grid(half_width, n)
    z, spacing = grid(8.0, n)
    chance = torch.exp(-z.square() / 2) * spacing / math.sqrt(2 * math.pi)
    weight = torch.softmax(-energy(x[:, None]), 0)
    rows = x.repeat_interleave(n)[:, None]
    moved, state = kernel.step(energy, rows, kernel.init(energy, rows), Chosen(z.repeat(n)[:, None]))
    gain = kernel.acceptance(state) * (f(moved) - f(rows))[:, 0]
    return float(weight @ (gain.reshape(n, n) @ chance))
