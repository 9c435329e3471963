"""Training in several processes: who we are, agreeing on things, and waiting with a limit and a name."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from undiffuse.core.errors import ArgumentError, RunError

# Seconds by which the gradients' own limit exceeds ours, so that the wait that has a name ends first.
_GRACE = 60.0


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are, as `torchrun` (or `accelerate launch`) has set them; else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def find_device(device: str | torch.device) -> torch.device:
    """The device, with the index of this process where several share a machine.

    Raises:
        ArgumentError: it does not exist here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"unknown device '{device}': expected cpu, cuda, cuda:1 or mps") from error
    if found.type == "cuda":
        count = torch.cuda.device_count()
        index = found.index if found.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= count:
            raise ArgumentError(
                f"device '{device}' (index {index}) is not there: this machine has {count} CUDA devices"
            )
        return torch.device("cuda", index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError("device 'mps' is not there: use cpu")
    return found


@dataclass
class World:
    """The processes that train together; of size 1 without a launcher.

    Args:
        rank, size: this process, and how many.
        device: this process's.
        timeout: seconds to wait for the others.
        gradients: the group that averages gradients; None for one process.
        agreements: the group for all else, on the CPU whatever the device; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    timeout: float
    gradients: Any = None
    agreements: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the processes on each backward pass outside `silent`."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        # Large buffers that are the same everywhere (a replay buffer) need not be sent at every step.
        kept = [
            f"{place}.{name}"
            for place, part in module.named_modules()
            if getattr(part, "keeps_its_buffers", False)
            for name, _ in part.named_buffers(recurse=False)
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, kept)
        return DistributedDataParallel(module, device_ids=devices, process_group=self.gradients)

    def silent(self, module: nn.Module, active: bool) -> AbstractContextManager:
        """A block whose backward passes only accumulate: no gradient is sent."""
        if active and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds to an error inside the block which process met it, and in which phase."""
        try:
            yield
        except Exception as error:
            if self.size > 1:
                error.add_note(f"in process {self.rank} of {self.size}, during {name}")
            raise

    @contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises
            raise RunError(
                f"process {self.rank} of {self.size} lost the others while waiting for: {name} "
                f"(limit {self.timeout:g} s, training.timeout): {str(error).splitlines()[0]}"
            ) from error

    def any(self, flag: bool, name: str) -> bool:
        """Whether any process raises the flag."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag))
        with self._waiting(name):
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.agreements)
        return bool(votes)

    def sum(self, values: Tensor, name: str) -> Tensor:
        """Sum over the processes, on the CPU."""
        total = values.detach().to("cpu", copy=True)
        if self.size > 1:
            with self._waiting(name):
                dist.all_reduce(total, group=self.agreements)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, as many from each, in the order of their ranks; on all of them."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        with self._waiting("the rows of all processes"):
            dist.all_gather(parts, rows.contiguous(), group=self.gradients)
        return torch.cat(parts)

    def from_main(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns on the main process, on all; where it fails there, all fail.

        The others wait for at most `timeout` seconds.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as error:
                failure, answer[1] = error, str(error)
        with self._waiting(name):
            dist.broadcast_object_list(answer, src=0, group=self.agreements)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise RunError(f"process 0 failed during {name}: {answer[1]}")
        return answer[0]


def _meet(device: torch.device, timeout: float) -> None:
    """Make the process group, once in the life of the process: a second one would find the first one's addresses."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout + _GRACE)
        )
        atexit.register(dist.destroy_process_group)


@contextmanager
def join(device: str | torch.device, timeout: float) -> Iterator[World]:
    """Meet the other processes, if a launcher started several; leave them at the end of the block.

    A process group that the caller has made is used.

    Raises:
        ArgumentError: the device is not there. RunError: the others do not come within `timeout` seconds.
    """
    rank, size = rank_and_size()
    here = find_device(device)
    world = World(rank, size, here, timeout)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if size == 1:
        yield world
        return
    with world._waiting("the start of all processes"):
        _meet(here, timeout)
        world.gradients = dist.new_group(timeout=timedelta(seconds=timeout + _GRACE))
        world.agreements = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    try:
        yield world
    finally:
        for group in (world.gradients, world.agreements):
            dist.destroy_process_group(group)
