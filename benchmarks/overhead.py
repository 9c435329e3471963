"""What a step costs when the network costs nothing: ours beside diffusers, k-diffusion, azula and flow_matching.

    python benchmarks/overhead.py                    # one thread, some 5 minutes
    python benchmarks/overhead.py --methods euler 2m --shapes 1,4,64,64 --threads 2

The network returns a stored float32 tensor, read as whatever each library asks of it. Rows "network" call a module
that does so at every step, as a pipeline does, and ours read E[x_0] from what it says; they are compared with each
other, all other rows with each other. A run is a whole call: its grid or `set_timesteps`, its steps, its end; its time
is divided by its steps. All rows of a method run in turn, round after round; medians, in microseconds of the processor
on one thread, of the wall on more. "least" is the fewest fused passes that the method needs: every tensor of a step
read once where it is used and written once, so many in all, at the speed of `torch.add(a, b, out=c)`, which moves 3,
timed in the same rounds over as many buffers as the step has states and kept answers. As the stored tensor is one for
all calls, caches flatter all rows alike.
k-diffusion is taken from an installation or from --k-diffusion FOLDER (git clone
https://github.com/crowsonkb/k-diffusion); what is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from solver_peers import k_diffusion_sampling
from torch import Tensor, nn

import undiffuse as ud
from undiffuse.nets import keep_freed_memory
from undiffuse.solvers import SOLVERS, fuse_sums

SHAPES = ((64, 3, 32, 32), (1, 4, 64, 64), (16, 3, 256, 256))
# A round of one row takes about this long.
_ROUND = 0.05

# From the starting x, what the network returns and the steps: a whole run.
Make = Callable[[Tensor, Tensor, int], Callable[[], Any]]


class Free(ud.Denoiser):
    """A denoiser that costs nothing."""

    def __init__(self, path: ud.Path, answer: Tensor):
        super().__init__(path)
        self.answer = answer

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.answer


class FreeNet(nn.Module):
    """A network that costs nothing."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.answer


def ours(solver: str, path: ud.Path) -> Make:
    if solver not in SOLVERS:
        raise ImportError("not there yet")

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        denoiser = Free(path, answer)
        return lambda: ud.sample(denoiser, noise=x, solver=solver, steps=steps, seed=0)

    return make


def ours_network(solver: str, path: ud.Path, prediction: str) -> Make:
    """With a network whose output must be read first: what a trained model pays."""

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        denoiser = ud.NetworkDenoiser(FreeNet(answer), path, prediction=prediction)
        return lambda: ud.sample(denoiser, noise=x, solver=solver, steps=steps, seed=0)

    return make


def diffusers(scheduler: str, scaled: bool = False, network: bool = False, **options: Any) -> Make:
    """`scaled`: the loop has to scale the network's input; `network`: it calls one."""
    kind = getattr(importlib.import_module("diffusers"), f"{scheduler}Scheduler")

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        scheduler, net = kind(**options), FreeNet(answer)

        def run() -> Tensor:
            scheduler.set_timesteps(steps)
            now = x
            for t in scheduler.timesteps:
                if scaled:
                    scheduler.scale_model_input(now, t)
                said = net(now, t.expand(len(now))) if network else answer
                now = scheduler.step(said, t, now, return_dict=False)[0]
            return now

        return run

    return make


def k_diffusion(sampler: str, folder: Path | None) -> Make:
    peer = k_diffusion_sampling(folder)

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        walk = getattr(peer, f"sample_{sampler}")
        start = x * 80
        return lambda: walk(lambda x, s: answer, start, peer.get_sigmas_karras(steps, 0.002, 80.0), disable=True)

    return make


def azula(sampler: str, **options: Any) -> Make:
    samplers, peers = (importlib.import_module(f"azula.{name}") for name in ("sample", "denoise"))
    schedule = importlib.import_module("azula.noise").RectifiedSchedule()

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        class Free(peers.Denoiser):
            def __init__(self):
                super().__init__()
                self.schedule = schedule

            def forward(self, x_t: Tensor, t: Tensor, **extras: object) -> Any:
                return peers.DiracPosterior(answer)

        walk = getattr(samplers, f"{sampler}Sampler")(Free(), steps=steps, silent=True, **options)
        return lambda: walk(x)

    return make


def flow_matching(method: str, network: bool = False) -> Make:
    solver = importlib.import_module("flow_matching.solver").ODESolver

    def make(x: Tensor, answer: Tensor, steps: int) -> Callable[[], Any]:
        net, ends = FreeNet(answer), torch.tensor([0.0, 1.0])
        walk = solver((lambda x, t: net(x, t.expand(len(x)))) if network else (lambda x, t: answer))
        return lambda: walk.sample(x, step_size=1 / steps, method=method, time_grid=ends)

    return make


@dataclass(frozen=True)
class Method:
    """A method's rows, and the fewest passes over memory of its steps.

    Attributes:
        tensors: moved in a step where the answers are E[x_0].
        network: moved where they are velocities, or noise.
        states: how many x it has at a time, the one that is written among them.
        answers: how many tensors of answers, without a network, where all are one, and with it; a past state that is
            needed with a past answer among them.
    """

    tensors: int
    network: int
    states: int
    answers: tuple[int, int]
    rows: dict[str, Callable[[Path | None], Make]]


# Euler and DDIM: x, D, and x written. 2M: the D before too. DEIS-2: x and D, and both before. UniPC-2: one pass reads x
# and three D and writes two, the corrected x and the next. Heun: Euler's 3, then x, both D and x written. Midpoint,
# RK4: a velocity is made of a state and its D, so that a pass moves x, both, and what it writes; the first 3 tensors;
# RK4's last x, three states, D and x written. With velocities three a pass, and RK4's last x, four of them and x
# written. With noise a multistep method writes what it keeps of the network's output, which is lent until the next
# call: 2M and UniPC-2 D, DEIS-2, which then goes by x, the noise and the noise before, that.
METHODS: dict[str, Method] = {
    "euler": Method(3, 3, 2, (1, 1), {
        "ours euler": lambda _: ours("euler", ud.Linear()),
        "ours ddim": lambda _: ours("ddim", ud.Linear()),
        "ours euler, network of velocity": lambda _: ours_network("euler", ud.Linear(), "velocity"),
        "diffusers FlowMatchEuler": lambda _: diffusers("FlowMatchEulerDiscrete"),
        "diffusers FlowMatchEuler, network": lambda _: diffusers("FlowMatchEulerDiscrete", network=True),
        "diffusers EulerDiscrete": lambda _: diffusers("EulerDiscrete", scaled=True),
        "k-diffusion euler": lambda folder: k_diffusion("euler", folder),
        "azula Euler": lambda _: azula("Euler"),
        "flow_matching euler": lambda _: flow_matching("euler"),
        "flow_matching euler, network": lambda _: flow_matching("euler", network=True),
    }),
    "ddim": Method(3, 3, 2, (1, 1), {
        "ours ddim, VP": lambda _: ours("ddim", ud.VP()),
        "ours ddim, VP, network of noise": lambda _: ours_network("ddim", ud.VP(), "noise"),
        "diffusers DDIM": lambda _: diffusers("DDIM"),
        "diffusers DDIM, network": lambda _: diffusers("DDIM", network=True),
        "azula DDIM": lambda _: azula("DDIM"),
    }),
    "2m": Method(4, 5, 2, (1, 3), {
        "ours dpmpp-2m": lambda _: ours("dpmpp-2m", ud.Linear()),
        "ours dpmpp-2m, VP": lambda _: ours("dpmpp-2m", ud.VP()),
        "ours dpmpp-2m, VP, network of noise": lambda _: ours_network("dpmpp-2m", ud.VP(), "noise"),
        "diffusers DPMSolver++(2)": lambda _: diffusers("DPMSolverMultistep"),
        "diffusers DPMSolver++(2), network": lambda _: diffusers("DPMSolverMultistep", network=True),
        "diffusers EDM DPMSolver++(2)": lambda _: diffusers("EDMDPMSolverMultistep", scaled=True),
        "k-diffusion dpmpp_2m": lambda folder: k_diffusion("dpmpp_2m", folder),
        "azula xEAB(2)": lambda _: azula("xEAB", order=2),
    }),
    "deis-2": Method(5, 5, 2, (2, 3), {
        "ours deis-2": lambda _: ours("deis-2", ud.Linear()),
        "ours deis-2, VP, network of noise": lambda _: ours_network("deis-2", ud.VP(), "noise"),
        "diffusers DEIS(2)": lambda _: diffusers("DEISMultistep", solver_order=2),
        "diffusers DEIS(2), network": lambda _: diffusers("DEISMultistep", network=True, solver_order=2),
        "azula zEAB(2)": lambda _: azula("zEAB", order=2),
    }),
    "unipc-2": Method(6, 7, 2, (1, 4), {
        "ours unipc-2": lambda _: ours("unipc-2", ud.Linear()),
        "ours unipc-2, VP, network of noise": lambda _: ours_network("unipc-2", ud.VP(), "noise"),
        "diffusers UniPC(2)": lambda _: diffusers("UniPCMultistep", solver_order=2),
        "diffusers UniPC(2), network": lambda _: diffusers("UniPCMultistep", network=True, solver_order=2),
    }),
    "heun": Method(7, 7, 3, (1, 1), {
        "ours heun": lambda _: ours("heun", ud.Linear()),
        "ours heun, network of velocity": lambda _: ours_network("heun", ud.Linear(), "velocity"),
        "ours edm, Karras": lambda _: ours("edm", ud.Karras()),
        "diffusers FlowMatchHeun": lambda _: diffusers("FlowMatchHeunDiscrete"),
        "diffusers HeunDiscrete": lambda _: diffusers("HeunDiscrete", scaled=True),
        "k-diffusion heun": lambda folder: k_diffusion("heun", folder),
        "azula Heun": lambda _: azula("Heun"),
        "flow_matching heun2": lambda _: flow_matching("heun2"),
        "flow_matching heun2, network": lambda _: flow_matching("heun2", network=True),
    }),
    "midpoint": Method(7, 6, 3, (1, 1), {
        "ours midpoint": lambda _: ours("midpoint", ud.Linear()),
        "ours midpoint, network of velocity": lambda _: ours_network("midpoint", ud.Linear(), "velocity"),
        "flow_matching midpoint": lambda _: flow_matching("midpoint"),
        "flow_matching midpoint, network": lambda _: flow_matching("midpoint", network=True),
    }),
    "rk4": Method(17, 15, 5, (1, 1), {
        "ours rk4": lambda _: ours("rk4", ud.Linear()),
        "ours rk4, network of velocity": lambda _: ours_network("rk4", ud.Linear(), "velocity"),
        "flow_matching rk4": lambda _: flow_matching("rk4"),
        "flow_matching rk4, network": lambda _: flow_matching("rk4", network=True),
    }),
}  # fmt: skip


def floor(x: Tensor, states: int, answers: int, steps: int) -> Callable[[], None]:
    """`steps` passes that move 3 tensors each, from state to state."""
    known, buffers = [torch.randn_like(x) for _ in range(answers)], [x.clone() for _ in range(states)]

    def run() -> None:
        for k in range(steps):
            torch.add(buffers[k % states], known[k % answers], alpha=0.5, out=buffers[(k + 1) % states])

    return run


@dataclass
class Row:
    name: str
    run: Callable[[], Any]
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)

    def once(self, clock: Callable[[], float]) -> float:
        start = clock()
        for _ in range(self.repeats):
            self.run()
        return (clock() - start) / self.repeats


def measure(rows: list[Row], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of a run of each row."""
    for row in rows:
        row.run()
        row.repeats = max(1, round(_ROUND / max(row.once(clock), 1e-6)))
    for k in range(rounds):  # each time another row is the first, which finds the caches cold
        for row in (*rows[k % len(rows) :], *rows[: k % len(rows)]):
            row.seconds.append(row.once(clock))
    return {row.name: statistics.median(row.seconds) for row in rows}


def built(method: Method, folder: Path | None, x: Tensor, answer: Tensor, steps: int) -> list[Row]:
    floors = dict(zip(("floor", "floor with a network"), method.answers))
    found = [Row(name, floor(x, method.states, answers, steps)) for name, answers in floors.items()]
    for name, get in method.rows.items():
        try:
            found.append(Row(name, get(folder)(x, answer, steps)))
        except ImportError as error:
            print(f"{name}: left out, {error}")
    return found


def report(name: str, method: Method, shape: tuple[int, ...], took: dict[str, float], steps: int) -> None:
    """A table of one method at one shape, and ours against the fastest peer, with a network and without."""
    moved = [took.pop(floor) / steps / 3 for floor in ("floor", "floor with a network")]
    words = " and, with a network, ".join(f"{one * 1e6:.2f}" for one in moved)
    print(f"\n{name}, {list(shape)}: a tensor moved in {words} us\n")
    print("| who | us per step | of the least | of the fastest peer |")
    print("|---|--:|--:|--:|")
    for calls in (False, True):
        rows = {who: seconds / steps for who, seconds in took.items() if ("network" in who) == calls}
        peer = min((step for who, step in rows.items() if not who.startswith("ours")), default=float("nan"))
        least = moved[calls] * (method.network if calls else method.tensors)
        for who, step in sorted(rows.items(), key=lambda item: (not item[0].startswith("ours"), item[1])):
            print(f"| {who} | {step * 1e6:.1f} | {step / least:.2f} | {step / peer:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-memory", action="store_true", help="the C library's allocator keeps what is freed")
    parser.add_argument("--fused", action="store_true", help="our sums compiled: undiffuse.solvers.fuse_sums")
    parser.add_argument("--k-diffusion", type=Path, help="a checkout of k-diffusion")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    warnings.simplefilter("ignore", FutureWarning)
    kept = words.keep_memory and keep_freed_memory()
    fuse_sums(words.fused)
    clock = time.process_time if words.threads == 1 else time.perf_counter
    print(
        f"torch {torch.__version__}, {words.threads} thread(s), {words.steps} steps, medians of {words.rounds} rounds, "
        f"{'processor' if words.threads == 1 else 'wall'}; allocator keeps freed memory: {'yes' if kept else 'no'}; "
        f"our sums compiled: {'yes' if words.fused else 'no'}"
    )
    for text in words.shapes:
        shape = tuple(int(n) for n in text.split(","))
        x, answer = (torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
        for name, method in METHODS.items():
            if words.methods and name not in words.methods:
                continue
            with torch.no_grad():
                took = measure(built(method, words.k_diffusion, x, answer, words.steps), words.rounds, clock)
            report(name, method, shape, took, words.steps)


if __name__ == "__main__":
    main()
