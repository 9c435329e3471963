"""Score-matching objectives beside each other: eight Gaussians on a ring, one small network, fresh samples every step.

    python benchmarks/score_matching.py                       # one thread, all objectives one after the other
    python benchmarks/score_matching.py --only sliced sure    # some of them; --steps, --json FILE

The ring has radius 3 and modes of std 0.2, in units of one coordinate's standard deviation. "error" is the relative
Fisher divergence E|s - s*|^2 / E|s*|^2 on 20,000 fresh points, against the law that the objective's minimum belongs
to: p_data, or p_sigma (data plus noise of std SIGMA) for denoising and SURE, which sees noisy points alone. "variance"
is the total variance of the gradient of a mini-batch over the squared length of its mean, at one energy network that
the explicit objective has trained for 300 steps; the mean is the explicit objective's, which has little noise. "ms" is
the processor time of a step (loss, gradient and Adam), the median of rounds in which every objective takes one step in
turn; "memory" is what the tensors of a step take at most at a time, parameters and data left out. Weights are averaged
along training; the average is measured.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undiffuse import GaussianMixture
from undiffuse.fields.energy import NetworkEnergy, ScoreNetwork
from undiffuse.objectives.score_matching import (
    SURE,
    DenoisingScoreMatching,
    ExplicitScoreMatching,
    FiniteDifferenceSliced,
    ImplicitScoreMatching,
    Objective,
    SlicedScoreMatching,
)

RADIUS, STD, MODES = 3.0, 0.2, 8
UNIT = math.sqrt(RADIUS**2 / 2 + STD**2)  # one coordinate's standard deviation
SIGMA = 0.1


def ring(sigma: float = 0.0) -> GaussianMixture:
    """The law of the data plus noise of standard deviation sigma."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    means = RADIUS / UNIT * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((MODES,), math.hypot(STD / UNIT, sigma)))


class Perceptron(nn.Module):
    """A SiLU perceptron called as a network of the library is; it has no use for a noise level or a condition."""

    def __init__(self, outputs: int, hidden: int, layers: int):
        super().__init__()
        sizes = [2] + [hidden] * layers
        steps = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*steps, nn.Linear(hidden, outputs))

    def forward(self, x: Tensor, c_noise: Tensor, cond=None) -> Tensor:
        return self.net(x)


@dataclass(frozen=True)
class Case:
    """An objective, the law of its samples, the law whose score minimises it, its kind of model, and its size beside
    the explicit objective's."""

    objective: Objective
    samples: GaussianMixture
    truth: GaussianMixture
    energy: bool = False
    scale: float = 1.0


def cases() -> dict[str, Case]:
    clean, noisy = ring(), ring(SIGMA)
    return {
        "explicit": Case(ExplicitScoreMatching(clean.score), clean, clean),
        "implicit": Case(ImplicitScoreMatching(), clean, clean),
        "implicit-hutchinson": Case(ImplicitScoreMatching("hutchinson"), clean, clean),
        "sliced": Case(SlicedScoreMatching(), clean, clean),
        "sliced-vr": Case(SlicedScoreMatching(variance_reduced=True), clean, clean),
        "finite-difference": Case(FiniteDifferenceSliced(0.1 * STD / UNIT), clean, clean, energy=True),
        "finite-difference-score": Case(FiniteDifferenceSliced(0.1 * STD / UNIT, of="score"), clean, clean),
        "denoising": Case(DenoisingScoreMatching(SIGMA), clean, noisy),
        "sure": Case(SURE(SIGMA), noisy, noisy, scale=2 * SIGMA**4),
    }


Model = NetworkEnergy | ScoreNetwork


def model_of(energy: bool, hidden: int, layers: int) -> Model:
    torch.manual_seed(0)
    net = Perceptron(1 if energy else 2, hidden, layers)
    return NetworkEnergy(net) if energy else ScoreNetwork(net)


def batches(law: GaussianMixture, batch: int, generator: torch.Generator, chunk: int = 64):
    """Fresh samples for ever, drawn by the chunk."""
    while True:
        yield from law.sample(batch * chunk, generator).split(batch)


def relative_divergence(model: Model, truth: GaussianMixture, n: int = 20_000) -> float:
    """E|s - s*|^2 / E|s*|^2 under the truth."""
    x = truth.sample(n, torch.Generator().manual_seed(99))
    with torch.no_grad():
        score = truth.score(x)
        return float((model.score(x) - score).square().sum() / score.square().sum())


@dataclass
class Result:
    """One row of the table."""

    name: str
    steps: int
    error: float = math.nan
    variance: float = math.nan
    ms: float = math.nan
    memory_mib: float = math.nan


def train(name: str, case: Case, options) -> float:
    """The error after Adam at a rate that falls as a cosine; the weights' average spans a 20th of the steps."""
    model = model_of(case.energy, options.hidden, options.layers)
    average = copy.deepcopy(model).requires_grad_(False)
    adam = torch.optim.Adam(model.parameters(), lr=options.rate, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(1)
    data = batches(case.samples, options.batch, generator)
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 200)
        adam.param_groups[0]["lr"] = options.rate * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        update(case.objective, model, adam, next(data), generator)
        with torch.no_grad():
            for a, w in zip(average.parameters(), model.parameters()):
                a.lerp_(w, 1 / min(step + 1, options.steps / 20))
        if not options.quiet and (step + 1) % max(1, options.steps // 10) == 0:
            print(f"{name}: step {step + 1}, error {relative_divergence(average, case.truth):.2%}", flush=True)
    return relative_divergence(average, case.truth)


def update(objective: Objective, model: Model, adam: torch.optim.Adam, x: Tensor, generator) -> None:
    """One step of training."""
    objective(model, x, generator=generator).mean().backward()
    adam.step()
    adam.zero_grad()


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive, at most at a time."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def costs(chosen: dict[str, Case], results: dict[str, Result], options, rounds: int = 60) -> None:
    """Fill in milliseconds and memory of a step."""
    steps = {}
    generator = torch.Generator().manual_seed(4)
    for name, case in chosen.items():
        model = model_of(case.energy, options.hidden, options.layers)
        x = case.samples.sample(options.batch, generator)
        with Alive() as alive:
            case.objective(model, x, generator=generator).mean().backward()
        results[name].memory_mib = alive.most / 2**20
        adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        steps[name] = partial(update, case.objective, model, adam, x, generator)
    spent: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            spent[name].append(1e3 * (time.process_time() - start))
    for name in chosen:
        results[name].ms = statistics.median(spent[name])


def gradients(objective: Objective, law: GaussianMixture, model: Model, options) -> Tensor:
    """(draws, parameters): one gradient for each mini-batch."""
    generator = torch.Generator().manual_seed(2)
    data = batches(law, options.batch, generator)
    rows = []
    for _ in range(options.draws):
        loss = objective(model, next(data), generator=generator).mean()
        slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in slopes]))
    return torch.stack(rows).double()


def gradient_variance(case: Case, model: Model, options) -> float:
    """tr Cov of a mini-batch's gradient over |mean gradient|^2."""
    reference = gradients(ExplicitScoreMatching(case.truth.score), case.truth, model, options)
    noise = float(reference.var(0).sum()) / options.draws
    length = case.scale**2 * (float(reference.mean(0).square().sum()) - noise)
    return float(gradients(case.objective, case.samples, model, options).var(0).sum()) / length


def common_model(options) -> Model:
    """An energy network on its way: 300 steps of the explicit objective."""
    model = model_of(True, options.hidden, options.layers)
    case = cases()["explicit"]
    adam = torch.optim.Adam(model.parameters(), lr=options.rate)
    data = batches(case.samples, options.batch, torch.Generator().manual_seed(3))
    for _ in range(300):
        adam.zero_grad()
        case.objective(model, next(data)).mean().backward()
        adam.step()
    return model


def report(results: list[Result]) -> None:
    print("| objective | error | variance | ms / step | memory, MiB |")
    print("|---|--:|--:|--:|--:|")
    for r in results:
        print(f"| {r.name} | {r.error:.2%} | {r.variance:.2g} | {r.ms:.2f} | {r.memory_mib:.1f} |")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=list(cases()))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200, help="mini-batches for the variance of the gradient")
    parser.add_argument("--quiet", action="store_true", help="the table only")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    chosen = {name: case for name, case in cases().items() if not options.only or name in options.only}
    results = {name: Result(name, options.steps) for name in chosen}
    costs(chosen, results, options)
    common = common_model(options)
    for name, case in chosen.items():
        results[name].variance = gradient_variance(case, common, options)
        results[name].error = train(name, case, options)
    report(list(results.values()))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
