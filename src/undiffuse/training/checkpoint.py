"""Checkpoints: directories `step-NNNNNNN` of safetensors files and a `state.json` that seals them.

`state.json` holds the step, the library's version, the recipe, and size and sha256 of every other file; its own
sha256 is in its last field. Nothing here can execute code: no pickle is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from undiffuse.core.errors import CheckpointError
from undiffuse.training.files import clean, digest, disk_errors, new_directory, remove, write_bytes, write_tensors

Tensors = Mapping[str, Tensor]

_FORMAT = 1
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{7,})")
_SUFFIX = ".safetensors"
# Formats that run code when they are opened: one of these inside a checkpoint was not put there by us.
_CODE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".npy", ".npz", ".joblib", ".py"}
_CODE_HEADS = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save makes"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hashes have been verified. Tensors are read when asked for.

    Args:
        folder: the directory `step-NNNNNNN`.
        step: optimiser steps done.
        state: the content of `state.json`.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`: "model", "ema", "optimizer", "objective"."""
        path = self.folder / f"{name}{_SUFFIX}"
        if path.name not in self.state["files"]:
            raise CheckpointError(f"{self.folder} has no {path.name}: it has {', '.join(self.state['files'])}")
        return _read_tensors(path)

    @property
    def averages(self) -> list[str]:
        """Names of the averages of the weights, the default one first."""
        return list(self.state.get("averages", []))

    def average(self, name: str) -> dict[str, Tensor]:
        """The parameters of one average, by name.

        Raises:
            CheckpointError: no such average; lists those there are.
        """
        if name not in self.averages:
            raise CheckpointError(f"{self.folder} has no average '{name}': it has {', '.join(self.averages) or 'none'}")
        prefix = f"{name}/"
        return {k.removeprefix(prefix): v for k, v in self.tensors("ema").items() if k.startswith(prefix)}

    def weights(self, average: str | None = None) -> dict[str, Tensor]:
        """A whole state of the model: the last weights, or with the parameters of an average in their place."""
        model = self.tensors("model")
        return model if average is None else model | self.average(average)


@dataclass(frozen=True)
class Shelf:
    """A folder of checkpoints (or snapshots) by step."""

    folder: Path

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending, damaged ones included."""
        found = [_NAME.fullmatch(p.name) for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for match in found if match)

    def clean(self) -> None:
        """Delete the remains of interrupted saves and deletions."""
        clean(self.folder)

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint; it appears whole or not at all, and one of the same step is replaced.

        Raises:
            RunError: the disk refuses; what was there before is intact, and the half-written one is gone.
        """
        whole = [s for s in self.steps() if s != step]
        advice = "free some space, then start again to resume"
        consolation = f"The checkpoint of step {whole[-1]} is intact: {advice}" if whole else advice.capitalize()
        target = self.path(step)
        with disk_errors(f"{target}", consolation), new_directory(target) as temporary:
            files = {}
            for name, content in tensors.items():
                path = temporary / f"{name}{_SUFFIX}"
                files[path.name] = {"sha256": write_tensors(path, content), "bytes": path.stat().st_size}
            head = {"format": _FORMAT, "version": version("undiffuse"), "step": step, "files": files}
            write_bytes(temporary / _STATE, _sealed(head | dict(state)))
        return target

    def prune(self, keep: int, newest: int) -> None:
        """Delete all but the `keep` newest checkpoints up to step `newest`. Later ones are another run's matter."""
        for step in [s for s in self.steps() if s <= newest][:-keep]:
            remove(self.path(step))

    def drop_after(self, step: int) -> None:
        """Delete what lies beyond `step`: it will be made again."""
        for later in self.steps():
            if later > step:
                remove(self.path(later))

    def load(self, step: int | None = None) -> Checkpoint:
        """The checkpoint of a step (None: the newest), verified.

        Raises:
            CheckpointError: absent, truncated, altered, or holding something that could run code. Names the file and
                offers the newest whole checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} has no checkpoint: train first, or give another run folder")
        wanted = steps[-1] if step is None else step
        if wanted not in steps:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {wanted}: it has {steps}")
        try:
            return verified(self.path(wanted))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(wanted)}") from error

    def _offer(self, damaged: int) -> str:
        for step in reversed([s for s in self.steps() if s != damaged]):
            try:
                verified(self.path(step))
            except CheckpointError:
                continue
            return f"the newest whole checkpoint is step {step}: use step={step}"
        return "there is no whole checkpoint beside it"

    def newest_whole(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with each newer one."""
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                return verified(self.path(step)), problems
            except CheckpointError as error:
                problems.append(str(error))
        return None, problems


def checkpoint_shelf(folder: str | Path) -> Shelf:
    """Where the checkpoints of a run folder lie."""
    return Shelf(Path(folder) / "checkpoints")


def list_checkpoints(folder: str | Path) -> list[int]:
    """Steps of the checkpoints of a run folder, ascending; damaged ones are found on loading."""
    return checkpoint_shelf(folder).steps()


def load_checkpoint(folder: str | Path, step: int | None = None) -> Checkpoint:
    """A verified checkpoint of a run folder; see `Shelf.load`."""
    return checkpoint_shelf(folder).load(step)


def save_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint into a run folder, then delete all but the `keep` newest; see `Shelf.save`."""
    shelf = checkpoint_shelf(folder)
    path = shelf.save(step, tensors, state)
    shelf.prune(keep, newest=step)
    return path


# ---------------------------------------------------------------- the seal


def _seal(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sealed(state: Mapping[str, Any]) -> bytes:
    return json.dumps({**state, "seal": _seal(state)}, indent=1, allow_nan=False).encode()


def verified(folder: Path) -> Checkpoint:
    """Read `state.json` and compare every file with it.

    Raises:
        CheckpointError: names the first file that is missing, truncated, altered, or of a format that could run code.
    """
    state = _read_state(folder / _STATE)
    step = int(folder.name.removeprefix("step-"))
    if state["step"] != step:
        raise CheckpointError(f"{folder} holds step {state['step']}: the directory has been renamed")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _CODE_SUFFIXES:
            raise CheckpointError(
                f"{path} is of a format that can run code when opened: refused. Only safetensors are read; "
                "delete it if you know where it comes from"
            )
    for name, facts in state["files"].items():
        if Path(name).name != name or Path(name).suffix != _SUFFIX:
            raise CheckpointError(f"{folder / _STATE} names '{name}': expected safetensors files beside it")
        _verify_file(folder / name, facts)
    return Checkpoint(folder, step, state)


def _verify_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    _refuse_code(path)
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise CheckpointError(f"{path} is {size} bytes long: expected {facts['bytes']} (truncated or altered)")
    if digest(path) != facts["sha256"]:
        raise CheckpointError(f"{path} has another sha256 than when it was written: it has been altered")


def _refuse_code(path: Path) -> None:
    """A safetensors file starts with the length of its header, and never like a pickle or an archive."""
    with open(path, "rb") as file:
        head = file.read(9)
    # The ninth byte of a safetensors file is the brace that opens its header.
    looks_right = head[8:9] == b"{"
    for start, what in _CODE_HEADS.items():
        if head.startswith(start) and not looks_right:
            raise CheckpointError(f"{path} is {what}: refused, since opening it could run code")


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        state = json.loads(path.read_bytes())
        seal = state.pop("seal")
        intact = _seal(state) == seal
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read (truncated or altered): {error}") from error
    if not intact:
        raise CheckpointError(f"{path} does not match its seal: it has been altered")
    if state["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}: this version of undiffuse ({version('undiffuse')}) reads {_FORMAT}"
        )
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
