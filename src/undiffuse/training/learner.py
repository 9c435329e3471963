"""What learns: the model and its objective, the optimiser, the averages; and what one step does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams, hash_key
from undiffuse.training.checkpoint import Checkpoint
from undiffuse.training.conditions import Cond, drop_condition, map_cond
from undiffuse.training.config import TrainConfig
from undiffuse.training.distributed import World
from undiffuse.training.ema import WeightAverages, averages
from undiffuse.training.losses import Losses, LossModule, joined
from undiffuse.training.optim import Scalar, clip_gradients, learning_rate, make_optimizers, move
from undiffuse.training.precision import autocast, prepare_model
from undiffuse.training.state import (
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizers,
    restore_tensors,
)


class Learner:
    """Everything that a step changes. All processes hold the same.

    Args:
        model: moved to the device and trained in place.
        objective: see `fit`; where it is a module, its parameters are trained with the model's.
        config: the numbers.
        world: the processes.
    """

    def __init__(self, model: nn.Module, objective: Any, config: TrainConfig, world: World):
        self.model, self.config, self.world = model, config, world
        prepare_model(model, config, world.device)
        if hasattr(objective, "settle"):
            objective.deferred = True
        self.objective = objective if isinstance(objective, nn.Module) else nn.Module()
        self.objective.to(world.device)
        # Wrapping gives all processes the weights of the first: the averages must start from those.
        losses = LossModule(model, objective).train()
        self.losses = world.wrap(losses)
        self.names = {p: n for n, p in losses.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(losses, config)
        self.averages = WeightAverages(model, averages(config))
        self._checked_use = world.size == 1

    def gradient(self, k: int, x: Tensor, cond: Cond) -> tuple[Losses, Scalar]:
        """Gradient of the mean loss over global batch k, clipped; returns the losses and the norm before clipping.

        x (B / world, *event) and cond are this process's rows.
        """
        torch.manual_seed(hash_key(self.config.seed, "step", k, self.world.rank))
        size = self.config.micro_batch or len(x)
        parts = [self._accumulate(k, x, cond, slice(i, i + size)) for i in range(0, len(x), size)]
        self._refuse_unused()
        return joined(parts), clip_gradients(list(self.names), self.config.clip)

    def _accumulate(self, k: int, x: Tensor, cond: Cond, rows: slice) -> Losses:
        """Add the gradient of a micro-batch; the last one's backward pass averages over the processes."""
        n, share = len(x[rows]), len(x)
        first = self.world.rank * share + rows.start
        streams = Streams.of(hash_key(self.config.seed, "train", k), n, first=first, device=self.world.device)
        given = drop_condition(map_cond(cond, lambda v: v[rows]), self.config.cond_dropout, streams)
        with self.world.silent(self.losses, active=rows.stop < share):
            with autocast(self.config.precision, self.world.device):
                losses: Losses = self.losses(x[rows], given, streams)
            if losses.loss.shape != (n,):
                raise ArgumentError(
                    f"the objective returned shape {tuple(losses.loss.shape)} for {n} samples: expected ({n},)"
                )
            # Processes are averaged, so the mean over a share becomes the mean over the global batch.
            (losses.loss.sum() / share).backward()
        return losses.detach()

    def _refuse_unused(self) -> None:
        """With several processes, a parameter outside the loss would stall the averaging of gradients."""
        if self._checked_use:
            return
        unused = [name for parameter, name in self.names.items() if parameter.grad is None]
        if unused:
            raise ArgumentError(
                f"the loss does not use {', '.join(unused)}: freeze them with requires_grad_(False) to train in "
                "several processes"
            )
        self._checked_use = True

    def settle(self) -> None:
        """Let an objective that keeps something from step to step close this one, alike in all processes."""
        if hasattr(self.objective, "settle"):
            self.objective.settle(self.world.gather)  # pyright: ignore[reportCallIssue]

    def diagnostics(self) -> dict[str, float]:
        """What the objective has to say beside its losses."""
        said = getattr(self.objective, "diagnostics", None)
        return said() if callable(said) else {}  # pyright: ignore[reportReturnType]

    def update(self, k: int) -> None:
        """Move the weights along the gradient, and the averages after them."""
        move(self.optimizers, learning_rate(self.config, k))
        self.averages.update(k + 1)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The whole state, one entry per file of a checkpoint; what is empty is left out."""
        files = {
            "model": module_tensors(self.model),
            "ema": self.averages.tensors(),
            "optimizer": optimizer_tensors(self.optimizers, self.names),
            "objective": module_tensors(self.objective),
        }
        return {name: content for name, content in files.items() if content}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `tensors`, into the tensors that are there.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape.
        """
        place = checkpoint.folder
        restore_module(self.model, checkpoint.tensors("model"), place / "model.safetensors")
        if module_tensors(self.objective):
            restore_module(self.objective, checkpoint.tensors("objective"), place / "objective.safetensors")
        if self.averages.kinds:
            restore_tensors(self.averages.tensors(), checkpoint.tensors("ema"), place / "ema.safetensors")
        restore_optimizers(
            self.optimizers, self.names, checkpoint.tensors("optimizer"), place / "optimizer.safetensors"
        )
