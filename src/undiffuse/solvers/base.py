"""What every solver is made of: the protocol, the field it calls, and the one fused update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.instants import sent
from undiffuse.core.random import Streams
from undiffuse.core.shapes import as_time
from undiffuse.core.sharing import alone
from undiffuse.fields import Answer, Denoiser
from undiffuse.paths import Path, for_values
from undiffuse.solvers.grids import make_grid

Event = Float[Tensor, "b *event"]
Scalar = Float[Tensor, ""]
Noise = Callable[[], Tensor]
Cond = Tensor | dict[str, Tensor] | None


@runtime_checkable
class Field(Protocol):
    """What a solver needs of a model: a path, and `E[x_0 | x_t]` when called. A `Denoiser` or a `Bound`."""

    path: Path

    def __call__(self, x: Tensor, t: Tensor | float, /) -> Tensor: ...


@dataclass(frozen=True)
class Solver(ABC):
    """A way to step from time t to a smaller time s. A frozen value: what a run remembers travels in `state`.

    Attributes:
        order: of convergence; the weak order where `stochastic`.
        evals_per_step: field evaluations of a step inside the path. A step that ends in sigma = 0, and for some
            a step that starts in alpha = 0, is a closed form and takes one.
        stochastic: whether steps draw noise.
        adaptive: whether a step makes evaluations as it needs them, for each sample its own number.
        at_once: whether a grid is solved as a whole, by `run`, not step after step. Nothing can be corrected between
            the steps then.
        made_for: the only number of steps that it has; None: any.
    """

    order: ClassVar[float]
    evals_per_step: ClassVar[int]
    stochastic: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    at_once: ClassVar[bool] = False
    made_for: ClassVar[int | None] = None

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The times used where the caller gives none: `make_grid(path, steps, "canonical")`.

        Measured for `dpmpp-2m` against `exact_flow`: error of x_0 (root mean square; geometric mean over 5, 6, 8, 10,
        12, 15 and 20 steps and over Linear, VP, Cosine, VE and Karras) on a ring of 8 modes / 3 wide modes / 300 digits
        smoothed by 0.1: canonical 0.017 / 0.011 / 0.113, angle 0.063 / 0.030 / 0.105, quadratic 0.036 / 0.040 / 0.168,
        half-log-snr 0.059 / 0.048 / 0.176, time 0.093 / 0.060 / 0.155, karras 0.140 / 0.102 / 0.200. Of the exponents
        1.5, 1.75, 2 and 2.5 of the canonical time the first was the best.
        """
        return make_grid(path, steps, "canonical")

    def for_steps(self, steps: int) -> Solver:
        """The solver for a run of that many steps; only churn, which is shared among them, depends on it."""
        return self

    def for_event(self, event: Sequence[int]) -> Solver:
        """The solver for data of that shape, (*event)."""
        return self

    def unconditional(self) -> Solver:
        """The solver without what it chooses by the model's answers, so that its steps are linear in these."""
        return self

    def init(self, field: Field, x: Event, t: Scalar) -> Any:
        """What the first step needs to know of the past: nothing."""
        return None

    @abstractmethod
    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        """`(x_s, state)` from `x_t`; t > s are float64 scalars on the CPU, `noise()` draws one tensor like x."""

    def run(self, field: Field, x: Event, grid: Float[Tensor, " n"], keep: bool = False) -> Course:
        """x carried along the whole grid, by a solver that is `at_once`; `keep` its states on the way."""
        raise NotImplementedError(f"{type(self).__name__} goes step by step")


class Course(NamedTuple):
    """What `Solver.run` returns: x at the end, and where kept the states (n, B, *event) at all times and the n - 1
    denoised."""

    x: Tensor
    states: Tensor | None = None
    denoised: Tensor | None = None


_SPENDING: set[Callable[..., Any]] = set()
S = TypeVar("S", bound=Callable[..., Any])


def spends(step: S) -> S:
    """Marks a `Solver.step` that writes over x, and over what its state holds, where `spare` says that it may.

    It returns a tensor of its own, and keeps x nowhere but in its state. A method that overrides or wraps it is not
    marked.
    """
    _SPENDING.add(step)
    return step


def spending(solver: Solver) -> bool:
    """Whether its step is marked by `spends`."""
    return getattr(solver.step, "__func__", None) in _SPENDING


class Bound:
    """A denoiser with its condition and its grid: called at scalar times, counted, its last answer kept.

    The scales of the path on the grid are computed once for all steps, in float64.

    Args:
        field: the denoiser.
        cond: passed to every call.
        grid: times at which solvers will ask for the scales; others are computed when asked for.

    Attributes:
        own: a state that only the run's loop and its solver hold, so that the step from it may write over it.

    One `Bound` serves one run: x of one dtype on one device.
    """

    def __init__(self, field: Denoiser, cond: Cond = None, grid: Tensor | None = None):
        self.field = field
        self.path = field.path
        self.cond = cond
        self.grid = grid
        self.calls = 0
        self.per_sample: Tensor | None = None
        self.rounds: Tensor | None = None
        self._last: tuple[Tensor, Answer] | None = None
        self._begun, self._reading = False, None
        self._asked = () if grid is None else tuple(grid.tolist())
        self._scales = scales_at(self.path, self._asked)
        self._rates: Mapping[float, tuple[float, float]] | None = None
        self._times: dict[float, Tensor] | None = None
        self.own: Tensor | None = None

    def foresee(self, times: Sequence[float]) -> None:
        """Times inside the grid's steps at which the solver will ask too, before the first call."""
        if times and self.grid is not None:
            self._asked = (*self.grid.tolist(), *times)
            self._scales = scales_at(self.path, self._asked)

    def __call__(self, x: Event, t: Tensor | float) -> Event:
        """`E[x_0 | x_t]`, in the dtype of x."""
        self._count_all()
        self.denoised = denoised = self._checked(self.field(self._shown(x), self._time(t, x), self.cond), x)
        return denoised

    def ask(self, x: Event, t: Tensor | float) -> Answer:
        """`E[x_0 | x_t]` as a sum, to be used before the next call."""
        if not isinstance(self.field, Denoiser):  # a compiled one, say
            return Answer(self(x, t))
        if not self._begun:
            self._reading, self._begun = self.field.reading(self._asked, x), True
        self._count_all()
        self._last = None
        shown = self._shown(x)
        answer = None if self._reading is None else self._reading(shown, float(t), self.cond)
        if answer is None:
            answer = self.field.ask(shown, self._time(t, x), self.cond)
            output = self._checked(answer.output, x)
            answer = answer if output is answer.output else answer._replace(output=output)
        self._last = x, answer
        return answer

    @property
    def denoised(self) -> Tensor | None:
        """The last answer for the whole batch, added up when it is asked for; None where x has been written over."""
        return None if self._last is None else self._last[1].data(self._last[0])

    @denoised.setter
    def denoised(self, denoised: Tensor) -> None:
        self._last = denoised, Answer(denoised)

    def spare(self) -> bool:
        """Whether x = `own`, of which nothing more will be asked, may be written over: nobody keeps it.

        The field is shown x as another tensor of the same memory, so that it is known whether it keeps that, or a view.
        """
        if self.own is None or not alone(self.own):
            return False
        if self._last is not None and self._last[0] is self.own and self._last[1].on_x != 0:
            self._last = None
        return True

    def _shown(self, x: Tensor) -> Tensor:
        return x.detach() if x is self.own else x

    def _settle(self) -> None:
        """Add the last answer up before its output may be overwritten."""
        if self._last is not None and self._last[1].on_x != 0:
            self.denoised = self._last[1].data(self._last[0])

    def _count_all(self) -> None:
        self.calls += 1
        if self.per_sample is not None and self.rounds is not None:
            self.per_sample += 1
            self.rounds += 1

    @staticmethod
    def _checked(denoised: Tensor, x: Tensor) -> Tensor:
        if denoised.shape != x.shape:
            raise ArgumentError(f"the field returned shape {tuple(denoised.shape)} for x of {tuple(x.shape)}")
        return denoised if denoised.dtype == x.dtype else denoised.to(x.dtype)

    def track(self, rows: int) -> None:
        """Count the calls of each of that many samples too, (B,) int64.

        In `per_sample` its rows of all calls; in `rounds` the calls that it was part of, one after the other.
        """
        if self.per_sample is None:
            self.per_sample = torch.full((rows,), self.calls, dtype=torch.int64)
            self.rounds = self.per_sample.clone()

    def at(self, x: Float[Tensor, "n *event"], t: Float[Tensor, " n"], rows: Tensor) -> Tensor:
        """`E[x_0 | x_t]` of some samples, each at its own time; `rows` says which. Counted as one call.

        `denoised`, the last answer for the whole batch, is left as it is.
        """
        self.count(rows)
        return self.answer(x, t, rows)

    def answer(self, x: Float[Tensor, "n *event"], t: Float[Tensor, " n"], rows: Tensor) -> Tensor:
        """As `at`, not counted: for parts of what one `count` has counted."""
        self._settle()
        return self._checked(self.field(x, as_time(t, x), rows_of(self.cond, rows)), x)

    def estimate(self, x: Event, t: Float[Tensor, " n"], rows: Tensor) -> tuple[Event, Event]:
        """`(E[x_0 | x_t], E[eps | x_t])`, otherwise as `at`."""
        self._settle()
        self.count(rows)
        x_0, noise = self.field.estimate(x, as_time(t, x), rows_of(self.cond, rows))
        return self._checked(x_0, x), self._checked(noise, x)

    def count(self, rows: Tensor) -> None:
        """One call of these samples; one may be there several times, at different times."""
        self.calls += 1
        if self.per_sample is not None and self.rounds is not None:
            rows = rows.to(self.per_sample.device)
            self.per_sample.index_add_(0, rows, torch.ones_like(rows))
            self.rounds[rows] += 1

    def _time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """t on the device of x: the grid is sent there once, at the first call, not time by time."""
        if self._times is None:
            asked = self._asked or (float(t),)
            self._times = sent(asked, x)
        found = self._times.get(float(t))
        return found if found is not None else as_time(t, x)

    def score(self, x: Event, t: Tensor) -> Event:
        """`grad log p_t(x)`, for correctors; counted as a call."""
        self._settle()
        self.calls += 1
        return self.field.score(x, self._time(t, x), self.cond).to(x.dtype)

    def scales(self, t: Tensor | float) -> tuple[float, float] | None:
        """(alpha, sigma) where t is on the grid."""
        return self._scales.get(float(t))

    def rates(self, t: Tensor | float) -> tuple[float, float] | None:
        """(alpha', sigma') where t is on the grid."""
        if self._rates is None:
            self._rates = rates_at(self.path, self._asked)
        return self._rates.get(float(t))


@for_values
def scales_at(path: Path, times: tuple[float, ...]) -> Mapping[float, tuple[float, float]]:
    """(alpha, sigma) by time."""
    return _table(path.alpha, path.sigma, times)


@for_values
def rates_at(path: Path, times: tuple[float, ...]) -> Mapping[float, tuple[float, float]]:
    """(alpha', sigma') by time."""
    return _table(path.alpha_dot, path.sigma_dot, times)


def _table(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], times: tuple[float, ...]
) -> Mapping[float, tuple[float, float]]:
    places = torch.tensor(times, dtype=torch.float64)
    return dict(zip(times, zip(first(places).tolist(), second(places).tolist()))) if times else {}


def rows_of(cond: Cond, rows: Tensor) -> Cond:
    """The condition of some of the samples."""
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {name: value[rows.to(value.device)] for name, value in cond.items()}
    return cond[rows.to(cond.device)]


class StreamNoise:
    """Standard normals of one shape, a draw a call, from the streams of the samples.

    Args:
        streams: one for each sample; their count of draws goes on.
        shape, dtype, device: of a draw, (B, *event).
    """

    def __init__(self, streams: Streams, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.streams, self.shape, self.dtype, self.device = streams, tuple(shape), dtype, device

    def __call__(self) -> Tensor:
        return self.streams.normal(self.shape, dtype=self.dtype, device=self.device)

    def branch(self) -> Streams:
        """Streams of the same samples for draws whose number is the sample's own affair; itself one draw."""
        branch = self.streams.fold(self.streams.draw)
        self.streams.draw += 1
        return branch


def ask(field: Field, x: Event, t: Tensor | float) -> Answer:
    """`E[x_0 | x_t]` as a sum, where the field knows it as one; to be used before the next call."""
    return field.ask(x, t) if isinstance(field, (Bound, Denoiser)) else Answer(field(x, t))


def spare(field: Field, x: Event) -> Event | None:
    """x where it may be written over (`Bound.spare`): what a sum may spend."""
    return x if isinstance(field, Bound) and field.own is x and field.spare() else None


def scales(field: Field, t: Tensor | float) -> tuple[float, float]:
    """`(alpha, sigma)` at a scalar time as Python floats, from the field's table where it carries one."""
    known = getattr(field, "scales", None)
    found = known(t) if known is not None else None
    return found or _pair(field.path.alpha, field.path.sigma, t)


def rates(field: Field, t: Tensor | float) -> tuple[float, float]:
    """`(alpha', sigma')` at a scalar time, as `scales`."""
    known = getattr(field, "rates", None)
    found = known(t) if known is not None else None
    return found or _pair(field.path.alpha_dot, field.path.sigma_dot, t)


def _pair(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], t: Tensor | float):
    time = torch.as_tensor(t, dtype=torch.float64)
    return float(first(time)), float(second(time))
