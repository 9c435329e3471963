"""Error by network calls: our solvers beside diffusers, azula, flow_matching and k-diffusion, on two exact worlds or
on a trained network.

    python benchmarks/solvers.py                   # ring and digits, peers and ours, some 3 minutes of one core
    python benchmarks/solvers.py --run runs/digits-20260101-120000 --noises 64
    python benchmarks/solvers.py --scan            # every choice in OURS, no peers: the best for each number of calls
    python benchmarks/solvers.py --worlds ring --only zEAB dpmpp --json out.json

Error is `RMS(x - truth) / RMS(truth)` over all trajectories, and that of the median trajectory (its `|x - truth|` over
the RMS length of truth). Truth is DOP853 at rtol 1e-11 in the angle, from the same pure noise to sigma = 0, computed
once and kept in --cache; of a network, which answers in float32, 500 steps of the classical Runge-Kutta method there,
beside which 200 of `abm-4` are shown. Every run starts exactly on the true trajectory, where its path or schedule
begins; of methods with more than one call a step, the largest count not above the column. k-diffusion is taken from an
installation or from --k-diffusion FOLDER (git clone https://github.com/crowsonkb/k-diffusion).

To add a choice, add a line to OURS. The default run takes those named in CONTENDERS, found by --scan.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from solver_networks import NetworkCase
from solver_peers import Peer, peers
from solver_truth import WORLDS, Case, Setting, default_cache
from torch import Tensor

import undiffuse as ud
from undiffuse.solvers.grids import curved_angle

CALLS = (5, 6, 8, 10, 15, 20, 30, 50)
# The numbers of calls over which one choice must serve.
ONE = (5, 6, 8, 10, 15, 20, 30)
MEASURES = ("RMS", "median")

# For networks: paths that end in some noise, from which one answer leads to the data.
NARROW = (ud.Karras(sigma_min=0.01), ud.Karras(sigma_min=0.03))

# Name -> calls -> (RMS, median).
Errors = dict[str, dict[int, tuple[float, float]]]


@dataclass(frozen=True)
class Ours:
    """A solver on a grid along a path; without a solver what `sample` does where nothing but `steps` is chosen.

    Args:
        solver: a name or an object.
        grid: a name, a function of path and steps, or None, the solver's own.
        path: on which the exact field is given.
        note: its name, where its own is long.
    """

    solver: Any
    grid: str | Callable[[ud.Path, int], Tensor] | None
    path: ud.Path
    note: str = ""

    def __str__(self) -> str:
        if self.solver is None:
            return f"sample() {type(self.path).__name__}"
        grid = self.grid if isinstance(self.grid, str) else "own" if self.grid is None else self.grid.__name__
        path = self.path if self.path in NARROW else type(self.path).__name__
        return f"{self.note or self.solver} {grid} {path}"

    def sample(self, case: Setting, steps: int, rows: int | None = None) -> Any:
        """The record of a run of the first `rows` trajectories."""
        end = torch.tensor(self.path.t_max, dtype=torch.float64)
        noise = case.start(self.path.alpha(end), self.path.sigma(end))[:rows]
        cond = None if case.cond is None else case.cond[:rows]
        grid = self.grid(self.path, steps) if callable(self.grid) else self.grid
        chosen = {} if self.solver is None else {"solver": self.solver}
        return ud.sample(
            case.field(self.path), noise=noise, cond=cond, steps=steps, grid=grid, seed=0, return_info=True, **chosen
        )

    def run(self, case: Setting, calls: int) -> Tensor | None:
        """The end of the run with the most steps that takes no more calls, None where one step takes more."""
        for steps in range(calls, 0, -1):
            try:
                if self.sample(case, steps, rows=1).nfe <= calls:
                    return self.sample(case, steps).x
            except ud.UndiffuseError:
                continue
        return None


def curved(power: float, start: float) -> Callable[[ud.Path, int], Tensor]:
    """The angle's grid with a power and a start of its own."""

    def grid(path: ud.Path, steps: int) -> Tensor:
        return ud.make_grid(path, steps, curved_angle(power=power, start=start))

    grid.__name__ = f"angle^{power:g}<{start:g}"
    return grid


def multistep(points: int, turn: float, power: float, start: float) -> Ours:
    name = f"multistep {points} {turn:g}"
    return Ours(ud.Multistep(points, turn, scale=1.0), curved(power, start), ud.Linear(), name)


PATHS = (ud.Linear(), ud.Karras(), ud.VP())
OURS: list[Ours] = [
    Ours(solver, grid, path)
    for solver in ("ddim", "dpmpp-2m", "edm", "euler", "heun")
    for grid in ("angle", "canonical", "half-log-snr", "karras", "quadratic", "time")
    for path in PATHS
]
# The best of 2 to 5 points, turns 1/2, 3/4, 15/16, powers 1.5 to 2.5, starts 10, 20, 80.
OURS += [
    multistep(*setting)
    for setting in (
        (2, 0.75, 2.0, 10),
        (2, 0.75, 1.75, 80),
        (2, 15 / 16, 1.75, 10),
        (2, 15 / 16, 2.0, 80),
        (3, 15 / 16, 1.5, 10),
        (4, 15 / 16, 1.5, 80),
        (4, 15 / 16, 1.75, 10),
        (5, 15 / 16, 1.5, 80),
        (5, 15 / 16, 1.75, 20),
        (5, 15 / 16, 2.0, 10),
    )
]
# What the default run takes of them, by name; all where it is empty.
CONTENDERS: tuple[str, ...] = ("dpmpp-2m time Linear", *(str(choice) for choice in OURS[90:]))

# For networks beside them: on their own path, on narrow ones, and in time, as the velocity.
ON_OWN_PATH = ("deis-2", "deis-3", "dpmpp-2m", "dpmpp-3m", "unipc-2", "unipc-3")
FOR_NETWORKS = [
    *(Ours(solver, "half-log-snr", path) for solver in ("dpmpp-2m", "dpmpp-3m", "unipc-3") for path in NARROW),
    *(
        Ours(ud.Multistep(points, prediction, "half-log-snr", corrector=False), "half-log-snr", path, note)
        for points, prediction, note in ((3, "noise", "deis-3 in log-SNR"), (4, "data", "dpmpp-4m"))
        for path in NARROW
    ),
    *(Ours(solver, "time", ud.Linear()) for solver in ("ab3", "ab4", "heun", "midpoint")),
]


def contenders(case: Setting) -> list[Ours]:
    found = [choice for choice in OURS if not CONTENDERS or str(choice) in CONTENDERS]
    if isinstance(case, NetworkCase):
        found += [Ours(solver, grid, case.path) for solver in ON_OWN_PATH for grid in (None, "half-log-snr", "karras")]
        found += FOR_NETWORKS
    return found


def defaults(case: Setting) -> list[Ours]:
    return [Ours(None, None, path) for path in ([case.path] if isinstance(case, NetworkCase) else PATHS)]


def measure(case: Setting, rows: list[Any], calls: tuple[int, ...]) -> Errors:
    """Errors of each row at each number of calls; a row whose library is missing is left out, with a line."""
    found: Errors = {}
    for place, row in enumerate(rows, 1):
        own = {}
        try:
            for n in calls:
                x = row.run(case, n)
                rms, median = (math.inf, math.inf) if x is None else case.errors(x)
                own[n] = tuple(e if math.isfinite(e) else math.inf for e in (rms, median))
        except ImportError as error:
            print(f"{row}: left out, {error}")
            continue
        found[str(row)] = own
        print(f"\r{case.name}: {place} of {len(rows)}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    return found


def best(found: Errors, calls: int, measure: int) -> tuple[float, str]:
    """The least error at a number of calls, and whose it is."""
    return min(((own[calls][measure], name) for name, own in found.items()), default=(math.inf, "none"))


def geometric_mean(own: Mapping[int, tuple[float, float]], measure: int = 1) -> float:
    """Over the numbers of calls in `ONE` that were run; infinite where one failed."""
    values = [own[n][measure] for n in ONE if n in own]
    return statistics.geometric_mean(values) if values and max(values) < math.inf else math.inf


def show(case: Setting, calls: tuple[int, ...], theirs: Errors, ours: Errors, default: Errors) -> None:
    """Two tables, by RMS and by median: the best peer, the best of ours, the defaults, and ratios to the best peer."""
    print(f"\n## {case.name}, {len(case.end)} noises")
    for k, name in enumerate(MEASURES):
        heads = "".join(f" {row} | ratio |" for row in default)
        print(f"\n| calls | {name}: best peer | best of ours | ratio |{heads} peer | ours |")
        print("|--:|" + "--:|" * (3 + 2 * len(default)) + "---|---|")
        for n in calls:
            (peer, whose), (own, which) = best(theirs, n, k), best(ours, n, k)
            cells = "".join(f" {row[n][k]:.2g} | {row[n][k] / peer:.2f} |" for row in default.values())
            print(f"| {n} | {peer:.2g} | {own:.2g} | {own / peer:.2f} |{cells} {whose} | {which} |")
    print("\nOne choice for all of 5 to 30 calls, geometric mean of medians and of RMS:")
    for side in (theirs, ours, default):
        for mean, name in sorted((geometric_mean(own), name) for name, own in side.items())[:3]:
            print(f"- {mean:.2e}, {geometric_mean(side[name], 0):.2e}  {name}")


def show_scan(case: Setting, calls: tuple[int, ...], found: Errors, places: int) -> None:
    print(f"\n## {case.name}, {len(case.end)} noises, {len(found)} choices")
    for k, name in enumerate(MEASURES):
        print(f"\nBy {name}:")
        for n in calls:
            order = sorted((own[n][k], who) for who, own in found.items())[:places]
            print(f"- {n:2d}: " + "; ".join(f"{error:.2e} {who}" for error, who in order))
    print("\nOne choice for all of 5 to 30 calls, geometric mean of medians:")
    for mean, name in sorted((geometric_mean(own), name) for name, own in found.items())[:places]:
        print(f"- {mean:.2e}  {name}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--run", type=Path, help="a run folder: its network in place of the worlds")
    parser.add_argument("--noises", type=int, help="trajectories; by default 1,024 of the ring, 512 of the digits, 64")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--seed", type=int, default=0, help="of the noises")
    parser.add_argument("--scan", action="store_true", help="all of OURS, without the peers")
    parser.add_argument("--places", type=int, default=5, help="how many the scan prints for each number of calls")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name contains one of these words")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the true trajectories")
    parser.add_argument("--k-diffusion", type=Path, help="a checkout of k-diffusion")
    parser.add_argument("--json", type=Path, help="file for every error measured")
    return parser.parse_args()


def main() -> None:
    words = options()
    torch.set_num_threads(words.threads)
    warnings.simplefilter("ignore", FutureWarning)  # of diffusers, about its own options
    calls = tuple(words.calls)

    def chosen(rows: list[Any]) -> list[Any]:
        return [row for row in rows if not words.only or any(word in str(row) for word in words.only)]

    record: dict[str, Errors] = {}
    for name in words.worlds if words.run is None else [words.run.name]:
        began = time.process_time()
        if words.run is None:
            case = Case.load(name, words.noises, words.seed, words.cache)
        else:
            case = NetworkCase(words.run, words.noises or 64, words.seed)
            apart = case.errors(Ours("abm-4", None, ud.Linear()).sample(case, 200).x)
            print(f"{name}: 200 steps of abm-4 are at {apart[0]:.1e} (RMS), {apart[1]:.1e} (median) of the truth")
        if words.scan:
            found = measure(case, chosen([*OURS, *defaults(case)]), calls)
            show_scan(case, calls, found, words.places)
            record[name] = found
        else:
            theirs: list[Peer] = peers(words.k_diffusion)
            sides = [measure(case, chosen(rows), calls) for rows in (theirs, contenders(case), defaults(case))]
            show(case, calls, *sides)
            record[name] = {who: own for side in sides for who, own in side.items()}
        print(f"\n{time.process_time() - began:.0f} s of the processor")
    if words.json:
        words.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
