"""Small image folders and parquet files, written by the test."""

from pathlib import Path

import pytest


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
