"""The hub's path through `datasets`, on a local folder: no network."""

import pytest
import torch

from data.pictures import encode, numbers, picture
from undiffuse.core.errors import ArgumentError, DataError, MissingExtraError
from undiffuse.data import load

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def rows(numbers_of):
    return [(encode(picture(k)), k % 3) for k in numbers_of]


def every(dataset):
    return dataset.batch(torch.arange(len(dataset)))


def test_splits_labels_and_names(make_parquet):
    names = ["a", "b", "c"]
    make_parquet(rows(range(12)), "train-00000-of-00001.parquet", names=names)
    place = str(make_parquet(rows(range(20, 24)), "test-00000-of-00001.parquet", names=names))
    train, held_out = load("hub", path=place), load("hub", "held-out", path=place)
    assert numbers(every(train)[0]) == list(range(12))
    assert every(train)[1].tolist() == [k % 3 for k in range(12)]
    assert numbers(every(held_out)[0]) == [20, 21, 22, 23]
    assert train.class_names == names
    assert train.fingerprint == load("parquet", path=place).fingerprint
    with pytest.raises(ArgumentError, match=r"unknown split 'trian'. Did you mean 'train'"):
        load("hub", "trian", path=place)
    assert load("hub", "held-out", path=place, streaming=True).class_names == names


def test_one_split_is_divided_but_not_in_a_stream(make_parquet):
    place = str(make_parquet(rows(range(60))))
    parts = [numbers(every(load("hub", split, path=place, held_out=0.3))[0]) for split in ("train", "held-out")]
    assert sorted(parts[0] + parts[1]) == list(range(60))
    with pytest.raises(DataError, match="a stream cannot be split"):
        load("hub", "held-out", path=place, streaming=True)


def test_unreadable_rows_are_named(make_parquet):
    content = rows(range(12))
    content[7] = (b"broken", 1)
    place = str(make_parquet(content, names=["a", "b", "c"]))
    with pytest.raises(DataError, match="row 7 of 'train'"):
        load("hub", path=place, held_out=0.0)
    stream = load("hub", path=place, streaming=True)
    with pytest.raises(DataError, match="row 7"):
        next(stream.batches(12))
    with pytest.raises(DataError, match="how many rows it has is not known"):
        len(stream)


def test_a_stream_of_unnamed_classes_needs_their_number(make_parquet):
    place = str(make_parquet(rows(range(12))))
    with pytest.raises(DataError, match=r"give data.num_classes"):
        load("hub", path=place, streaming=True)
    x, label = next(load("hub", path=place, streaming=True, num_classes=3).batches(12))
    assert label.tolist() == [number % 3 for number in numbers(x)]
    with pytest.raises(DataError, match="out of range for 2 classes"):
        next(load("hub", path=place, streaming=True, num_classes=2).batches(12))
    limited = load("hub", path=place, streaming=True, label=None, limit=5)
    x, label = next(limited.batches(5))
    assert (sorted(numbers(x)), label) == ([0, 1, 2, 3, 4], None)


def test_a_stream_in_shards_visits_each_row_once(make_parquet):
    names = ["a", "b", "c"]
    make_parquet(rows(range(8)), "train-00000-of-00003.parquet", names=names)
    make_parquet(rows(range(8, 20)), "train-00001-of-00003.parquet", names=names)
    place = str(make_parquet(rows(range(20, 25)), "train-00002-of-00003.parquet", names=names))
    stream = load("hub", path=place, streaming=True, buffer=6)
    assert len(stream.shards) == 3
    orders = []
    for epoch in range(4):
        x, label = next(stream.batches(25, epoch, seed=1))
        assert sorted(numbers(x)) == list(range(25))
        assert label.tolist() == [number % 3 for number in numbers(x)]
        orders.append(numbers(x))
    # Shards come in another order each epoch: first rows from more than one of them.
    assert len({(order[0] >= 8) + (order[0] >= 20) for order in orders}) > 1


def test_a_stream_cannot_number_classes_it_has_not_seen(make_parquet):
    place = str(make_parquet([(encode(picture(k)), "cat" if k % 2 else "dog") for k in range(6)]))
    with pytest.raises(DataError, match=r"labels of .* are of type 'string'"):
        load("hub", path=place, streaming=True, num_classes=2)
    assert load("hub", path=place, held_out=0.0).class_names == ["cat", "dog"]


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(DataError, match="'nobody/nothing' cannot be read"):
        load("nobody/nothing")
    with pytest.raises(ArgumentError, match=r"data.path, a name"):
        load("hub")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"undiffuse\[data\]"):
        load("nobody/nothing")
