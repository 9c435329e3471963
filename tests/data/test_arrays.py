"""Plain arrays from .npy and .npz."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse.core.errors import DataError
from undiffuse.data import load


class Evil:
    """Leaves a mark when unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (str(self.place), "w"))


def every(dataset):
    return dataset.batch(torch.arange(len(dataset)))


def saved(tmp_path, **arrays):
    place = tmp_path / "points.npz"
    np.savez(place, **arrays)
    return str(place)


@pytest.mark.parametrize(
    ("shape", "event"),
    [((9, 5), (5,)), ((9, 4, 6), (1, 4, 6)), ((9, 3, 5, 6), (3, 5, 6)), ((9, 5, 6, 3), (3, 5, 6)),
     ((9, 5, 6, 1), (1, 5, 6)), ((9, 4, 5, 3), (4, 5, 3)), ((9, 16, 8, 8), (16, 8, 8)),
     ((9, 3, 2, 5, 5), (3, 2, 5, 5))],
)  # fmt: skip
def test_layouts(tmp_path, shape, event):
    x = np.random.default_rng(0).normal(size=shape)
    got, cond = every(load(saved(tmp_path, x=x), held_out=0.0))
    assert got.shape[1:] == event
    assert cond is None
    expected = x.transpose(0, 3, 1, 2) if shape[-1] != event[-1] else x.reshape(9, *event)
    assert (got.numpy() == expected.astype(np.float32)).all()


def test_bytes_are_scaled_and_floats_kept(tmp_path):
    whole = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    got, _ = every(load(saved(tmp_path, x=whole), held_out=0.0))
    assert (((got[:, 0] + 1) * 127.5).round().numpy() == whole).all()
    assert (got.min(), got.max()) == (-1.0, 1.0)
    np.save(tmp_path / "plain.npy", np.full((3, 2), 700.25))
    assert (every(load(str(tmp_path / "plain.npy"), held_out=0.0))[0] == 700.25).all()


def test_labels_vectors_and_splits_stay_aligned(tmp_path):
    x, y = np.arange(300.0)[:, None], np.arange(300) % 7
    parts = [load(saved(tmp_path, x=x, y=y), split) for split in ("train", "held-out")]
    for part in parts:
        got, label = every(part)
        assert torch.equal(label, got[:, 0].long() % 7)
        assert part.num_classes == 7
    assert sorted(torch.cat([every(part)[0] for part in parts])[:, 0].tolist()) == list(range(300))
    assert 4 < len(parts[1]) < 56  # binomial(300, 0.1): five standard deviations are 26
    vectors = load(saved(tmp_path, x=x, y=np.stack([y / 2, y / 3], 1)))
    assert (vectors.cond_dim, vectors.num_classes) == (2, None)
    limited = load(saved(tmp_path, x=x, y=y), limit=20)
    got, label = every(limited)
    assert len(set(got[:, 0].tolist())) == 20
    assert torch.equal(label, got[:, 0].long() % 7)


def test_other_names(tmp_path):
    place = saved(tmp_path, latents=np.zeros((5, 2)), kind=np.arange(5))
    with pytest.raises(DataError, match=r"it has: latents, kind. Give data.image_column"):
        load(place)
    with pytest.raises(DataError, match=r"no array 'latent'. Did you mean 'latents'"):
        load(place, image_column="latent")
    dataset = load(place, image_column="latents", label="kind", held_out=0.0)
    assert every(dataset)[1].tolist() == [0, 1, 2, 3, 4]


def test_pickles_are_refused_and_not_run(tmp_path):
    mark = tmp_path / "run"
    np.save(tmp_path / "evil.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", x=np.array([Evil(mark)], dtype=object))
    raw = io.BytesIO()
    np.lib.format.write_array(raw, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(raw.getvalue())
    for name in ("evil.npy", "evil.npz", "raw.npy"):
        with pytest.raises(DataError, match="pickle"):
            load(str(tmp_path / name))
    assert not mark.exists()


def test_damaged_files_and_impossible_arrays(tmp_path):
    place = saved(tmp_path, x=np.random.default_rng(0).normal(size=(50, 8)))
    content = Path(place).read_bytes()
    for damaged in (content[:200], content[: len(content) // 2], b"", b"PK\x03\x04"):
        Path(place).write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            load(place)
    for x, says in [
        (np.zeros(5), "shape"),
        (np.zeros((5, 2), int), "int64"),
        (np.zeros((5, 2), "U3"), "<U3"),
        (np.zeros((5, 0)), "empty"),
    ]:
        with pytest.raises(DataError, match=says):
            load(saved(tmp_path, x=x), held_out=0.0)
    with pytest.raises(DataError, match="'x' has 5 rows and 'y' 4"):
        load(saved(tmp_path, x=np.zeros((5, 2)), y=np.zeros(4, int)))
    with zipfile.ZipFile(place, "w") as file:
        file.writestr("notes.txt", "no array")
    with pytest.raises(DataError):
        load(place)


def test_rows_that_are_not_finite_are_named_or_left_out(tmp_path):
    x = np.arange(20.0).reshape(10, 2)
    x[3, 1], x[7, 0] = np.nan, np.inf
    place = saved(tmp_path, x=x, y=np.arange(10))
    with pytest.raises(DataError, match=r"row 3: holds NaN(.|\n)*row 7"):
        load(place, held_out=0.0)
    with pytest.warns(UserWarning, match="2 of 10 rows"):
        dataset = load(place, held_out=0.0, on_error="skip")
    assert every(dataset)[1].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
