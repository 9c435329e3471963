"""Samples from a trained model by seed: sample s depends on s alone, whoever computes it and with whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.fields import Denoiser
from undiffuse.recipes import build
from undiffuse.recipes.correctors import NONE, corrector, said
from undiffuse.recipes.schema import FactsSection, SamplingSection
from undiffuse.recipes.thresholds import bounded
from undiffuse.solvers import GRIDS, OWN, sample
from undiffuse.training.precision import autocast


class BySeed:
    """What samplers share: labels by seed, batches, and the device of the model."""

    model: nn.Module
    facts: FactsSection
    solver: dict[str, Any]
    steps: int
    grid: str | None
    label: int | None
    batch: int
    precision: str

    def _check(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ArgumentError(f"steps = {self.steps}, batch = {self.batch}: expected at least 1 of each")
        if self.label is not None and not self._allowed(self.label):
            known = f"0 ... {self.facts.num_classes - 1}, or -1 for none" if self.facts.num_classes else "none"
            raise ArgumentError(f"label {self.label}: this model knows {known}")

    def _allowed(self, label: int) -> bool:
        classes = self.facts.num_classes
        return classes is not None and -1 <= label < classes

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def labels(self, seeds: Sequence[int]) -> Int[Tensor, " n"] | None:
        """The class of each seed; None for a model without classes."""
        classes = self.facts.num_classes
        if classes is None:
            return None
        wanted = torch.as_tensor([int(s) % classes for s in seeds], dtype=torch.int64)
        return wanted if self.label is None else torch.full_like(wanted, self.label)

    def cond(self, seeds: Sequence[int]) -> Tensor | None:
        """The labels, where the model is."""
        labels = self.labels(seeds)
        return None if labels is None else labels.to(self.device)

    def one_batch(self, seeds: Sequence[int], **more: Any) -> Any:
        """Samples of all the seeds at once."""
        raise NotImplementedError

    def __call__(self, seeds: Sequence[int], on_batch: Callable[[int], Any] | None = None) -> Float[Tensor, "n *event"]:
        """One sample per seed, on the CPU, computed `batch` at a time; `on_batch` is told how many are done."""
        if len(seeds) == 0:
            raise ArgumentError("no seeds were given: expected at least one")
        parts = []
        for start in range(0, len(seeds), self.batch):
            parts.append(self.one_batch(seeds[start : start + self.batch]).float().cpu())
            if on_batch is not None:
                on_batch(min(start + self.batch, len(seeds)))
        return torch.cat(parts)


@dataclass(frozen=True)
class Sampler(BySeed):
    """How seeds become samples of a denoiser.

    Args:
        denoiser: the model.
        facts: shape and classes of what it was trained on.
        solver: a choice as in a recipe, `{"name": "dpmpp-2m"}`.
        steps: of the solver.
        grid: a name; None: the solver's own.
        times: of a grid that has no name of its own in `GRIDS`; `grid` says what to call it.
        label: class of all samples, -1 for none; None: class `seed mod num_classes`.
        batch: samples at a time; changes a sample by rounding only.
        precision: of the network's large products, "fp32" or "bf16".
        corrector: a choice as in a recipe, `{"name": "langevin", "snr": 0.16}`; None: none.
        denoise: end a path that stops in noise with `E[x_0 | x]`.
        threshold: a choice as in a recipe, `{"name": "dynamic", "quantile": 0.995}`; None: none.
    """

    denoiser: Denoiser
    facts: FactsSection
    solver: dict[str, Any]
    steps: int
    grid: str | None = None
    label: int | None = None
    batch: int = 256
    precision: str = "fp32"
    corrector: dict[str, Any] | None = None
    denoise: bool = False
    threshold: dict[str, Any] | None = None
    times: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.grid is not None and self.times is None:
            choose(self.grid, GRIDS, "grid")
        self._check()

    @classmethod
    def of(cls, denoiser: Denoiser, facts: FactsSection, section: SamplingSection, **changes: Any) -> Sampler:
        """As a recipe's `sampling` says, but for `changes`; a change that is None is none, a corrector or threshold
        "none" takes its away, and so does the grid "own", the solver's."""
        keys = ("solver", "steps", "grid", "batch", "precision", "corrector", "denoise", "threshold")
        values = {key: getattr(section, key) for key in keys}
        values |= {key: value for key, value in changes.items() if value is not None}
        for key in ("corrector", "threshold"):
            if values[key] is not None and values[key]["name"] == NONE:
                values[key] = None
        if values["grid"] == OWN:
            values["grid"] = None
        if (calls := build.solver(values["solver"]).made_for) is not None:  # it has steps and times of its own
            values |= {
                "grid": None,
                "times": None,
                "steps": calls if changes.get("steps") is None else changes["steps"],
            }
        return cls(denoiser, facts, **values)

    @property
    def model(self) -> Denoiser:  # type: ignore[override]
        """The denoiser."""
        return self.denoiser

    @property
    def origin(self) -> str:
        """What samples start from: the path."""
        return repr(self.denoiser.path)

    @property
    def grid_name(self) -> str:
        """The name of the grid in use."""
        return self.grid or f"{self.solver['name']}'s own"

    @property
    def said(self) -> str:
        """Solver, corrector, last step and threshold in words."""
        return said(self.solver, self.corrector, self.denoise, self.threshold)

    @property
    def bounded(self) -> Denoiser:
        """The denoiser that is sampled from: with the threshold, where there is one."""
        return bounded(self.denoiser, self.threshold)

    @property
    def nfe(self) -> int:
        """Network calls per sample, counted on a field that costs nothing."""
        options = {**self.options(), "device": "cpu"}
        info: Any = sample(_Nothing(self.denoiser.path), (1, *self.facts.shape), seed=0, return_info=True, **options)
        return info.nfe

    def options(self) -> dict[str, Any]:
        """What `ud.sample` is called with beside the seeds and labels."""
        return {
            "solver": build.solver(self.solver),
            "steps": self.steps,
            "grid": self.grid if self.times is None else torch.tensor(self.times, dtype=torch.float64),
            "corrector": corrector(self.corrector),
            "denoise": self.denoise,
            "device": self.device,
        }

    def one_batch(self, seeds: Sequence[int], **more: Any) -> Any:
        """One call of `ud.sample` for all the seeds."""
        with autocast(self.precision, self.device):
            return sample(
                self.bounded,
                (len(seeds), *self.facts.shape),
                seed=[int(s) for s in seeds],
                cond=self.cond(seeds),
                **self.options(),
                **more,
            )

    def film(self, seeds: Sequence[int], frames: int) -> list[tuple[str, Tensor]]:
        """The seeds' samples on their way, noise first: captions and states."""
        info = self.one_batch(seeds, return_info=True)
        shots = []
        for i in spread(len(info.trajectory), frames).tolist():
            alpha, sigma = (float(part(info.grid[i])) for part in (self.denoiser.path.alpha, self.denoiser.path.sigma))
            level = "∞" if alpha == 0 else f"{sigma / alpha:.2g}"
            shots.append((f"σ/α = {level}", info.trajectory[i].float().cpu()))
        return shots


class _Nothing(Denoiser):
    """Answers zero."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.zeros_like(x_t)


def spread(n: int, at_most: int) -> Int[Tensor, " m"]:
    """Rows spread evenly over n."""
    return torch.linspace(0, n - 1, min(n, at_most)).round().long()


def write_arrays(file: IO[bytes], x: Tensor, seeds: np.ndarray, labels: Tensor | None) -> None:
    """Samples (float32), their seeds and labels (int64, where there are some) as an .npz."""
    arrays: dict[str, Any] = {"samples": x.numpy().astype(np.float32), "seeds": seeds.astype(np.int64)}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    np.savez(file, **arrays)
