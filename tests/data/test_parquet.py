"""Parquet files in the Hugging Face layout."""

import numpy as np
import pytest
import torch

from data.pictures import encode, numbers, picture
from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.data import load

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def rows(numbers_of, label=lambda k: k % 3):
    return [(encode(picture(k)), label(k)) for k in numbers_of]


def every(dataset):
    return dataset.batch(torch.arange(len(dataset)))


def test_rows_labels_and_names_are_the_files(make_parquet):
    place = make_parquet(rows(range(23)), names=["a", "b", "c", "d"])
    dataset = load(str(place), held_out=0.0)
    x, label = every(dataset)
    assert numbers(x) == list(range(23))
    assert label.tolist() == [k % 3 for k in range(23)]
    assert (dataset.class_names, dataset.num_classes) == (["a", "b", "c", "d"], 4)
    assert (((x[5, 0] + 1) * 127.5).round().numpy() == picture(5)).all()


def test_splits_come_from_the_file_names(make_parquet):
    make_parquet(rows(range(10)), "train-00000-of-00002.parquet")
    make_parquet(rows(range(10, 16)), "train-00001-of-00002.parquet")
    place = make_parquet(rows([20, 21], label=lambda k: 4), "test-00000-of-00001.parquet")
    x, label = every(load(str(place)))
    assert numbers(x) == list(range(16))
    assert label.tolist() == [k % 3 for k in range(16)]
    x, label = every(load(str(place), "held-out"))
    assert (numbers(x), label.tolist()) == ([20, 21], [4, 4])
    x, label = next(load(str(place), streaming=True).batches(16))
    assert label.tolist() == [k % 3 for k in numbers(x)]
    # The class that only the test split holds counts in both.
    assert load(str(place)).num_classes == load(str(place), "test").num_classes == 5
    with pytest.raises(ArgumentError, match="unknown split 'validation'"):
        load(str(place), "validation")


def test_validation_serves_where_there_is_no_test(make_parquet):
    make_parquet(rows(range(3)), "train.parquet")
    place = make_parquet(rows([7]), "validation.parquet")
    assert numbers(every(load(str(place), "held-out"))[0]) == [7]


def test_one_piece_is_split_by_row_once_and_for_all(make_parquet):
    place = make_parquet(rows(range(200)), "pictures.parquet")
    for path in (str(place), str(place / "pictures.parquet")):
        parts = [numbers(every(load(path, split, held_out=0.2))[0]) for split in ("train", "held-out")]
        assert sorted(parts[0] + parts[1]) == list(range(200))
        assert 20 < len(parts[1]) < 60  # binomial(200, 0.2): five standard deviations are 28


def test_data_files_name_the_splits(make_parquet):
    make_parquet(rows(range(4)), "one.parquet")
    place = make_parquet(rows([8]), "two.parquet")
    files = {"train": "one.parquet", "held-out": ["tw*.parquet"]}
    assert numbers(every(load("parquet", "held-out", path=str(place), data_files=files))[0]) == [8]
    assert numbers(every(load("parquet", path=str(place), data_files=files))[0]) == [0, 1, 2, 3]
    absolute = {"train": str(place / "one.parquet"), "held-out": str(place / "two.parquet")}
    assert numbers(every(load("parquet", "held-out", data_files=absolute))[0]) == [8]
    with pytest.raises(DataError, match="nothing matches 'three"):
        load("parquet", path=str(place), data_files={"train": "three*.parquet"})
    make_parquet(rows([9]), "train-1.parquet")
    with pytest.raises(DataError, match="name no split"):
        load(str(place))


def test_an_unreadable_image_is_named_with_its_file_and_row(make_parquet):
    make_parquet(rows(range(10)), "train-00000-of-00002.parquet")
    bad = rows(range(10, 20))
    bad[4], bad[6] = (b"\xff\xd8 no", 1), (None, 2)
    place = make_parquet(bad, "train-00001-of-00002.parquet")
    with pytest.raises(DataError) as caught:
        load(str(place), held_out=0.0)
    assert "row 14 (train-00001-of-00002.parquet, its row 4)" in str(caught.value)
    assert "row 16 (train-00001-of-00002.parquet, its row 6)" in str(caught.value)
    with pytest.warns(UserWarning, match="2 of 20 rows"):
        dataset = load(str(place), held_out=0.0, on_error="skip")
    x, label = every(dataset)
    assert numbers(x) == [k for k in range(20) if k not in (14, 16)]
    assert label.tolist() == [k % 3 for k in numbers(x)]


@pytest.mark.parametrize(
    ("label", "options", "says"),
    [
        (lambda k: k - 2, {}, "row 0 .* is -2, out of range"),
        (lambda k: 9 if k == 3 else 0, {"num_classes": 5}, "row 3 .* is 9, out of range for 5 classes"),
        (lambda k: 1000 if k == 3 else 0, {}, "row 3 .* is 1000, out of range for 8 rows"),
        (lambda k: 0.5 if k == 3 else 0.0, {}, "row 3 .* is 0.5, no whole number"),
        (lambda k: [1.0] * (1 + k % 2), {}, r"lengths \[1, 2\]"),
        (lambda k: [1.0, float("inf")] if k == 3 else [1.0, 2.0], {}, "row 3 .* is not finite"),
        (lambda k: {"a": 1}, {}, "has type struct"),
    ],
)
def test_wrong_labels_are_named_with_their_row(make_parquet, label, options, says):
    place = make_parquet(rows(range(8), label), "pictures.parquet")
    with pytest.raises(DataError, match=says):
        load(str(place), held_out=0.0, **options)
    assert every(load(str(place), held_out=0.0, label=None))[1] is None


def test_names_missing_labels_and_vectors(make_parquet):
    names = make_parquet(rows(range(6), lambda k: ["cow", None, "ant"][k % 3]), "pictures.parquet")
    dataset = load(str(names), held_out=0.0)
    assert dataset.class_names == ["ant", "cow"]
    assert every(dataset)[1].tolist() == [1, -1, 0, 1, -1, 0]
    assert dataset.summary()["classes"] == {"ant": 2, "cow": 2, "none": 2}
    vectors = make_parquet(rows(range(6), lambda k: None if k == 2 else [k, k / 2]), "pictures.parquet")
    dataset = load(str(vectors), held_out=0.0)
    assert (dataset.num_classes, dataset.cond_dim) == (None, 2)
    cond = every(dataset)[1]
    assert cond[4].tolist() == [4.0, 2.0]
    assert cond[2].isnan().all()


def test_columns_under_other_names(make_parquet):
    place = make_parquet(rows(range(6)), "pictures.parquet", image="img", label="fine")
    with pytest.raises(
        DataError, match=r"no column 'image' of images; its columns: img, fine. Give data.image_column=img"
    ):
        load(str(place))
    dataset = load(str(place), held_out=0.0, image_column="img", label="fine")
    assert every(dataset)[1].tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(DataError, match=r"no column 'fin' of labels.*Did you mean 'fine'"):
        load(str(place), image_column="img", label="fin")
    assert load(str(place), image_column="img").num_classes is None


def test_images_as_plain_bytes_or_paths(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(encode(picture(k)))
    pq.write_table(pa.table({"image": [encode(picture(k)) for k in range(3)]}), tmp_path / "bytes.parquet")
    pq.write_table(pa.table({"image": [f"{k}.png" for k in range(3)]}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": [1.0, 2.0]}), tmp_path / "numbers.parquet")
    for name in ("bytes", "paths"):
        assert numbers(every(load(str(tmp_path / f"{name}.parquet"), held_out=0.0))[0]) == [0, 1, 2]
    with pytest.raises(DataError, match="image column has type double"):
        load(str(tmp_path / "numbers.parquet"))


def test_truncated_and_empty_files(make_parquet, tmp_path):
    place = make_parquet(rows(range(6)), "pictures.parquet")
    content = (place / "pictures.parquet").read_bytes()
    (place / "pictures.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"pictures.parquet' cannot be read as parquet"):
        load(str(place))
    middle = bytearray(content)
    middle[100:400] = bytes(300)
    (place / "pictures.parquet").write_bytes(middle)
    with pytest.raises(DataError, match=r"damaged|cannot be read"):
        load(str(place))
    with pytest.raises(DataError, match="no rows"):
        load(str(make_parquet([], "pictures.parquet")))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"no .parquet file"):
        load("parquet", path=str(tmp_path / "nothing"))


def test_large_files_are_mapped_and_not_read(make_parquet, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    from undiffuse.data import parquet

    place = make_parquet(rows(range(30)))
    plain = load(str(place), held_out=0.2)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet, "MEMORY_LIMIT", 10)
    mapped = load(str(place), held_out=0.2)
    assert torch.equal(mapped.x, plain.x)
    assert mapped.fingerprint == plain.fingerprint


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "shape", "sizes"),
    [("mnist", (1, 28, 28), (60_000, 10_000)), ("cifar10-jpeg", (3, 32, 32), (50_000, 10_000))],
)
def test_real_files(data_folder, folder, shape, sizes):
    train = load(str(data_folder / folder), limit=500)
    held_out = load(str(data_folder / folder), "held-out", streaming=True)
    stream = load(str(data_folder / folder), streaming=True)
    assert (stream.n, held_out.n) == sizes
    assert train.shape == stream.shape == held_out.shape == shape
    assert train.num_classes == 10
    if folder == "mnist":  # file names say the class: "3-7058.png"
        table = pq.read_table(data_folder / folder / "test-00000-of-00001.parquet")
        named = np.array([int(name.as_py().split("-")[0]) for name in pa.compute.struct_field(table["image"], "path")])
        assert (held_out.labels.values.numpy() == named).all()
