"""Files and directories that are either whole or not there, whenever the process or the machine stops.

New things are written under a temporary name, synced, renamed into place, and the directory that holds them is
synced. Things to be deleted are renamed to a temporary name first. What carries a temporary name is rubbish.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from undiffuse.core.errors import RunError
from undiffuse.core.files import TEMPORARY, replace_file, sync, temporary_name, write_bytes

__all__ = [
    "clean",
    "digest",
    "disk_errors",
    "new_directory",
    "remove",
    "replace_file",
    "sync",
    "temporary_name",
    "write_bytes",
    "write_tensors",
]


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a directory so that a stop half-way leaves nothing that looks valid."""
    hidden = path.with_name(f"{TEMPORARY}old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    sync(path.parent)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Delete what interrupted writes and deletions left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill with synced files; becomes `target` at the end of the block, or vanishes on an error."""
    temporary = temporary_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        if target.exists():
            remove(target)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, contiguous whatever the memory format, and sync it; returns its sha256."""
    save_file({name: _plain(value) for name, value in tensors.items()}, path)
    sync(path)
    return digest(path)


def _plain(value: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its memory: the format holds no views."""
    value = value.detach().to("cpu").contiguous()
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone else value.clone(memory_format=torch.contiguous_format)


@contextmanager
def disk_errors(what: str, consolation: str) -> Iterator[None]:
    """Turn a failed write (a full disk, no permission) into a `RunError` that says what is still safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"could not write {what}: {reason}. {consolation}") from error
