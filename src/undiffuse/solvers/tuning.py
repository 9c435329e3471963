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
from undiffuse.solvers.descent import descend, whitening
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.ends import Ends, check_counts, relative, squares
from undiffuse.solvers.integrate import get_solver
from undiffuse.solvers.tuned import MOST_CALLS, Tuned, linear_table, prediction_of

LEAST = 32
# Angles are moved in their square root, where grids of few steps are nearly equal; so much of the whole, at least, lies
# between two of them at the beginning.
_POWER, _APART = 0.5, 1e-3
# Below so much of the start's median error an error counts as none.
_FLOOR = 0.01
# Held-out error is looked at after so many steps, and must fall by this much within so many looks.
_EVERY, _FALL, _LOOKS = 5, 2e-3, 6


class Progress(NamedTuple):
    """What `tune` tells its callback.

    Attributes:
        stage: "reference", "fit" or "measure".
        done, total: how many noises or steps of it; a fit may end before its total.
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
    reference: int = 100,
    batch: int = 256,
    most_steps: int = 300,
    callback: Callable[[Progress], object] | None = None,
) -> Tuned:
    """A solver of that many calls, fitted to the ends of n trajectories of this denoiser.

    All numbers of a `Tuned` are fitted together, angles and weights, by L-BFGS through the run; the field is
    differentiated by x and t. What falls is the mean of `log(d^2 + floor^2)`, d a trajectory's distance from its true
    end: the few that end at another mode weigh little. Half of the noises are fitted, a quarter says when to stop, a
    quarter is only measured, before and after: `solver.about` has `before` and `after`, each `rms` and `median` of d
    relative to the RMS length of the ends.

    Args:
        denoiser: any denoiser that can be differentiated; guided ones too.
        event: the shape of its data.
        calls: 1 to 64.
        n: noises, at least 32.
        seed: of them.
        cond: for all n of them.
        start: the solver, of as many steps as calls, whose numbers are changed.
        reference: steps of the 'abm-4' that makes the true ends.
        batch: trajectories at a time. One is differentiated through all calls at once, which takes memory.
        most_steps: of the fit.
        callback: told of what is done.

    Raises:
        ArgumentError: an argument out of its range; a start that does not take `calls` calls in as many steps.
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
    table = linear_table(get_solver(start), denoiser.path, calls, event)
    if table.calls != calls:
        raise ArgumentError(f"start {start!r}: {calls} steps of it take {table.calls} calls; take one of a call a step")
    with evaluating(denoiser):
        ends = Ends.of(
            denoiser, tuple(event), cond, n, seed, reference, batch, lambda done: tell(Progress("reference", done, n))
        )
        fitted, held, kept = ends.shared_out()
        form = _Form(table, denoiser, fitted.rows(0, batch))
        best, steps = _fit(form, denoiser, fitted, held, batch, most_steps, tell)
        errors = [relative(_distances(denoiser, form, z, kept, batch), kept) for z in (form.zero, best)]
    tell(Progress("measure", 1, 1))
    made = {"n": n, "seed": seed, "start": str(start), "steps": steps, "reference": reference}
    return form.solver(best, prediction_of(denoiser)).with_about(**made, before=errors[0], after=errors[1])


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


def _fit(
    form: _Form,
    denoiser: Denoiser,
    fitted: Ends,
    held: Ends,
    batch: int,
    most_steps: int,
    tell: Callable[[Progress], object],
) -> tuple[Tensor, int]:
    """The z of the least error on `held`, and the steps made."""
    before = _distances(denoiser, form, form.zero, held, batch)
    unit = float(before.median())
    if not (math.isfinite(unit) and unit > 0):
        raise SamplingError(f"the start's median error is {unit:g}: there is nothing to be tuned")

    def cost(d_squared: Tensor) -> Tensor:
        return 0.5 * torch.log(d_squared / unit**2 + _FLOOR**2)

    def slope(z: Tensor) -> tuple[float, Tensor]:
        point, total, gradient = z.clone().requires_grad_(), 0.0, torch.zeros_like(z)
        with torch.enable_grad():
            for part in fitted.batches(batch):
                x, _ = run(denoiser, part, *form(point), form.size)
                loss = cost(squares(x - part.x)).sum() / len(fitted.x)
                gradient += torch.autograd.grad(loss, point)[0]
                total += float(loss.detach())
        return (total if bool(torch.isfinite(gradient).all()) else math.inf), gradient

    def held_cost(z: Tensor) -> float:
        return float(cost(_distances(denoiser, form, z, held, batch).square()).mean())

    best, looks, step = form.zero, 0, 0
    first = least = held_cost(form.zero)
    for step, (z, _) in enumerate(descend(slope, form.zero)):
        if step and step % _EVERY == 0:
            now = held_cost(z)
            looks = 0 if now < least - _FALL else looks + 1
            if now < least:
                best, least = z, now
        tell(Progress("fit", min(step, most_steps), most_steps, math.exp(least - first)))
        if looks >= _LOOKS or step >= most_steps:
            break
    if step % _EVERY and held_cost(z) < least:
        best = z
    return best, step


def _distances(denoiser: Denoiser, form: _Form, z: Tensor, ends: Ends, batch: int) -> Float[Tensor, " b"]:
    """How far from their true ends the table's are."""
    parts = [squares(run(denoiser, part, *form(z), form.size)[0] - part.x).sqrt() for part in ends.batches(batch)]
    return torch.cat(parts).cpu()
