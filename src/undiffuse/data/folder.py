"""A folder of images: class sub-folders, or flat; with or without split folders above them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from undiffuse.core.errors import DataError
from undiffuse.data.dataset import Dataset, Labels, digest
from undiffuse.data.images import SUFFIXES
from undiffuse.data.labels import make_labels
from undiffuse.data.lazy import read_images
from undiffuse.data.records import Records
from undiffuse.data.request import HELD_OUT_NAMES, SPLITS, Request, check_split, find_split
from undiffuse.data.splits import name_positions, split_rows
from undiffuse.data.stream import LocalRecords, StreamingDataset

Found = list[tuple[str, Path]]  # name relative to the split's folder, with "/"; and the file


def list_images(folder: Path) -> Found:
    """Image files below `folder` in order of name; what starts with a dot is passed over.

    Raises:
        DataError: there is none; says what was found instead.
    """
    found, others = [], Counter()
    for top, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        for file in [Path(top) / name for name in files if not name.startswith(".")]:
            if file.suffix.lower() in SUFFIXES:
                found.append((file.relative_to(folder).as_posix(), file))
            else:
                others[file.suffix.lower() or "no suffix"] += 1
        # os.walk does not enter links, so that it cannot run in circles: one level of them is followed here.
        for name in links if Path(top) == folder else []:
            inside = (Path(top) / name).iterdir() if (Path(top) / name).is_dir() else []
            found += [(f"{name}/{p.name}", p) for p in inside if p.suffix.lower() in SUFFIXES]
    if not found:
        held = ", ".join(f"{count} file(s) {suffix}" for suffix, count in others.most_common(5)) or "nothing"
        raise DataError(f"no images in '{folder}': found {held}; images end in {', '.join(sorted(SUFFIXES))}")
    return sorted(found)


def split_folders(place: Path) -> dict[str, Path]:
    """Folders named after splits, where all folders in `place` are; else none."""
    folders = [p for p in sorted(place.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    names = {"train", *HELD_OUT_NAMES}
    return {p.name: p for p in folders} if folders and all(p.name in names for p in folders) else {}


def _classes(found: Found, folder: Path, label: str | None) -> list[str] | None:
    """The class of each image: the first folder of its name. None where the folder is flat.

    Raises:
        DataError: images lie beside class folders.
    """
    if label is None:
        return None
    flat = [name for name, _ in found if "/" not in name]
    if len(flat) == len(found):
        return None
    if flat:
        raise DataError(
            f"{len(flat)} image(s) lie in '{folder}' beside its class folders, such as '{flat[0]}': "
            "move them into one, or give data.label=null to use all images without labels"
        )
    return [name.split("/", 1)[0] for name, _ in found]


def _labels(groups: dict[str, Found], roots: dict[str, Path], chosen: str, request: Request) -> Labels:
    """Labels of the chosen split, numbered by the sorted names of the classes of all splits."""
    classes = {split: _classes(found, roots[split], request.label) for split, found in groups.items()}
    if any(one is None for one in classes.values()):
        if any(one is not None for one in classes.values()):
            raise DataError(f"of the splits of {request.name} some have class folders and some have not")
        return Labels()
    everything = np.array([name for one in classes.values() for name in one or []])
    labels = make_labels(everything, source=request.name, num_classes=request.num_classes)
    start = 0
    for split, found in groups.items():
        if split == chosen:
            return labels.select(torch.arange(start, start + len(found)))
        start += len(found)
    raise KeyError(chosen)


def load_folder(request: Request) -> Dataset | StreamingDataset:
    """Images of a folder; see `load`."""
    place = request.place()
    if not place.is_dir():
        raise DataError(f"'{place}' is a file: the source 'folder' needs a folder of images")
    roots = split_folders(place)
    whole = not roots or (set(roots) == {"train"} and request.split in SPLITS)
    if not roots:
        roots = {"": place}
    chosen = next(iter(roots)) if whole else find_split(request.split, list(roots))
    split = check_split(request.split) if whole else request.split
    groups = {name: list_images(folder) for name, folder in roots.items()}
    found, labels = groups[chosen], _labels(groups, roots, chosen, request)
    names, files = [name for name, _ in found], [file for _, file in found]
    rows = torch.arange(len(found))
    if whole:
        rows = split_rows(name_positions(names), split, request.held_out)
    records = Records(files.__getitem__, lambda row: f"row {row} ({names[row]})", labels, rows)
    if not request.streaming:
        return read_images(records, request, split)
    records = records.limited(request.limit)
    used = records.rows.tolist()
    content = digest(split, [(names[row], files[row].stat().st_size) for row in used], labels.num_classes)
    # Each file is a shard of its own, so that a stream of a folder is shuffled as a whole.
    return StreamingDataset(LocalRecords(records, np.arange(1, len(found) + 1)), request, split, content)
