"""What tuning gains on two exact worlds or a trained network: error by network calls, on noise never seen in tuning.

    python benchmarks/tuned.py                                  # ring and digits at 5, 6, 8, 10 and 15 calls
    python benchmarks/tuned.py --worlds ring --calls 5 --peers out.json     # out.json of solvers.py --json
    python benchmarks/tuned.py --run runs/digits-20260101-120000 --n 256 --noises 64 --calls 6 10 --peers out.json

Tuned with `ud.tune` on noises of --tune-seed, measured on those of --seed, against the truth of `solver_truth`. The
ring takes seconds a row, the digits (64 dimensions, 1,000 modes) minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from solver_networks import NetworkCase
from solver_truth import WORLDS, Case, default_cache

import undiffuse as ud

CALLS = (5, 6, 8, 10, 15)
# What rows of solvers.py that are a peer's begin with.
PEERS = ("azula ", "diffusers ", "flow_matching ", "k-diffusion ")


def best_peer(file: Path | None, world: str, calls: int, measure: int) -> float | None:
    """The least error of a peer in a record of solvers.py."""
    rows = json.loads(file.read_text())[world] if file is not None else {}
    found = [own[str(calls)][measure] for who, own in rows.items() if who.startswith(PEERS) and str(calls) in own]
    return min(found, default=None)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--run", type=Path, help="a run folder: its network, on its own path, in place of the worlds")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--n", type=int, default=1024, help="noises given to tune")
    parser.add_argument("--noises", type=int, help="measured; by default 1,024 of the ring, 512 of the digits, 64")
    parser.add_argument("--seed", type=int, default=0, help="of the noises measured")
    parser.add_argument("--tune-seed", type=int, default=1, help="of the noises tuned on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the true trajectories")
    parser.add_argument("--peers", type=Path, help="what solvers.py --json wrote")
    words = parser.parse_args()
    if words.seed == words.tune_seed:
        parser.error("--seed and --tune-seed are the same: what is measured must not have been tuned on")
    return words


def main() -> None:
    words = options()
    torch.set_num_threads(words.threads)
    for world in words.worlds if words.run is None else [words.run.name]:
        if words.run is None:
            case, path, cond = Case.load(world, words.noises, words.seed, words.cache), ud.Linear(), None
        else:
            case = NetworkCase(words.run, words.noises or 64, words.seed)
            path, cond = case.path, case.labels(words.n)
        end = torch.tensor(path.t_max, dtype=torch.float64)
        field, noise = case.field(path), case.start(path.alpha(end), path.sigma(end))
        print(f"\n## {world}, {len(noise)} noises of seed {words.seed}, tuned on {words.n} of seed {words.tune_seed}\n")
        print("| calls | measure | best peer | default | tuned | tuned / default | tuned / peer | seconds |")
        print("|--:|---|--:|--:|--:|--:|--:|--:|")
        for calls in words.calls:
            began = time.process_time()
            solver = ud.tune(field, case.end.shape[1:], calls, n=words.n, seed=words.tune_seed, cond=cond)
            spent = time.process_time() - began
            before = case.errors(ud.sample(field, noise=noise, cond=case.cond, steps=calls))
            after = case.errors(ud.sample(field, noise=noise, cond=case.cond, solver=solver))
            for k, name in enumerate(("RMS", "median")):
                peer = best_peer(words.peers, world, calls, k)
                beside = ("", "") if peer is None else (f"{peer:.2g}", f"{after[k] / peer:.2f}")
                gain = after[k] / before[k]
                numbers = f"{before[k]:.2g} | {after[k]:.2g} | {gain:.2f} | {beside[1]} | {spent:.0f}"
                print(f"| {calls} | {name} | {beside[0]} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
