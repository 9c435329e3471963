"""Solvers of the reverse-time SDE `dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dw_bar` (eq. 4.1.6).

eta = 1 is the reverse SDE, eta = 0 the PF-ODE; all have the marginals of the path. The noise is additive, so Ito's and
Stratonovich's integral agree, and the strong order of Euler-Maruyama is 1. All end in `alpha_s E[x_0 | x]` where
sigma_s = 0, and with eta > 0 a step out of alpha = 0, where f and g are infinite, is DDIM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.sums import combine
from undiffuse.fields import Answer
from undiffuse.paths import Path
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, ask, scales
from undiffuse.solvers.exponential import exponential_coefficients
from undiffuse.solvers.grids import make_grid
from undiffuse.solvers.runge_kutta import velocity_coefficients
from undiffuse.solvers.stochastic import posterior_coefficients


def reverse_coefficients(field: Field, t: Tensor, eta: float) -> tuple[float, float, float]:
    """(p, q, g) with drift `p x + q E[x_0 | x]` and diffusion g, at a time inside the path.

    From the velocity's (p_0, q_0), `q_0 = -omega / sigma`: `p = p_0 - eta^2 q_0 / alpha`, `q = (1 + eta^2) q_0`,
    `g = eta sigma sqrt(-2 q_0 / alpha)`.
    """
    p, q = velocity_coefficients(field, t)
    if eta == 0:
        return p, q, 0.0
    alpha, sigma = scales(field, t)
    # omega >= 0: what is below is rounding.
    return p - eta**2 * q / alpha, (1 + eta**2) * q, eta * sigma * math.sqrt(max(0.0, -2 * q / alpha))


@dataclass(frozen=True)
class _Reverse(Solver):
    """What solvers of the family share: eta, and the steps at the ends."""

    eta: float = 1.0

    def __post_init__(self):
        if not 0 <= self.eta < math.inf:
            raise ArgumentError(f"eta is {self.eta}: expected 0 (the PF-ODE), 1 (the reverse SDE), or a number >= 0")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def _singular(self, field: Field, t: Tensor, s: Tensor) -> bool:
        """Whether the step from t to s is a closed form."""
        return scales(field, s)[1] == 0 or (self.eta > 0 and scales(field, t)[0] == 0)


class _InPathTime(_Reverse):
    """What Euler-Maruyama and Heun's method share: steps bounded by the growth rate of x in t."""

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The canonical grid, or "karras" where a canonical step would turn the sign of x: `1 + h p < 0`.

        As for Euler's and Heun's methods without noise, whose rate p is smaller. Standard deviations of a Gaussian on
        VE after 20 / 50 steps of `stochastic-heun`: wrong by 2.9 / 0.01 on the canonical grid, 0.02 / 0.003 on
        "karras".
        """
        grid = super().default_grid(path, steps)
        t, s = grid[:-1], grid[1:]
        alpha, sigma = path.alpha(t), path.sigma(t)
        rate = path.sigma_dot(t) / sigma + self.eta**2 * path.omega(t) / (alpha * sigma)
        turns = (1 + (s - t) * rate < 0) & (path.sigma(s) > 0) & (alpha > 0)
        return make_grid(path, steps, "karras") if bool(turns.any()) else grid


def closed_step(field: Field, x: Event, answer: Answer, t: Tensor, s: Tensor) -> Event:
    """DDIM's step; `alpha_s E[x_0 | x_t]` where sigma_s = 0."""
    on_x, on_denoised, _ = exponential_coefficients(field, t, s)
    return answer.plus(x, on_x, on_denoised)


def added(x: Event, noise: Noise, std: float) -> Event:
    """x with fresh noise; draws nothing where std is 0."""
    return torch.add(x, noise(), alpha=std) if std > 0 else x


@dataclass(frozen=True)
class EulerMaruyama(_InPathTime):
    """`x_s = x_t + h drift(x_t, t) + eta g_t sqrt(|h|) z`, h = s - t < 0; Euler's method where eta = 0."""

    order: ClassVar[int] = 1
    strong_order: ClassVar[float] = 1.0
    evals_per_step: ClassVar[int] = 1

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        answer = ask(field, x, t)
        if self._singular(field, t, s):
            return closed_step(field, x, answer, t, s), state
        h = float(s) - float(t)
        p, q, g = reverse_coefficients(field, t, self.eta)
        return added(answer.plus(x, 1 + h * p, h * q), noise, g * math.sqrt(-h)), state


@dataclass(frozen=True)
class StochasticHeun(_InPathTime):
    """Heun's method for the drift, the noise of both ends averaged, one draw a step; `Heun` where eta = 0.

    `x_e` by Euler-Maruyama, then `x_t + h / 2 (drift(x_t, t) + drift(x_e, s)) + (g_t + g_s) / 2 sqrt(|h|) z` (Kloeden
    and Platen 1992, section 15.1). Weak order 2 for additive noise, strong order 1.
    """

    order: ClassVar[int] = 2
    strong_order: ClassVar[float] = 1.0
    evals_per_step: ClassVar[int] = 2

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        first = field(x, t)
        if self._singular(field, t, s):
            return closed_step(field, x, Answer(first), t, s), state
        h = float(s) - float(t)
        (p, q, g), (p_s, q_s, g_s) = (reverse_coefficients(field, time, self.eta) for time in (t, s))
        euler = combine(x, 1 + h * p, first, h * q)
        moved = torch.add(x, x, alpha=0.5 * h * p).add_(first, alpha=0.5 * h * q)
        if g > 0:
            z, root = noise(), math.sqrt(-h)
            euler, moved = euler.add_(z, alpha=g * root), moved.add_(z, alpha=0.5 * (g + g_s) * root)
        second = field(euler, s)
        return moved.add_(euler, alpha=0.5 * h * p_s).add_(second, alpha=0.5 * h * q_s), state


def chain_coefficients(field: Field, t: Tensor, s: Tensor, eta: float) -> tuple[float, float, float]:
    """Weights of x, of `E[x_0 | x]` and of the noise in a step of `ReverseDiffusion`."""
    (alpha, sigma), (alpha_s, _) = scales(field, t), scales(field, s)
    _, _, q = exponential_coefficients(field, t, s)
    fresh = (1 - q) * (1 + q)  # variance of p(x_t | x_s) over sigma_t^2
    pull = 0.5 * (1 + eta**2) * fresh
    return 2 - alpha / alpha_s - pull, alpha * pull, eta * sigma * math.sqrt(fresh)


@dataclass(frozen=True)
class ReverseDiffusion(_Reverse):
    """The reverse SDE discretised as the forward chain is (Song et al. 2021, appendix E).

    With the chain's step `x_t = a x_s + b z`, `a = alpha_t / alpha_s` and b the standard deviation of the transition,

        x_s = (2 - a) x_t + (1 + eta^2) / 2 b^2 score + eta b z.

    On VE it is `x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_t^2 - sigma_s^2) z`, on a DDPM chain
    `(2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z`. eta = 0 is their "probability flow" predictor. No weight of
    x or of the noise grows with the step, as it does in Euler-Maruyama: few steps are safe.

    On a path that reaches alpha = 0 the first steps have a = 1/2, 2/3, ... however many they are. With noise their
    error is forgotten; without, the result does not converge (on Linear a mean of -2 came out as -2.14 at any count):
    take eta = 0 on VP, VE and sub-VP.
    """

    order: ClassVar[int] = 1
    strong_order: ClassVar[float] = 1.0
    evals_per_step: ClassVar[int] = 1

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        answer = ask(field, x, t)
        if self._singular(field, t, s) or scales(field, t)[0] == 0:
            return closed_step(field, x, answer, t, s), state
        on_x, on_denoised, std = chain_coefficients(field, t, s, self.eta)
        return added(answer.plus(x, on_x, on_denoised), noise, std), state


# Stage and weights of the two-stage scheme, and the correlation of its noises: see `SRK`.
_STAGE = 0.75
_WEIGHTS = (1 / 3, 2 / 3)
_CORRELATION = math.sqrt(3) / 2


def stage_time(field: Field, t: Tensor, s: Tensor) -> Tensor:
    """The time at three quarters of the step in SNR = (alpha / sigma)^2."""
    (alpha, sigma), (alpha_s, sigma_s) = scales(field, t), scales(field, s)
    snr, snr_s = (alpha / sigma) ** 2, (alpha_s / sigma_s) ** 2
    middle = snr + _STAGE * (snr_s - snr)
    return field.path.time_of(torch.tensor(0.5 * math.log(middle), dtype=torch.float64)).clamp(float(s), float(t))


@dataclass(frozen=True)
class SRK(Solver):
    """Two-stage stochastic Runge-Kutta method of strong order 1.5, exact where the denoiser is constant.

    In `z = alpha x / sigma^2` and in the time `r = (alpha / sigma)^2` the reverse SDE is

        dz = E[x_0 | z] dr + dW,

    its linear part gone and its noise constant. There the scheme for additive noise (Roessler 2010, SRA1) is

        z_m = z + 3/4 h k_1 + 3/2 I / h,    z_s = z + h (k_1 + 2 k_2) / 3 + W,

    k_1 and k_2 the denoiser at (z, r) and (z_m, r + 3/4 h), W the increment of the noise and I its time integral over
    the step. In x both are draws of the ancestral posterior `p(x_s | x_t, x_0)`: to the stage with x_0 = k_1 and noise
    `(sqrt(3) w + v) / 2`, to s with x_0 = (k_1 + 2 k_2) / 3 and noise w; v, w standard normal. So every step is stable,
    and one out of alpha = 0 is regular. Weak order 2.
    """

    order: ClassVar[int] = 2
    strong_order: ClassVar[float] = 1.5
    evals_per_step: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        first = field(x, t)
        if scales(field, s)[1] == 0:
            return first * scales(field, s)[0], state
        w, v = noise(), noise()
        middle = stage_time(field, t, s)
        on_x, on_denoised, std = posterior_coefficients(field, t, middle)
        correlated = combine(w, _CORRELATION, v, math.sqrt(1 - _CORRELATION**2))
        stage = combine(x, on_x, first, on_denoised).add_(correlated, alpha=std)
        average = combine(first, _WEIGHTS[0], field(stage, middle), _WEIGHTS[1])
        on_x, on_denoised, std = posterior_coefficients(field, t, s)
        return combine(x, on_x, average, on_denoised).add_(w, alpha=std), state
