"""Error by network calls of DPM-Solver-v3 beside 2M, UniPC-3 and the default, on the two exact worlds.

    python benchmarks/dpm_v3.py                        # ring and digits, VP and Linear, some minutes of one core
    python benchmarks/dpm_v3.py --worlds ring --count 256

Worlds, truth and errors are those of `solvers.py`; statistics are estimated with 256 samples of the law itself, at 64
places. On a run's own model: undiffuse statistics RUN, then undiffuse compare RUN --solvers dpm-v3,dpmpp-2m.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from solver_truth import WORLDS, Case, default_cache

import undiffuse as ud
from solvers import Ours

CALLS = (5, 6, 8, 10)
# What DPMv3 is run with beside its defaults.
SETTINGS = (
    {},
    {"corrector": False},
    {"points": 3},
    {"points": 3, "variable": "half-log-snr"},
    {"points": 3, "variable": "half-log-snr", "pseudo": True},
)


def rows(case: Case, path: ud.Path) -> list[Ours]:
    samples = case.law.sample(256, torch.Generator().manual_seed(3))
    one, each = (ud.model_statistics(case.law.denoiser(path), samples, shared=shared) for shared in (True, False))
    found = [Ours(name, None, path) for name in ("dpmpp-2m", "unipc-3", "abm-4")]
    for settings in SETTINGS:
        words = ", ".join(f"{key}={value}" for key, value in settings.items())
        found.append(Ours(ud.DPMv3(each, **settings), None, path, f"dpm-v3 {words}"))
    return [*found, Ours(ud.DPMv3(one), None, path, "dpm-v3, shared statistics")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--count", type=int, help="noises; default: 1,024 of the ring, 512 of the digits")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the true trajectories")
    given = parser.parse_args()
    for name in given.worlds:
        case = Case.load(name, given.count, 0, given.cache)
        print(f"{name}, {len(case.end)} noises: RMS / median error at {', '.join(map(str, CALLS))} calls")
        for path in (ud.VP(), ud.Linear()):
            for row in rows(case, path):
                ends = (row.run(case, calls) for calls in CALLS)
                errors = ("/".join(f"{e:.4f}" for e in case.errors(x)) if x is not None else "-" for x in ends)
                print(f"{row!s:<70}", *errors, flush=True)


if __name__ == "__main__":
    main()
