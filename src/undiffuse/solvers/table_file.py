"""The file of a solver's numbers: safetensors, with a checksum of them, so that an altered one is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.core.errors import CheckpointError
from undiffuse.core.files import replace_file


class Kind(NamedTuple):
    """What a file holds: the word in its header, the same for people, and how one is made."""

    format: str
    what: str
    make: str


TABLE = Kind("undiffuse-solver-1", "tuned solver", "make one with ud.tune(...).save(file), or: undiffuse tune RUN")


def written(file: str | Path, tensors: Mapping[str, Any], words: Mapping[str, Any], kind: Kind = TABLE) -> Path:
    """Writes a file, under another name first, synced, then renamed; lists of numbers become float64 tensors."""
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    numbers = {k: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for k, v in tensors.items()}
    replace_file(target, packed(numbers, words, kind))
    return target


def packed(tensors: Mapping[str, Tensor], words: Mapping[str, Any], kind: Kind = TABLE) -> bytes:
    """The content of a file: tensors, and words that JSON can hold."""
    from safetensors.torch import save

    text = json.dumps(words, default=_plain)
    return save(dict(tensors), {"format": kind.format, "words": text, "sha256": _seal(tensors, text)})


def unpacked(file: Path, kind: Kind = TABLE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `packed` was given.

    Raises:
        CheckpointError: no such file, another kind of file, or one that was altered or cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(f"there is no file {file}: {kind.make}")
    try:
        with safe_open(str(file), "pt") as content:
            said = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
        seal = _seal(tensors, said.get("words", ""))
    except (SafetensorError, OSError, NotImplementedError) as error:  # the last: a dtype that torch only knows by name
        raise CheckpointError(f"{file} cannot be read, it is cut short or no safetensors: {error}") from error
    if said.get("format") != kind.format:
        raise CheckpointError(f"{file} holds no {kind.what} (format {said.get('format')!r}, expected {kind.format!r})")
    if said.get("sha256") != seal:
        raise CheckpointError(f"{file} has been altered: its numbers are not those that were written. Make it again")
    with usable(file, kind.what, "Make it again"):
        words = json.loads(said["words"])
        if not (isinstance(words, dict) and isinstance(words.get("about", {}), dict)):
            raise ValueError("its words are no table")
    return tensors, words


@contextmanager
def usable(file: str | Path, what: str, again: str) -> Iterator[None]:
    """What is made of a file's content inside; `what` it should be, and how it is made `again`.

    Raises:
        CheckpointError: the content does not fit.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} holds no {what} that can be used: {error}. {again}") from error


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's."""
    return value.item()


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].to(torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()
