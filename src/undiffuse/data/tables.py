"""Arrow tables in the Hugging Face layout: an image column and perhaps a label column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.core.errors import DataError, nearest, require
from undiffuse.data.images import Unreadable

EXTRA = "data"


def looks_like_image(kind: Any) -> bool:
    """Whether an Arrow type can hold encoded images: a struct with `bytes` or `path`, or plain bytes."""
    types = require("pyarrow", EXTRA).types
    if types.is_struct(kind):
        return any(kind.field(k).name in ("bytes", "path") for k in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def check_columns(schema: Any, image_column: str, label: str | None, source: str) -> str | None:
    """The label column to read, or None where there is none.

    Raises:
        DataError: no such image column; a label column asked for by another name than "label" that is absent.
    """
    if image_column not in schema.names:
        images = [one.name for one in schema if looks_like_image(one.type)]
        hint = f" Give data.image_column={images[0]}." if images else nearest(image_column, schema.names)
        raise DataError(
            f"{source} has no column '{image_column}' of images; its columns: {', '.join(schema.names)}.{hint}"
        )
    if label is None or label in schema.names:
        return label
    if label == "label":
        return None
    raise DataError(
        f"{source} has no column '{label}' of labels; its columns: {', '.join(schema.names)}."
        f"{nearest(label, schema.names)}"
    )


def features_of(schema: Any) -> dict[str, Any]:
    """The feature descriptions that `datasets` leaves in a parquet file's metadata; empty without them."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        found = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names of the classes of column `label`, where the metadata say."""
    feature = features_of(schema).get(label or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def label_values(column: Any, source: str) -> np.ndarray:
    """A label column as an array for `make_labels`; null is "no label".

    Raises:
        DataError: a type that is no label.
    """
    pa = require("pyarrow", EXTRA)
    kind, types = column.type, pa.types
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_boolean(kind) or types.is_integer(kind):
        return column.cast(pa.int64()).fill_null(-1).to_numpy()
    if types.is_string(kind) or types.is_large_string(kind):
        return np.array(column.fill_null("").to_pylist(), dtype=str)
    if types.is_floating(kind):
        return column.to_numpy().astype(np.float64)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _vectors(column.to_pylist(), source)
    raise DataError(f"the label column of {source} has type {kind}: expected integers, names or lists of numbers")


def _vectors(rows: list, source: str) -> np.ndarray:
    widths = {len(row) for row in rows if row is not None}
    if len(widths) != 1:
        raise DataError(f"the condition vectors of {source} have lengths {sorted(widths)}: expected one length")
    absent = [float("nan")] * widths.pop()
    try:
        return np.array([absent if row is None else row for row in rows], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"the condition vectors of {source} are not numbers: {error}") from error


def image_reader(column: Any, folder: Path) -> Callable[[int], bytes | Path | Unreadable]:
    """Row -> encoded bytes, or the file that a bare path names (relative to `folder`)."""
    pc, types = require("pyarrow.compute", EXTRA), require("pyarrow", EXTRA).types
    kind = column.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        encoded, path = column, None
    elif types.is_string(kind) or types.is_large_string(kind):
        encoded, path = None, column
    else:
        named = [kind.field(k).name for k in range(kind.num_fields)] if types.is_struct(kind) else []
        encoded = pc.struct_field(column, "bytes") if "bytes" in named else None
        path = pc.struct_field(column, "path") if "path" in named else None
    if encoded is None and path is None:
        raise DataError(f"the image column has type {kind}: expected a struct of bytes and path, or bytes")

    def read(row: int) -> bytes | Path | Unreadable:
        content = None if encoded is None else encoded[row].as_py()
        if content is not None:
            return content
        place = None if path is None else path[row].as_py()
        return Unreadable("no image (null)") if place is None else folder / place

    return read


def locate(row: int, ends: np.ndarray) -> tuple[int, int]:
    """(part, row in it) of a row, where part k ends before row `ends[k]`."""
    part = int(np.searchsorted(ends, row, side="right"))
    return part, row - (int(ends[part - 1]) if part else 0)
