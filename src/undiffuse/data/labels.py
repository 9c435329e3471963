"""Labels as they are found, checked, and turned into classes or condition vectors."""

from __future__ import annotations

import numpy as np
import torch

from undiffuse.core.errors import DataError
from undiffuse.data.dataset import Labels

NO_LABEL = -1


def make_labels(
    values: np.ndarray | None, *, source: str, names: list[str] | None = None, num_classes: int | None = None
) -> Labels:
    """Labels of all rows of all splits of `source`.

    Args:
        values: integers (n,), strings (n,) (classes sorted by name), floats (n, d) (condition vectors; a row of NaN is
            "absent"), or None. -1 is "no label".
        source: its name, for errors.
        names: the classes by name, where the data say.
        num_classes: as given by the user.

    Raises:
        DataError: a label that is out of range, or no whole number; names the row.
    """
    if values is None:
        return Labels(None, names, num_classes)
    if values.dtype.kind in "US":
        names, values = _numbered(values.astype(str), names, source)
    if values.ndim == 2 and values.dtype.kind == "f":
        return Labels(_vectors(values, source))
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise DataError(
            f"the labels of {source} have shape {values.shape} and type {values.dtype}: "
            "expected whole numbers (n,), names (n,), or floats (n, d)"
        )
    return _classes(values, source, names, num_classes)


def _numbered(values: np.ndarray, names: list[str] | None, source: str) -> tuple[list[str], np.ndarray]:
    """Names of classes become their numbers; the empty name is "no label"."""
    names = names or sorted(set(values.tolist()) - {""})
    number = {name: k for k, name in enumerate(names)} | {"": NO_LABEL}
    for row, value in enumerate(values.tolist()):
        if value not in number:
            raise DataError(f"row {row} of {source} has the label '{value}', which is none of its classes {names}")
    return names, np.array([number[value] for value in values.tolist()], dtype=np.int64)


def _vectors(values: np.ndarray, source: str) -> torch.Tensor:
    absent = np.isnan(values).all(axis=1)
    bad = ~np.isfinite(values).all(axis=1) & ~absent
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"the condition of row {row} of {source} is not finite: {values[row].tolist()}; "
            "all entries are numbers, or all NaN for none"
        )
    return torch.from_numpy(values.astype(np.float32))


def _classes(values: np.ndarray, source: str, names: list[str] | None, num_classes: int | None) -> Labels:
    whole = values.dtype.kind != "f" or bool((np.isfinite(values) & (values == np.round(values))).all())
    if not whole:
        row = int((~np.isfinite(values) | (values != np.round(values))).argmax())
        raise DataError(
            f"the label of row {row} of {source} is {values[row]}, no whole number: "
            "classes are 0, 1, ...; a condition vector has shape (n, d)"
        )
    classes = values.astype(np.int64)
    known = num_classes or (len(names) if names else None)
    if names and num_classes and num_classes < len(names):
        raise DataError(f"data.num_classes is {num_classes}, but {source} names {len(names)} classes")
    # Without a word from the data or the user there cannot be more classes than rows.
    top = known if known is not None else len(classes)
    wrong = (classes < NO_LABEL) | (classes >= top)
    if wrong.any():
        row = int(wrong.argmax())
        reach = f"{known} classes" if known is not None else f"{top} rows"
        raise DataError(
            f"the label of row {row} of {source} is {classes[row]}, out of range for {reach}: expected 0 to {top - 1}, "
            "or -1 for none; renumber the labels, or give data.num_classes or data.label=null"
        )
    count = known if known is not None else int(classes.max(initial=-1)) + 1
    return Labels(torch.from_numpy(classes), names, count) if count else Labels()
