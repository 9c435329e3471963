"""Samples from a trained energy by seed: each is the end of a Markov chain that belongs to its seed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.core.errors import RunError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy, FunctionEnergy
from undiffuse.recipes import energies
from undiffuse.recipes.correctors import said
from undiffuse.recipes.generate import BySeed, Sampler, spread
from undiffuse.recipes.schema import FactsSection, SamplingSection, Settings
from undiffuse.solvers.markov import Chains
from undiffuse.training.precision import autocast


@dataclass(frozen=True)
class EnergySampler(BySeed):
    """How seeds become samples of an energy.

    Args:
        energy: the model.
        facts: shape and classes of what it was trained on.
        solver: a choice of kernel as in a recipe, `{"name": "langevin", "step_size": 0.01}`.
        steps: of the kernel.
        initial: the law that chains start from, `{"name": "uniform", "scale": 1.0}`.
        label, batch, precision: as of `Sampler`.
    """

    grid: ClassVar[None] = None
    grid_name: ClassVar[str] = "none"

    energy: Energy
    facts: FactsSection
    solver: dict[str, Any]
    steps: int
    initial: dict[str, Any]
    label: int | None = None
    batch: int = 256
    precision: str = "fp32"

    def __post_init__(self):
        self._check()

    @classmethod
    def of(cls, energy: Energy, facts: FactsSection, section: SamplingSection, **changes: Any) -> EnergySampler:
        """As a recipe's `sampling` says, but for `changes`; a change that is None is none."""
        values = {key: getattr(section, key) for key in ("solver", "steps", "initial", "batch", "precision")}
        return cls(energy, facts, **values | {k: v for k, v in changes.items() if v is not None})

    @property
    def model(self) -> Energy:  # type: ignore[override]
        """The energy."""
        return self.energy

    @property
    def origin(self) -> str:
        """What samples start from: the law of the chains' first states."""
        return f"chains from {energies.initial(self.initial)}"

    @property
    def said(self) -> str:
        """The kernel in words."""
        return said(self.solver)

    @property
    def nfe(self) -> int:
        """Calls of the energy per sample, counted on one that costs nothing."""
        run, flat = energies.kernel(self.solver).run, FunctionEnergy(lambda x: 0 * x.flatten(1).sum(1))
        one, two = (run(flat, torch.zeros(1, 1), steps, generator=torch.Generator()).evals for steps in (1, 2))
        return one + (self.steps - 1) * (two - one)

    def one_batch(self, seeds: Sequence[int], **more: Any) -> Tensor:
        """The last states of one chain per seed."""
        return self.chains(seeds, **more).x

    def chains(self, seeds: Sequence[int], **more: Any) -> Chains:
        """One chain per seed. Warns of those that left the finite numbers: they are where they were before."""
        streams = Streams.of([int(s) for s in seeds], device=self.device)
        shape = (len(seeds), *self.facts.shape)
        x = energies.initial(self.initial).draw(shape, streams.fold("initial"), device=self.device)
        with autocast(self.precision, self.device):
            ran = energies.kernel(self.solver).run(
                self.energy, x, self.steps, cond=self.cond(seeds), generator=streams, **more
            )
        if ran.diverged:
            which = ", ".join(str(seeds[row]) for row in sorted(ran.diverged)[:8])
            warnings.warn(
                f"{len(ran.diverged)} of {len(seeds)} chains became infinite and were stopped (seeds {which}): "
                "try a smaller step size",
                stacklevel=2,
            )
        return ran

    def film(self, seeds: Sequence[int], frames: int) -> list[tuple[str, Tensor]]:
        """The seeds' chains on their way: captions and states."""
        states: list[Tensor] = []
        self.chains(seeds, callback=lambda index, x: states.append(x.float().cpu()))
        return [(f"step {i + 1}", states[i]) for i in spread(len(states), frames).tolist()]


SAMPLERS: dict[str, type[Sampler] | type[EnergySampler]] = {"denoiser": Sampler, "energy": EnergySampler}


def sampler_of(model: Any, settings: Settings, **changes: Any) -> Sampler | EnergySampler:
    """A sampler of a trained recipe's model, as its `sampling` says but for `changes`.

    Raises:
        RunError: the recipe has no facts, or trains what draws no samples.
    """
    if settings.kind not in SAMPLERS:
        raise RunError(f"recipe '{settings.name}' trains a {settings.kind}, which draws no samples")
    if settings.facts is None:
        raise RunError(f"recipe '{settings.name}' has no facts: it was not written by training")
    return SAMPLERS[settings.kind].of(model, settings.facts, settings.sampling, **changes)
