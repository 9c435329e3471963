"""Single files that are either whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY = ".tmp-"


def sync(path: Path) -> None:
    """Have the operating system put a file or a directory on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """What a file or folder is called until it is whole; it lies beside it."""
    return path.with_name(f"{TEMPORARY}{path.name}")


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content: at every moment it has the old or the new."""
    temporary = temporary_name(path)
    try:
        write_bytes(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and sync it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
