"""What a trained energy is asked: what lies under noise, and whether something belongs to the data at all."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator
from undiffuse.fields.energy import Energy
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.markov import Kernel

Event = Float[Tensor, "b *event"]
PerSample = Float[Tensor, " b"]
Cond = Tensor | dict[str, Tensor] | None


class PosteriorEnergy(Energy):
    """`E(x) + |y - x|^2 / (2 sigma^2)`: the law of x given y = x + sigma eps, where exp(-E) is the law of x.

    Args:
        energy: of the clean data.
        y: what was seen (B, *event); row i belongs to chain i.
        sigma: standard deviation of the noise.

    Raises:
        ArgumentError: sigma <= 0; at the call, an x of another shape than y.
    """

    y: Tensor

    def __init__(self, energy: Energy, y: Event, sigma: float):
        super().__init__()
        _check_sigma(sigma)
        self.energy, self.sigma = energy, float(sigma)
        self.register_buffer("y", y, persistent=False)

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        if x.shape != self.y.shape:
            raise ArgumentError(f"x has shape {tuple(x.shape)}: expected that of y, {tuple(self.y.shape)}")
        return self.energy(x, cond) + (x - self.y).square().flatten(1).sum(1) / (2 * self.sigma**2)


def denoise(
    energy: Energy,
    y: Event,
    sigma: float,
    *,
    kernel: Kernel | None = None,
    steps: int = 200,
    cond: Cond = None,
    generator: Generator = None,
) -> Event:
    """`E[x | y]` for y = x + sigma eps.

    Without a kernel, one step of Tweedie's formula, `y - sigma^2 grad E(y)` (eq. 3.3.6): exact where exp(-E) is the law
    of y, that is, where the energy was trained on data with that noise (`data_noise`, denoising score matching). Where
    it is the law of the clean x, the step is the first of a descent of `PosteriorEnergy` from y, right to order
    sigma^2.

    With a kernel, for an energy of the clean data at any sigma: the mean of a chain that follows `PosteriorEnergy` from
    y; the first half of its steps is burn-in. Exact kernels (MALA, HMC) err by the chain's length alone.

    Args:
        energy: see above.
        y: noisy events.
        sigma: standard deviation of the noise, in the units of y.
        kernel: moves the chain, for instance `MALA(0.1 * sigma**2)`.
        steps: of the kernel, half of which count.
        cond: the energy's condition.
        generator: of the chain.

    Raises:
        ArgumentError: sigma <= 0, steps < 2. SamplingError: every chain diverged.
    """
    _check_sigma(sigma)
    if kernel is None:
        with evaluating(energy):
            return y + sigma**2 * energy.score(y, cond)
    if steps < 2:
        raise ArgumentError(f"steps is {steps}: expected at least 2, half of which are burn-in")
    total, half = torch.zeros_like(y), steps // 2

    def add(index: int, x: Tensor) -> None:
        if index >= steps - half:
            total.add_(x)

    target = PosteriorEnergy(energy, y, sigma).train(energy.training)
    kernel.run(target, y, steps, cond=cond, generator=generator, callback=add)
    return total / half


def _check_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise ArgumentError(f"sigma is {sigma}: expected the standard deviation of the noise, > 0")


def _energy(energy: Energy, x: Tensor, cond: Cond) -> Tensor:
    return energy(x, cond)


def _slope(energy: Energy, x: Tensor, cond: Cond) -> Tensor:
    return energy.score(x, cond).flatten(1).norm(dim=1)


STATISTICS = {"energy": _energy, "score-norm": _slope}


def out_of_distribution(
    energy: Energy, x: Event, *, statistic: str = "energy", batch: int = 256, cond: Cond = None
) -> PerSample:
    """How far each sample is from the data, (B,); larger is farther. Only the order means something.

    Args:
        energy: trained on the data.
        x: what is in question.
        statistic: "energy", `E(x)`; or "score-norm", `|grad E(x)|`, small where mass gathers (Grathwohl et al. 2020).
        batch: samples at a time.
        cond: the energy's condition, one row per sample.

    Raises:
        ArgumentError: an unknown statistic, batch < 1.
    """
    measure = choose(statistic, STATISTICS, "statistic")
    if batch < 1:
        raise ArgumentError(f"batch is {batch}: expected at least 1")
    rows = [slice(start, start + batch) for start in range(0, len(x), batch)]
    with evaluating(energy):
        parts = [measure(energy, x[part], _part(cond, part)) for part in rows]
    return torch.cat(parts) if parts else x.new_zeros(0)


class NearestClass(Energy):
    """`min over k of (E(x, k) - m_k) / s_k`, m_k and s_k mean and standard deviation of class k's energies on its data.

    How far x lies above what its nearest class is used to, in units of how much that varies: a class that is simple,
    or known only up to a constant, is no nearer for that (compare Nalisnick et al. 2019). For `out_of_distribution`.

    Args:
        energy: with a label 0 ... K - 1 as condition.
        mean, std: (K,).

    Raises:
        ArgumentError: at the call, a condition.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, energy: Energy, mean: Float[Tensor, " k"], std: Float[Tensor, " k"]):
        super().__init__()
        self.energy = energy
        self.register_buffer("mean", mean.detach())
        self.register_buffer("std", std.detach())

    @classmethod
    def of(cls, energy: Energy, x: Event, labels: Int[Tensor, " n"], *, batch: int = 256) -> NearestClass:
        """Measured on data x with labels 0 ... K - 1, of each class at least two.

        Raises:
            ArgumentError: labels that do not fit x, or a class with less data; batch < 1.
        """
        if labels.shape != x.shape[:1] or labels.is_floating_point() or len(labels) == 0 or int(labels.min()) < 0:
            raise ArgumentError(
                f"labels has shape {tuple(labels.shape)}, {labels.dtype}: expected {len(x)} integers >= 0"
            )
        counts = torch.bincount(labels)
        if bool((counts < 2).any()):
            few = int((counts < 2).nonzero()[0])
            raise ArgumentError(f"class {few} has {int(counts[few])} samples: {len(counts)} classes need two each")
        with torch.no_grad():
            energies = out_of_distribution(energy, x, batch=batch, cond=labels)
        groups = [energies[labels == k] for k in range(len(counts))]
        return cls(energy, torch.stack([g.mean() for g in groups]), torch.stack([g.std() for g in groups]))

    def forward(self, x: Event, cond: Cond = None) -> PerSample:
        if cond is not None:
            raise ArgumentError("the nearest class is taken over all labels: cond must be None")
        n, k = len(x), len(self.mean)
        labels = torch.arange(k, device=x.device).repeat(n)
        energies = self.energy(x.repeat_interleave(k, 0), labels).reshape(n, k)
        return ((energies - self.mean) / self.std).amin(1)


def _part(cond: Cond, rows: slice) -> Cond:
    if isinstance(cond, dict):
        return {name: value[rows] for name, value in cond.items()}
    return None if cond is None else cond[rows]
