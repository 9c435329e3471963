"""One multistep method: polynomials through past evaluations, integrated exactly against the flow's own weight.

`undiffuse.solvers.polynomials` has the flow, `d (x / N) / dm = P`. A step from t to s is then

    x_s = (N_s / N_t) x_t + N_s sum_j w_j P_j,    w_j = integral over m from t to s of l_j(u(m)),

l_j the polynomials of Lagrange through the last evaluations, in a coordinate u. With a corrector the step is made anew
once the evaluation at its end is known, which the next step needs anyway, with that evaluation among the P_j (predict,
evaluate, correct: no further network call). What the corrector makes of x is x and a sum of the P_j, so it is no tensor
of its own: its weights are added to those of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.sums import combine, weighted_sum
from undiffuse.fields import Answer
from undiffuse.paths import Path, is_value
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, ask, spare, spends
from undiffuse.solvers.grids import curved_angle, make_grid
from undiffuse.solvers.level import Level, TimeOf, own_angle, smooth_end
from undiffuse.solvers.noise_share import NoiseShare
from undiffuse.solvers.past import (
    Past,
    Value,
    Weights,
    added,
    added_up,
    after,
    chosen,
    lengths_of,
    told_by,
    total,
)
from undiffuse.solvers.polynomials import COORDINATES, Coordinate, flow_weights, lagrange, time_weights
from undiffuse.solvers.runge_kutta import Euler, velocity_coefficients

TURNS = {"noise": 0.0, "data": 1.0}
RULES: dict[str, None] = {"exact": None, "midpoint": None, "mean": None}
# Where alpha is 0 a model's answer is the mean of the data whatever x: it is asked at this angle instead.
_EARLIEST = math.atan(20.0)
_QUARTER = 0.5 * math.pi
_INFINITE = ("half-log-snr", "sigma")  # at alpha = 0
# A polynomial of k evaluations is not followed where its weights are TRUST^k times larger than their sum: far beyond
# its nodes, where steps grow fast. On equal steps they are (1.2 to 1.7)^k times larger.
_TRUST = 2.0


@dataclass(frozen=True)
class Multistep(Solver):
    """Exponential Adams methods: of any order, in any prediction and variable, with or without corrector.

    Known methods are settings: DEIS (Zhang and Chen 2023, tAB) is ("noise", "time"); DPM-Solver++ (Lu et al. 2022b)
    ("data", "half-log-snr"), its 2M with the rule "midpoint"; UniPC (Zhao et al. 2023) that with the corrector; iPNDM
    (Zhang and Chen 2023, Liu et al. 2022) ("noise", "step") with the rule "mean"; the classical ones of Adams and
    Bashforth "velocity". The default is none of these: evaluations are turned nearly to the data, 15/16, polynomials
    are of the angle, and the corrector is used; both ends of every path are then ordinary points. With `miss` = 0.5 it
    is `abm-4`.

    The first steps have fewer evaluations to go by and are of lower order. A step out of alpha = 0 has none before it,
    and asks at sigma / (scale alpha) = 20, where x is still its noise: there is no use in asking for the data's mean.

    Args:
        points: evaluations of the predictor's polynomial, the one at the step's start among them. The corrector takes
            one more.
        prediction: "noise", "data", a number between 0 (noise) and 1 (data), the turn as a share of pi / 2; or
            "velocity", the path's own in its own time, `dx = v dt`.
        variable: of the polynomials: "angle", "half-log-snr", "sigma" (sigma / alpha), "canonical"
            (sigma / (alpha + sigma)), "time", "step" (equal steps are supposed). Of "velocity" it is the time.
        corrector: predict, evaluate, correct.
        rule: "exact"; "midpoint": the polynomial's value in the middle of the step; "mean": its mean over the step.
            These two are of order 2 at most.
        scale: of the data, the unit of alpha in all of the above but "time" and "step"; None: by their size, see
            `for_event`.
        eta: noise as a share of the forward SDE's: 0 for the ODE, 1 for the reverse SDE of the path. For "data" in the
            half log-SNR (`undiffuse.solvers.noise_share`; Lu et al. 2022b, section 5). A corrected step keeps the noise
            that it was predicted with, as in SA-Solver (Xue et al. 2023). Of weak order 2 at most.
        noisy: the values of sigma / alpha, whatever the scale, between which there is noise; nothing where eta = 0.
        miss: a sample's next step is predicted through as many evaluations as would have told the newest one to within
            this share of the largest (lengths of P): far fewer where strong guidance makes the field stiff, where
            extrapolations run away. None: through all. It needs a look at the answers, one wait for the device a step.

    Raises:
        ArgumentError: a setting out of its range, or eta with settings that it is not for.
    """

    points: int = 4
    prediction: str | float = 15 / 16
    variable: str = "angle"
    corrector: bool = True
    rule: str = "exact"
    eta: float = 0.0
    scale: float | None = None
    noisy: tuple[float, float] = (0.0, math.inf)
    miss: float | None = None

    def __post_init__(self):
        if not (type(self.points) is int and 1 <= self.points <= 8):
            raise ArgumentError(f"points is {self.points!r}: expected 1 to 8 evaluations for the polynomial")
        if isinstance(self.prediction, str):
            choose(self.prediction, {**TURNS, "velocity": None}, "prediction")
        elif not (type(self.prediction) in (int, float) and 0 <= self.prediction <= 1):
            raise ArgumentError(f"prediction is {self.prediction}: expected a name, or 0 (noise) to 1 (data)")
        choose(self.variable, {**COORDINATES, "time": None, "step": None}, "variable")
        choose(self.rule, RULES, "rule")
        if self.variable == "step" and (self.rule == "exact" or self.corrector):
            raise ArgumentError("variable 'step' knows nothing between steps: use the rule 'mean' and no corrector")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ArgumentError(f"scale is {self.scale}: expected a number above 0, the spread of the data")
        if not 0 <= self.eta < math.inf:
            raise ArgumentError(f"eta is {self.eta}: expected 0 (the ODE) or more (1: the reverse SDE)")
        if (self.rule == "mean" and self.eta) or (self.rule != "exact" and self.prediction == "velocity"):
            raise ArgumentError(
                f"rule is '{self.rule}': expected 'exact' with prediction 'velocity', no 'mean' with eta"
            )
        if self.miss is not None and not (self.miss > 0 and self.variable not in ("time", "step") and not self.eta):
            raise ArgumentError(
                f"miss is {self.miss}: expected a share above 0; not for the variables 'time' and 'step', nor with eta"
            )
        if self.eta and (self.prediction, self.variable) != ("data", "half-log-snr"):
            raise ArgumentError("eta > 0 is for prediction 'data' in 'half-log-snr'")
        if not (isinstance(self.noisy, tuple) and len(self.noisy) == 2) or not 0 <= self.noisy[0] < self.noisy[1]:
            raise ArgumentError(f"noisy is {self.noisy}: expected (low, high), 0 <= low < high, of sigma / alpha")

    @property
    def order(self) -> float:  # type: ignore[override]
        if self.eta:
            return min(self.points + self.corrector, 2)
        return min(self.points + self.corrector, 8 if self.rule == "exact" else 2)

    @property
    def evals_per_step(self) -> int:  # type: ignore[override]
        return 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def phi(self) -> float:
        """The turn in radians."""
        share = TURNS.get(self.prediction, 0.0) if isinstance(self.prediction, str) else self.prediction
        return share * _QUARTER

    @property
    def noise_share(self) -> NoiseShare:
        """eta by half log-SNR, of alpha in units of the scale."""
        return NoiseShare.between(self.eta, self.noisy, self.unit)

    @property
    def unit(self) -> float:
        """The scale; 1 where none was given."""
        return self.scale or 1.0

    def for_event(self, event: Sequence[int]) -> Multistep:
        """With the scale of data of that shape: `0.18 sqrt(D)`, at least 1.

        That is about the spread of D alike pixels of spread 1 along their widest direction, their common brightness,
        which is the first to rise out of the noise: 10 for images of 32 x 32 in colour.
        """
        return self if self.scale is not None else replace(self, scale=max(1.0, 0.18 * math.sqrt(math.prod(event))))

    def unconditional(self) -> Multistep:
        return replace(self, miss=None)

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """By angle "curved-angle" at the data's scale, else "canonical".

        In the path's own time as `Euler`, but "karras" where the path ends in noise, as VE, whose time is stiff.
        """
        if self.prediction == "velocity" and float(path.sigma(torch.tensor(path.t_min, dtype=torch.float64))) > 0:
            return make_grid(path, steps, "karras")
        if self.prediction == "velocity":
            return Euler().default_grid(path, steps)
        if self.variable != "angle":
            return make_grid(path, steps, "canonical")
        # Where alpha = 0 many steps begin nearer to it, so that what the first one lacks vanishes with their size.
        return make_grid(path, steps, curved_angle(self.unit, max(20.0, float(steps))))

    @spends
    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        if self.scale is None:
            return self.for_event(x.shape[1:]).step(field, x, t, s, state, noise)
        past: Past = state if state is not None else Past()
        start, end = (Level.of(field, time, self.unit) for time in (t, s))
        if start.alpha == 0:
            return self._first(field, x, start, end, noise)
        answer = ask(field, x, t)
        value = self._value(field, x, answer, start, t)
        levels, values = (start, *past.levels), (value, *past.values)
        lengths = (*self._lengths(value), *past.lengths)
        made = self._trusted(field, start, end, levels[: self.points])
        if self.miss is not None and len(values) > 2:
            places = self._coordinate(field)(np.array([level.theta for level in levels])).tolist()
            counts = told_by(values[: self.points + 1], lengths, places, self.miss)
            if counts is not None:  # of fewer than all in some samples
                most = min(len(values) - 1, self.points)
                fewer = [self._trusted(field, start, end, levels[:k]) for k in range(1, most)]
                made = chosen([*fewer, made], counts - 1)
        again = self.corrector and past.x_next is x and past.made is not None
        weights = after(made, self._correction(field, past, start, levels)) if again else made
        kept, spent = self.points - (self.miss is None and not self.corrector), spare(field, x)
        if kept and len(value.tensors) > 1:
            # The oldest value is no longer needed. The newest stays x and D where it is asked for once more only.
            gone = values[kept] if spent is not None and len(values) > kept else None
            moved = total(x, values, weights, gone.tensors[0] if gone is not None and gone.own else None)
            stays = kept == 1 and answer.on_x == 0
            values = (value._replace(own=spent is not None) if stays else added_up(value, spent), *past.values)
        else:
            moved = total(x, values, weights, spent)
        if self.eta:
            # A corrected step keeps this noise: the correction is added to what was predicted.
            moved = _noised(moved, noise, self.noise_share.step(start, end)[1])
        return moved, Past(levels[:kept], values[:kept], lengths[:kept], start, moved, made)

    def _first(self, field: Field, x: Event, start: Level, end: Level, noise: Noise) -> tuple[Event, Any]:
        """Out of alpha = 0: `x_s = alpha_s D + sigma_s z`, z what is kept of `x / sigma` and fresh noise.

        D is asked where `x / sigma` is all but all of x.
        """
        theta = max(_EARLIEST, 0.5 * (start.theta + end.theta))
        t = field.path.time_of_angle(torch.tensor(own_angle(theta, self.unit), dtype=torch.float64))
        level = Level.of(field, t, self.unit)
        denoised = field(x * (level.sigma / start.sigma), t)
        on_x, std = self.noise_share.step(start, end)
        moved = weighted_sum((x, denoised), (on_x, end.alpha / self.unit))
        moved = _noised(moved, noise, std)
        # In variables that are infinite at alpha = 0 this evaluation is too far back for the next step's polynomial.
        if self.variable in _INFINITE:
            return moved, Past()
        if self.prediction == "velocity":
            rate = velocity_coefficients(field, t)
            on_noise, on_denoised = rate[0] * level.sigma, rate[1] + rate[0] * level.alpha / self.unit
        else:
            on_noise, on_denoised = math.cos(self.phi), -math.sin(self.phi) / self.unit
        if self.prediction == "data":
            value = Value((denoised,))
            made = on_x, (end.alpha / self.unit,)
            return moved, Past((level,), (value,), self._lengths(value), start, moved, made)
        value = Value((combine(x, on_noise / start.sigma, denoised, on_denoised),), own=True)
        # With phi = 0 the value goes to infinity at the start and the step stays as it is; else D is made of x and P.
        made = None
        if self.phi > 0:
            on_value = end.alpha / self.unit / on_denoised
            made = on_x - on_value * on_noise / start.sigma, (on_value,)
        return moved, Past((level,), (value,), self._lengths(value), start, moved, made)

    def _value(self, field: Field, x: Event, answer: Answer, level: Level, t: Tensor) -> Value:
        """P at a level: `(cos(phi) x - N D) / sigma`; D itself where it is -D."""
        if self.prediction == "data":
            return self._kept(x, answer, (0.0, 1.0))
        if self.prediction == "velocity":
            return self._kept(x, answer, velocity_coefficients(field, t))
        weights = (math.cos(self.phi) / level.sigma, -self._size(level) / (level.sigma * self.unit))
        return self._kept(x, answer, weights)

    def _kept(self, x: Event, answer: Answer, weights: tuple[float, float]) -> Value:
        """A value of x and D: D itself, or the two, to be added up with the step; at once where its length is asked."""
        both = answer.weights(*weights)
        if answer.on_x == 0 and both == (0.0, 1.0):
            return Value((answer.output,))
        if self.miss is None:
            return Value((x, answer.output), both)
        return Value((answer.plus(x, *weights),), own=True)

    def _lengths(self, value: Value) -> tuple[Tensor, ...]:
        """Of the value's samples; none where no one asks for them."""
        return () if self.miss is None else (lengths_of(value),)

    def _size(self, level: Level) -> float:
        """N."""
        return math.cos(self.phi) * level.alpha + math.sin(self.phi) * level.sigma

    def _correction(self, field: Field, past: Past, end: Level, levels: tuple[Level, ...]) -> Weights:
        """Weights of x, as predicted, and of the values in what the last step is when made anew with the newest one.

        The step went from y to `x = a y + sum_j w_j P_j`; anew it is `b y + sum_j v_j P_j`, and so
        `(b / a) x + sum_j (v_j - (b / a) w_j) P_j`.
        """
        assert past.start is not None
        assert past.made is not None
        on_start, weights = self._trusted(field, past.start, end, levels[: self.points + 1])
        # With noise both weights of x are one number, and may be 0.
        ratio = 1.0 if self.eta else on_start / past.made[0]
        return ratio, added(weights, [0.0, *(-ratio * w for w in past.made[1])])

    def _trusted(self, field: Field, start: Level, end: Level, levels: tuple[Level, ...]) -> Weights:
        """Weights of x and of the evaluations, of as many of these as the polynomial is followed through."""
        on_x, weights = self._weights(field, start, end, levels)
        while sum(map(abs, weights)) > _TRUST ** len(weights) * abs(sum(weights)):
            on_x, weights = self._weights(field, start, end, levels[: len(weights) - 1])
        return on_x, weights

    def _weights(self, field: Field, start: Level, end: Level, levels: tuple[Level, ...]) -> Weights:
        """Weights of x and of the evaluations."""
        if self.prediction == "velocity" and end.sigma == 0 and (len(levels) == 1 or not smooth_end(field, end)):
            # Closed form: E[x_0] at the start, of which the velocity and x are made.
            rate = velocity_coefficients(field, torch.tensor(start.t, dtype=torch.float64))
            alpha = end.alpha / self.unit
            return -rate[0] / rate[1] * alpha, (alpha / rate[1],)
        if self.prediction == "velocity":
            return 1.0, time_weights(tuple(level.t for level in levels), (start.t, end.t))
        coordinate = self._coordinate(field)
        if end.sigma == 0 and self.variable in ("half-log-snr", "step"):
            levels = levels[:1]
        if self.eta:
            return self.noise_share.weights(self.rule, start, end, levels, end.alpha / self.unit)
        thetas = tuple(level.theta for level in levels)
        if self.prediction == "data" and end.sigma == 0:
            # The weight gathers at the end: what counts is the polynomial there.
            if len(levels) == 1:
                return 0.0, (end.alpha / self.unit,)
            places = coordinate(np.array([*thetas, end.theta]))
            return 0.0, [end.alpha / self.unit * w for w in _at(places)]
        sign = -self._size(end) / self.unit if self.prediction == "data" else self._size(end)
        places = None
        if self.variable == "step":
            places = (*(-float(j) for j in range(len(levels))), 0.0, 1.0)
        # The times of angles are found again on a path that is a value only; another may have changed.
        found_again = self.variable != "time" or is_value(field.path)
        weights = flow_weights if found_again else flow_weights.__wrapped__
        found = weights(self.phi, self.rule, thetas, (start.theta, end.theta), coordinate, places)
        return self._size(end) / self._size(start), [sign * w for w in found]

    def _coordinate(self, field: Field) -> Coordinate:
        if self.variable == "time":
            return TimeOf(field.path, self.unit)
        return COORDINATES.get(self.variable, COORDINATES["angle"])


def _noised(x: Event, noise: Noise, std: float) -> Event:
    """x, a tensor of the step's own, with fresh noise."""
    return x.add_(noise(), alpha=std) if std > 0 else x


def _at(places: np.ndarray) -> list[float]:
    """Weights of the polynomial's value at the last place, by its values at the others."""
    return lagrange(places[:-1].tolist(), places[-1:])[:, 0].tolist()


def DPMpp2M() -> Multistep:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): `D = D_t + h / (2 h_prev) (D_t - D_prev)`, h in half log-SNR."""
    return Multistep(2, "data", "half-log-snr", corrector=False, rule="midpoint")


MULTISTEP: dict[str, Callable[[], Multistep]] = {
    "abm-4": lambda: Multistep(miss=0.5),
    **{f"ab{k}": (lambda k=k: Multistep(k, "velocity", "time", corrector=False)) for k in (2, 3, 4)},
    **{f"deis-{k}": (lambda k=k: Multistep(k, "noise", "time", corrector=False)) for k in (2, 3)},
    "ipndm": lambda: Multistep(4, "noise", "step", corrector=False, rule="mean"),
    "dpmpp-2m": DPMpp2M,
    "dpmpp-3m": lambda: Multistep(3, "data", "half-log-snr", corrector=False),
    **{f"unipc-{k}": (lambda k=k: Multistep(k, "data", "half-log-snr")) for k in (2, 3)},
    "dpmpp-2m-sde": lambda: Multistep(2, "data", "half-log-snr", corrector=False, rule="midpoint", eta=1.0),
    "dpmpp-3m-sde": lambda: Multistep(3, "data", "half-log-snr", corrector=False, eta=1.0),
    "sa-2": lambda: Multistep(2, "data", "half-log-snr", rule="midpoint", eta=1.0, noisy=(0.05, 1.0)),
    "sa-3": lambda: Multistep(3, "data", "half-log-snr", eta=1.0, noisy=(0.05, 1.0)),
}
