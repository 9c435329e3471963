"""Small image folders and parquet files with known pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """Bytes of an image file with these uint8 pixels (H, W) or (H, W, C)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def picture(k: int, size: int = 6, channels: int = 1) -> np.ndarray:
    """Picture number k: its first pixel is k, the others are random."""
    pixels = np.random.default_rng(k).integers(0, 256, (size, size, channels), dtype=np.uint8)
    pixels[0, 0] = k
    return pixels[..., 0] if channels == 1 else pixels


def numbers(x) -> list[int]:
    """Which pictures a batch holds, read off their first pixels."""
    return ((x[:, 0, 0, 0] + 1.0) * 127.5).round().int().tolist()


@pytest.fixture
def make_parquet(tmp_path):
    """Write rows (bytes or None, label) as a parquet file in the Hugging Face layout."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def make(rows, name="train-00000-of-00001.parquet", *, names=None, group=5, label="label", image="image") -> Path:
        images = [{"bytes": content, "path": f"{k}.png"} for k, (content, _) in enumerate(rows)]
        columns = {image: pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
        labels = [value for _, value in rows]
        if any(value is not None for value in labels):
            columns[label] = pa.array(labels)
        table = pa.table(columns)
        if names:
            feature = f'{{"names": {list(names)}, "_type": "ClassLabel"}}'.replace("'", '"')
            text = f'{{"info": {{"features": {{"image": {{"_type": "Image"}}, "{label}": {feature}}}}}}}'
            table = table.replace_schema_metadata({"huggingface": text})
        folder = tmp_path / "parquet"
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / name, row_group_size=group)
        return folder

    return make


@pytest.fixture
def make_folder(tmp_path):
    """Write files {relative name: bytes} below a folder."""

    def make(files: dict[str, bytes], name: str = "photos") -> Path:
        for relative, content in files.items():
            place = tmp_path / name / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        return tmp_path / name

    return make
