"""The denoising objective: regression of the clean data, of its noise, or of any line between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator
from undiffuse.fields import Denoiser, NetworkDenoiser
from undiffuse.objectives.times import TIMES, TimeDistribution, drawn
from undiffuse.objectives.weights import WEIGHTS, Weight


@dataclass(frozen=True)
class Losses:
    """Per-sample losses and the noise levels at which they were taken, each of shape (B,)."""

    loss: Tensor
    t: Tensor
    half_log_snr: Tensor


class Denoising:
    """`E_t E_{x_0, eps} w(t) |D(x_t, t) - x_0|^2` (eq. 4.2.1; Vincent 2011; Ho et al. 2020).

    Two of its four axes sit on the model (path and prediction), two here. It is computed on the network's own output,
    `w c_out^2 |F - F*|^2`, so that no noise level is lost to rounding. The value is per sample, the mean over the
    event's dimensions; weights of the likelihood type sum over them.

    DDPM: noise prediction, "simple". Score SDE: "likelihood" or "snr". EDM: "edm" prediction and weight, "log-normal"
    times. Gaussian flow matching: velocity prediction on `Linear`, "simple".

    The pair's own x_0 is a noisy answer to "which data made x_t?". With a `target` the model regresses on that
    denoiser's `E[x_0 | x_t]` instead: the same minimiser where the target is the exact denoiser of the data, less
    variance of the gradient (Prop. 4.2.1; Xu et al. 2023 estimate it from part of the data), and a student's
    objective where it is another model.

    Args:
        time: a name ("uniform", "log-normal", "uniform-half-log-snr", "logit-normal", "discrete") or an object.
        weight: a name ("simple", "snr", "min-snr", "truncated-snr", "likelihood", "edm") or an object.
        target: a denoiser on the model's path, moved to the device of the data, without gradients, in the mode that
            it is in (a network: `.eval()`); None: the pair's x_0 and noise. For data in memory:
            `ud.Empirical(x, labels=labels).denoiser(path)`.

    Raises:
        ArgumentError: an unknown name; the nearest is offered. When called, a target on another path than the model.
    """

    def __init__(
        self,
        time: str | TimeDistribution = "uniform",
        weight: str | Weight = "simple",
        target: Denoiser | None = None,
    ):
        self.time = choose(time, TIMES, "time distribution")() if isinstance(time, str) else time
        self.weight = choose(weight, WEIGHTS, "weight")() if isinstance(weight, str) else weight
        self.target = target

    def __repr__(self) -> str:
        target = f", target={type(self.target).__name__}" if self.target is not None else ""
        return f"Denoising(time={self.time}, weight={self.weight}{target})"

    def __call__(
        self, model: NetworkDenoiser, x_0: Float[Tensor, "b *event"], cond=None, generator: Generator = None
    ) -> Float[Tensor, " b"]:
        """Per-sample losses at times and noises drawn from `generator`."""
        return self.losses(model, x_0, cond, generator).loss

    def losses(
        self, model: NetworkDenoiser, x_0: Float[Tensor, "b *event"], cond=None, generator: Generator = None
    ) -> Losses:
        """The losses with the noise levels they were taken at."""
        t, noise = drawn(self.time, model.path, x_0, generator)
        loss = self.at(model, x_0, t, noise, cond)
        level = t.detach().clamp(model.path.t_low, model.path.t_high)
        return Losses(loss, t, model.path.half_log_snr(level))

    def at(
        self,
        model: NetworkDenoiser,
        x_0: Float[Tensor, "b *event"],
        t: Float[Tensor, " b"],
        noise: Float[Tensor, "b *event"],
        cond=None,
    ) -> Float[Tensor, " b"]:
        """Per-sample losses at the times and noises given: the objective without its randomness."""
        x_t = model.path.perturb(x_0, t, noise)
        if self.target is not None:
            x_0, noise = self._means(model, x_t, t, cond)
        output, c = model.output(x_t, t, cond)
        squared = (output - c.target(x_0, noise)).square().flatten(1)
        error = squared.sum(dim=1) if self.weight.sums else squared.mean(dim=1)
        return self.weight.on_output(model.path, t, c) * error

    @torch.no_grad()
    def _means(self, model: NetworkDenoiser, x_t: Tensor, t: Tensor, cond) -> tuple[Tensor, Tensor]:
        """The target's `(E[x_0 | x_t], E[eps | x_t])`."""
        assert self.target is not None
        if self.target.path is not model.path and self.target.path != model.path:
            raise ArgumentError(
                f"the target is on {self.target.path}, the model on {model.path}: give it the model's path, for a "
                "trained denoiser by ud.on_path(target, model.path)"
            )
        return self.target.to(x_t.device).estimate(x_t, t, cond)
