"""All steps of a grid at once: Picard's iteration over a sliding window (ParaDiGMS).

A rule that makes one step, linear in x and in what the denoiser says,

    x_{j+1} = a_j x_j + sum_r w_{j,r} D(x_{j+r}, t_{j+r}),    r = -1, 0, 1,

is in `y = x / n`, `n = hypot(alpha, sigma)`, a sum, `y_{j+1} = y_j + f_j`, whose terms are

    f_j = (a_j n_j / n_{j+1} - 1) y_j + sum_r w_{j,r} D(n_{j+r} y_{j+r}, t_{j+r}) / n_{j+1}.

Picard's iteration takes all terms from the last iterate, one network call for all of them, and sums:
`y_j^{k+1} = y_p + sum_{p <= i < j} f_i(y^k)`. Where r <= 0 the k-th iterate is exact at the first k points, so that it
ends, after as many iterations as there are steps at most, at what the rule gives step by step.

The fixed point is the same in every coordinate, the number of iterations is not. Until the end is within 1e-3 (DDIM,
VP, 200 steps, digits smoothed by 0.1), `x / hypot(s alpha, sigma)` takes 17, 11, 11 and 10 at s = 0 (the linear part
of DDIM removed), 0.1, 0.3 and 1. The last is n, which is 0 at neither end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError, choose
from undiffuse.core.shapes import as_time
from undiffuse.paths import Path
from undiffuse.solvers.base import Bound, Course, Event, Field, Noise, Scalar, Solver, scales
from undiffuse.solvers.rules import RULES


@dataclass(frozen=True)
class Picard(Solver):
    """ParaDiGMS: what a rule gives step by step, in fewer network calls one after the other, of more rows each.

    Shih et al. 2023, algorithm 1 (section 9.8). Each iteration asks the denoiser at all points of a window of the grid,
    and sums; the window then begins at the first point that has changed by more than the tolerance, and points that
    come into it start from the last y known. The points of a sample before its window are final. Every sample has a
    window of its own, so neither its result nor its calls depend on who shares its batch.

    A point is left alone once all before it are and its change is at most `tolerance`: root mean square over the event,
    in units of `x / hypot(alpha, sigma)`, which is of order 1 for data of unit variance. The paper's scale, the
    variance of a step's noise, depends on the number of steps; this does not. What is left of the error at a point
    grows with the flow from there on: tenfold and more for a sample near the border between two modes.

    In the record of `sample`: `rounds`, the iterations of each sample, `nfe_each` the rows that it put through the
    network, `nfe` the iterations of the slowest, and `speed_up`, steps over iterations. A callback is told of the steps
    after all of them are done.

    Args:
        inner: the rule, of `RULES`: "ddim", "euler", "dpmpp-2m", or "trapezoid", which is implicit: the end of a step
            is taken from the last iterate.
        window: points asked at a time; memory grows with it. A window as long as the grid takes the fewest iterations.
        tolerance: see above.
        batch: rows in a network call. An iteration of more rows takes several calls.
        group: processes that share the rows of each iteration, all of which call `sample` with the same arguments
            (x and what is final are taken from the first) and get the same answer.

    Raises:
        ArgumentError: an argument out of its range; a rule that draws noise, or is not of this form. While sampling,
            SamplingError: the trapezoid's iteration does not converge.
    """

    evals_per_step: ClassVar[int] = 1  # the least
    adaptive: ClassVar[bool] = True
    at_once: ClassVar[bool] = True
    inner: str = "ddim"
    window: int = 128
    tolerance: float = 1e-4
    batch: int = 256
    group: Any = None

    def __post_init__(self):
        if not isinstance(self.inner, str):
            raise ArgumentError(
                f"inner is {self.inner!r}: expected the name of a rule without noise, {', '.join(sorted(RULES))}"
            )
        choose(self.inner, RULES, "inner rule (one without noise, linear in what the denoiser says)")
        for name in ("window", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name} is {value!r}: expected a whole number of at least 1")
        if not (type(self.tolerance) in (int, float) and 0 < self.tolerance < math.inf):
            raise ArgumentError(f"tolerance is {self.tolerance!r}: expected a number above 0")
        if self.group is not None and not (dist.is_available() and isinstance(self.group, dist.ProcessGroup)):
            raise ArgumentError(f"group is {self.group!r}: expected a process group of torch.distributed, or None")

    @property
    def order(self) -> float:  # type: ignore[override]
        return RULES[self.inner].order

    def default_grid(self, path: Path, steps: int) -> Float[Tensor, " n"]:
        """The inner rule's."""
        return RULES[self.inner].grid(path, steps)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        """One step alone: the inner rule's first."""
        return self.run(field, x, torch.stack([t, s])).x, state

    def run(self, field: Field, x: Event, grid: Float[Tensor, " n"], keep: bool = False) -> Course:
        if not isinstance(field, Bound):
            raise ArgumentError(f"Picard's iteration needs a Bound denoiser, given {type(field).__name__}")
        field.track(len(x))
        if self.group is not None:
            x = x.clone(memory_format=torch.contiguous_format)  # the caller keeps his
            dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        work = _Iteration(self, field, x, grid, keep)
        most = work.steps if not RULES[self.inner].implicit else 10 * work.steps + 100
        rounds = 0
        while len(work.now.rows):
            if rounds == most:
                raise SamplingError(
                    f"the iteration of '{self.inner}' did not come below a change of {self.tolerance:g} in {most} "
                    f"rounds for {len(work.now.rows)} of {len(x)} samples: take more steps, a larger tolerance, x in "
                    "float64, or the rule 'dpmpp-2m'"
                )
            work.advance()
            rounds += 1
        return Course(work.x, work.states, work.denoised)


@dataclass
class _Windows:
    """The samples still on their way, each with its window; point 0 of a window is final."""

    rows: Int[Tensor, " n"]
    start: Int[Tensor, " n"]
    y: Float[Tensor, "n points d"]
    before: Float[Tensor, "n d"]  # what the denoiser said at the point before the window

    def only(self, kept: Bool[Tensor, " n"]) -> _Windows:
        return self if bool(kept.all()) else _Windows(*(getattr(self, f.name)[kept] for f in fields(self)))


class _Iteration:
    """The tables of a run, its windows, and what is final: x (B, *event), and where kept all states."""

    def __init__(self, solver: Picard, field: Bound, x: Event, grid: Tensor, keep: bool):
        self.solver, self.field = solver, field
        self.rule = RULES[solver.inner]
        self.steps = len(grid) - 1
        self.size = min(solver.window, self.steps)
        self.event = tuple(x.shape[1:])
        self.times = as_time(grid, x)
        times = [None, *grid.unbind()]
        weights = [self.rule.weights(field, (b, t, s)) for b, (t, s) in zip(times, pairwise(times[1:]))]
        n = torch.tensor([math.hypot(*scales(field, t)) for t in times[1:]], dtype=torch.float64)
        w = torch.tensor(weights, dtype=torch.float64) / n[1:, None]
        w[:, 0] = w[:, 0] * n[:-1] - 1
        self.asked = torch.ones(self.steps + 1, dtype=torch.bool, device=x.device)
        self.asked[-1] = bool(w[-1, 3] != 0)
        self.weights, self.n = w.to(x), n.to(x)
        y = (x / self.n[0]).reshape(len(x), -1)
        rows = torch.arange(len(x), device=x.device)
        self.now = _Windows(rows, torch.zeros_like(rows), y[:, None].repeat(1, self.size + 1, 1), torch.zeros_like(y))
        self.x = torch.empty_like(x)
        self.states = x.new_empty(self.steps + 1, *x.shape) if keep else None
        self.denoised = x.new_empty(self.steps, *x.shape) if keep else None

    def advance(self) -> None:
        """One iteration: ask, sum, and let each window slide over what has settled."""
        now = self.now
        points = now.start[:, None] + torch.arange(self.size + 1, device=now.start.device)
        inside = points[:, :-1] < self.steps
        denoised = self._ask(now, points)
        y = torch.cat([now.y[:, :1], now.y[:, :1] + self._terms(now, points, inside, denoised).cumsum(1)], 1)
        settled = self._settled(y, now.y, inside)
        if self.solver.group is not None:  # rounding on unlike machines must not part them
            dist.broadcast(settled, dist.get_global_rank(self.solver.group, 0), group=self.solver.group)
        if self.states is not None:
            self._keep(now.rows, points, settled, y, denoised)
        place = torch.arange(self.size + 1, device=settled.device) + settled[:, None]
        each = torch.arange(len(settled), device=settled.device)
        # Points that come into the window start from the last one known.
        moved = y[each[:, None], place.clamp(max=self.size)]
        after = _Windows(now.rows, now.start + settled, moved, denoised[each, (settled - 1).clamp(min=0)])
        done = after.start >= self.steps
        ends = after.y[done, 0] * self.n[-1]
        self.x[after.rows[done]] = ends.reshape(-1, *self.event)
        self.now = after.only(~done)

    def _terms(self, now: _Windows, points: Tensor, inside: Tensor, denoised: Tensor) -> Float[Tensor, "n points d"]:
        """The f_j of the windows' steps, 0 beyond the grid."""
        w = torch.where(inside[..., None], self.weights[points[:, :-1].clamp(max=self.steps - 1)], 0)[..., None]
        terms = w[:, :, 0] * now.y[:, :-1] + w[:, :, 2] * denoised[:, :-1]
        if bool((self.weights[:, 1] != 0).any()):
            terms += w[:, :, 1] * torch.cat([now.before[:, None], denoised[:, :-2]], 1)
        return terms + w[:, :, 3] * denoised[:, 1:] if self.rule.implicit else terms

    def _settled(self, y: Tensor, before: Tensor, inside: Tensor) -> Int[Tensor, " n"]:
        """How many leading points are final now."""
        change = (y - before)[:, 1:].square().mean(2).sqrt()
        final = (change <= self.solver.tolerance) & inside
        if not self.rule.implicit:
            final[:, 0] = True  # exact: it follows from the window's start alone
        count = final.long().cumprod(1).sum(1)
        # What is not finite one step from a final point never will be: end there.
        lost = ~torch.isfinite(y[:, 1]).all(1)
        return torch.where(lost, inside.sum(1), count)

    def _ask(self, now: _Windows, points: Tensor) -> Float[Tensor, "n points d"]:
        """What the denoiser says at the points of all windows, 0 where it is not asked."""
        wanted = self.asked[points.clamp(max=self.steps)] & (points <= self.steps)
        wanted[:, -1] &= self.rule.implicit
        which, place = wanted.nonzero(as_tuple=True)
        point = points[which, place]
        x = (now.y[which, place] * self.n[point, None]).reshape(-1, *self.event)
        denoised = torch.zeros_like(now.y)
        denoised[which, place] = self._shared(x, self.times[point], now.rows[which]).reshape(len(which), -1)
        return denoised

    def _shared(self, x: Event, t: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Event:
        """The denoiser's answers to all rows, which the processes of the group share out among themselves."""
        self.field.count(rows)
        group = self.solver.group
        if group is None:
            return self._answers(x, t, rows)
        each = -(-len(x) // dist.get_world_size(group))
        mine = slice(dist.get_rank(group) * each, (dist.get_rank(group) + 1) * each)
        part = x.new_zeros(each, *self.event)
        if len(x[mine]):
            part[: len(x[mine])] = self._answers(x[mine], t[mine], rows[mine])
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return torch.cat(parts)[: len(x)]

    def _answers(self, x: Event, t: Float[Tensor, " n"], rows: Int[Tensor, " n"]) -> Event:
        parts = (part.split(self.solver.batch) for part in (x, t, rows))
        return torch.cat([self.field.answer(*some) for some in zip(*parts)])

    def _keep(self, rows: Tensor, points: Tensor, settled: Tensor, y: Tensor, denoised: Tensor) -> None:
        """Write what is final into `states` and `denoised`."""
        assert self.states is not None
        assert self.denoised is not None
        which, place = (torch.arange(self.size, device=settled.device) < settled[:, None]).nonzero(as_tuple=True)
        step = points[which, place]
        self.denoised[step, rows[which]] = denoised[which, place].reshape(-1, *self.event)
        states = y[which, place + 1] * self.n[step + 1, None]
        self.states[step + 1, rows[which]] = states.reshape(-1, *self.event)
