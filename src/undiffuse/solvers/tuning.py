"""`tune`: the numbers of a solver of few calls, fitted to a model's own trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.shapes import pad_to
from undiffuse.fields import Denoiser
from undiffuse.paths import Path
from undiffuse.solvers.base import Cond, Solver
from undiffuse.solvers.comparing import OWN
from undiffuse.solvers.descent import descend, whitening
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.ends import Ends, check_counts, relative, squares
from undiffuse.solvers.grids import make_grid
from undiffuse.solvers.integrate import get_solver
from undiffuse.solvers.tuned import MOST_CALLS, Tuned, linear_table, prediction_of

LEAST = 32
# Angles are moved in their square root, where grids of few steps are nearly equal; so much of the whole, at least, lies
# between two of them at the beginning.
_POWER, _APART = 0.5, 1e-3
# Below so much of the start's median error an error counts as none. With a tenth of it fits end sooner, and the largest
# errors are smaller.
_FLOOR = 0.1
# Held-out error is looked at after so many steps, and must fall by this much within so many looks.
_EVERY, _FALL, _LOOKS = 5, 2e-3, 6


class Progress(NamedTuple):
    """What `tune` tells its callback.

    Attributes:
        stage: "reference", "fit" or "measure".
        done, total: how many noises or steps of it; fits may end before their total.
        error: of the best so far as a share of the start's (geometric mean over held-out noises), of a fit.
    """

    stage: str
    done: int
    total: int
    error: float = 1.0


def tune(
    denoiser: Denoiser,
    event: Sequence[int],
    calls: int = 8,
    *,
    n: int = 512,
    seed: int = 0,
    cond: Cond = None,
    start: str | Solver = "abm-4",
    grids: Sequence[str] = (OWN, "angle"),
    reference: int = 100,
    batch: int = 256,
    most_steps: int = 300,
    callback: Callable[[Progress], object] | None = None,
) -> Tuned:
    """A solver of that many calls, fitted to the ends of n trajectories of this denoiser.

    All numbers of a `Tuned` are fitted together, angles and weights, by L-BFGS through the run; the field is
    differentiated by x and t. What falls is the mean of `log(d^2 + floor^2)`, d a trajectory's distance from its true
    end: the few that end at another mode weigh little. There are many minima, and where a fit begins decides which is
    found: it is made from each grid, and the one that does best on held-out noises is kept. Half of the noises are
    fitted, a quarter says when to stop and which to keep, a quarter is only measured, before and after:
    `solver.about` has `before` and `after`, each `rms` and `median` of d relative to the RMS length of the ends, and
    `grid`, from which it came.

    Args:
        denoiser: any denoiser that can be differentiated; guided ones too.
        event: the shape of its data.
        calls: 1 to 64.
        n: noises, at least 32.
        seed: of them.
        cond: for all n of them.
        start: the solver, of as many steps as calls, whose numbers are changed.
        grids: its times to begin with, one fit from each: "own", or names of grids. `before` is of the first.
        reference: steps of the 'abm-4' that makes the true ends.
        batch: trajectories at a time. One is differentiated through all calls at once, which takes memory.
        most_steps: of each fit.
        callback: told of what is done.

    Raises:
        ArgumentError: an argument out of its range; a start that does not take `calls` calls in as many steps; no
            grid, or an unknown one.
        SamplingError: the reference, or the start's run, is not finite.
    """
    check_counts(
        calls=(calls, 1, MOST_CALLS),
        n=(n, LEAST, math.inf),
        reference=(reference, 2, math.inf),
        batch=(batch, 1, math.inf),
        most_steps=(most_steps, 1, math.inf),
    )
    tell = callback or (lambda progress: None)
    tables = _tables(get_solver(start), grids, denoiser.path, calls, event)
    with evaluating(denoiser):
        ends = Ends.of(
            denoiser, tuple(event), cond, n, seed, reference, batch, lambda done: tell(Progress("reference", done, n))
        )
        fitted, held, kept = ends.shared_out()
        forms = _forms(tables, denoiser, fitted.rows(0, batch))
        first = next(iter(forms.values()))
        goal = _Goal(denoiser, first, fitted, held, batch)
        fits: dict[str, _Fit] = {}
        for name, form in forms.items():
            fits[name] = _fit(form, goal, most_steps, _teller(tell, goal, list(fits.values()), len(forms), most_steps))
        grid = min(fits, key=lambda name: fits[name].value)
        ways = ((first, first.zero), (forms[grid], fits[grid].z))
        errors = [relative(_distances(denoiser, form, z, kept, batch), kept) for form, z in ways]
    tell(Progress("measure", 1, 1))
    made = {"n": n, "seed": seed, "start": str(start), "grid": grid, "steps": fits[grid].steps, "reference": reference}
    solver = forms[grid].solver(fits[grid].z, prediction_of(denoiser))
    return solver.with_about(**made, before=errors[0], after=errors[1])


def _tables(solver: Solver, grids: Sequence[str], path: Path, calls: int, event: Sequence[int]) -> dict[str, Tuned]:
    """The start on each of the grids; on those that are the same, once."""
    if isinstance(grids, str) or not grids:
        raise ArgumentError(f"grids is {grids!r}: expected names of grids to begin with, such as ('own', 'angle')")
    tables: dict[str, Tuned] = {}
    for grid in grids:
        table = linear_table(solver, path, calls, event, None if grid == OWN else make_grid(path, calls, grid))
        if table.calls != calls:
            raise ArgumentError(
                f"start {solver!r}: {calls} steps of it take {table.calls} calls; take one of a call a step"
            )
        if table not in tables.values():
            tables[grid] = table
    return tables


def _forms(tables: dict[str, Tuned], denoiser: Denoiser, ends: Ends) -> dict[str, _Form]:
    """Where fits begin; without the grids, the first one apart, on which the start's run is not finite."""
    forms: dict[str, _Form] = {}
    for name, table in tables.items():
        try:
            forms[name] = _Form(table, denoiser, ends)
        except SamplingError:
            if not forms:
                raise
    return forms


def _scales(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    return path.alpha(t), path.sigma(t)


class _Form:
    """A table as a point z: 0 is the start.

    The weights of a call are moved in directions in which what is known at that call is uncorrelated and of size 1, by
    the runs of `ends`; the gaps between the angles' square roots by their logarithms.
    """

    def __init__(self, table: Tuned, denoiser: Denoiser, ends: Ends):
        self.table, self.path, n = table, denoiser.path, table.calls
        low = max(self.path.t_min, min(denoiser.t_low, self.path.t_max))
        times = torch.tensor([self.path.t_max, low, self.path.t_min], dtype=torch.float64)
        self.size = float(torch.hypot(*_scales(self.path, times[2])))
        span = self.path.angle(times[:2]) ** _POWER
        self.first, self.span = span[0], span[0] - span[1]
        places = torch.cat([span[:1], torch.tensor(table.angles, dtype=torch.float64) ** _POWER, span[1:]])
        self.gaps = (places[:-1] - places[1:]).clamp(min=_APART * float(self.span))
        self.rows = [torch.tensor(row, dtype=torch.float64) for row in table.weights]
        self.counts = [len(row) for row in self.rows]
        self.zero = torch.zeros(sum(self.counts) + n + 1, dtype=torch.float64)
        self.turns = [torch.eye(k, dtype=torch.float64) for k in self.counts]
        known = run(denoiser, ends, *self(self.zero), self.size)[1]
        flat = torch.stack(known).flatten(1).double().cpu()
        if not bool(torch.isfinite(flat).all()):
            raise SamplingError("the run that tuning starts from is not finite: check the weights and the condition")
        gram = flat @ flat.T / flat.shape[1]
        self.turns = [whitening(gram[:k, :k]) for k in self.counts]

    def __call__(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Angles (n,), and weights row by row."""
        *parts, moves = z.split([*self.counts, self.table.calls + 1])
        gaps = self.gaps * torch.exp(moves)
        places = self.first - self.span * gaps.cumsum(0)[:-1] / gaps.sum()
        return places ** (1 / _POWER), [row + turn @ part for row, turn, part in zip(self.rows, self.turns, parts)]

    def solver(self, z: Tensor, prediction: str | None) -> Tuned:
        angles, rows = self(z)
        table = self.table
        weights = tuple(tuple(row.tolist()) for row in rows)
        return Tuned(tuple(angles.tolist()), weights, table.profile, table.path, table.event, prediction)


def run(
    denoiser: Denoiser, ends: Ends, angles: Tensor, rows: Sequence[Tensor], size: float
) -> tuple[Tensor, list[Tensor]]:
    """A table's end, and all that it was made of; differentiable by angles and weights. `size`: hypot at the end."""
    start = torch.hypot(*_scales(denoiser.path, torch.tensor(denoiser.path.t_max, dtype=torch.float64)))
    known = [y := ends.start / float(start)]
    for psi, row in zip(_times(denoiser.path, angles), rows):
        x = _sum(known, row) * pad_to(torch.hypot(*_scales(denoiser.path, psi)).to(y), y)
        known.append(denoiser(x, psi.to(y), ends.cond).to(y.dtype))
    return _sum(known, rows[-1]) * size, known


def _sum(known: Sequence[Tensor], row: Tensor) -> Tensor:
    return torch.einsum("j,j...->...", row.to(known[0]), torch.stack(list(known)))


def _times(path: Path, angles: Tensor) -> Tensor:
    """Times of angles; `dt / dangle = (alpha^2 + sigma^2) / (alpha sigma' - sigma alpha')`, whatever the inverse is."""
    t = path.time_of_angle(angles.detach()).clamp(path.t_min, path.t_max)
    if not angles.requires_grad:
        return t
    with torch.no_grad():
        alpha, sigma = _scales(path, t)
        rate = (alpha.square() + sigma.square()) / path.omega(t)
        rate = torch.where(torch.isfinite(rate), rate, 0.0)
    return t + rate * (angles - angles.detach())


class _Goal:
    """What falls: `0.5 mean log(d^2 / unit^2 + floor^2)`, the unit the first start's median d on held-out noises."""

    def __init__(self, denoiser: Denoiser, first: _Form, fitted: Ends, held: Ends, batch: int):
        self.denoiser, self.fitted, self.held, self.batch = denoiser, fitted, held, batch
        before = _distances(denoiser, first, first.zero, held, batch)
        self.unit = float(before.median())
        if not (math.isfinite(self.unit) and self.unit > 0):
            raise SamplingError(f"the start's median error is {self.unit:g}: there is nothing to be tuned")
        self.before = float(self._of(before.square()).mean())

    def _of(self, d_squared: Tensor) -> Tensor:
        return 0.5 * torch.log(d_squared / self.unit**2 + _FLOOR**2)

    def on_held(self, form: _Form, z: Tensor) -> float:
        value = float(self._of(_distances(self.denoiser, form, z, self.held, self.batch).square()).mean())
        return value if math.isfinite(value) else math.inf

    def slope(self, form: _Form, z: Tensor) -> tuple[float, Tensor]:
        """Its value and gradient on the fitted noises; infinite where the gradient is no number."""
        point, total, gradient = z.clone().requires_grad_(), 0.0, torch.zeros_like(z)
        with torch.enable_grad():
            for part in self.fitted.batches(self.batch):
                x, _ = run(self.denoiser, part, *form(point), form.size)
                loss = self._of(squares(x - part.x)).sum() / len(self.fitted.x)
                gradient += torch.autograd.grad(loss, point)[0]
                total += float(loss.detach())
        return (total if bool(torch.isfinite(gradient).all()) else math.inf), gradient


class _Fit(NamedTuple):
    """The least value on held-out noises, where it is, and the steps made."""

    value: float
    z: Tensor
    steps: int


def _teller(
    tell: Callable[[Progress], object], goal: _Goal, before: Sequence[_Fit], count: int, most_steps: int
) -> Callable[[int, float], object]:
    """What a fit tells of, one of so many, with those before it."""
    lowest = min((fit.value for fit in before), default=math.inf)

    def told(step: int, value: float) -> object:
        share = math.exp(min(value, lowest) - goal.before)
        return tell(Progress("fit", len(before) * most_steps + step, count * most_steps, share))

    return told


def _fit(form: _Form, goal: _Goal, most_steps: int, tell: Callable[[int, float], object]) -> _Fit:
    """From a form's start; tells of the steps, and of the least value so far."""
    best, looks, step = form.zero, 0, 0
    least = goal.on_held(form, form.zero)
    for step, (z, _) in enumerate(descend(lambda z: goal.slope(form, z), form.zero)):
        if step and step % _EVERY == 0:
            now = goal.on_held(form, z)
            looks = 0 if now < least - _FALL else looks + 1
            if now < least:
                best, least = z, now
        tell(min(step, most_steps), least)
        if looks >= _LOOKS or step >= most_steps:
            break
    if step % _EVERY and (now := goal.on_held(form, z)) < least:
        best, least = z, now
    return _Fit(least, best, step)


def _distances(denoiser: Denoiser, form: _Form, z: Tensor, ends: Ends, batch: int) -> Float[Tensor, " b"]:
    """How far from their true ends the table's are."""
    parts = [squares(run(denoiser, part, *form(z), form.size)[0] - part.x).sqrt() for part in ends.batches(batch)]
    return torch.cat(parts).cpu()
