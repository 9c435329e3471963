"""Streams: the content of a loaded data set, in an order that depends on (seed, epoch) alone."""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from data.pictures import encode, numbers, picture
from undiffuse.core.errors import DataError
from undiffuse.data import Loader, load, records

N = 37


def rows(bad=()):
    return [(b"broken" if k in bad else encode(picture(k)), k % 3) for k in range(N)]


@pytest.fixture(params=["parquet", "folder", "hub"])
def place(request, make_parquet, make_folder):
    """Options of `load` for the same 37 pictures in three kinds of place; labels k mod 3."""
    if request.param == "folder":
        files = {f"{k % 3}/{k:02}.png": encode(picture(k)) for k in range(N)}
        return {"source": "folder", "path": str(make_folder(files)), "held_out": 0.0}
    parquet = make_parquet(rows(), names=["0", "1", "2"])
    if request.param == "parquet":
        return {"source": "parquet", "path": str(parquet), "held_out": 0.0}
    pytest.importorskip("datasets")
    return {"source": "hub", "path": str(parquet), "held_out": 0.0}


def taken(dataset, batch, steps, start=0, **options):
    """Batches `start` ... of a stream."""
    return list(itertools.islice(dataset.batches(batch, start, **options), steps))


def test_a_stream_holds_what_the_loaded_data_hold(place):
    stream, loaded = load(**place, streaming=True, buffer=10), load(**place)
    assert (stream.shape, stream.num_classes, stream.class_names) == (loaded.shape, 3, loaded.class_names)
    kept, _ = loaded.batch(torch.arange(N))
    where = {number: row for row, number in enumerate(numbers(kept))}
    for epoch in range(3):
        x, label = taken(stream, N, 1, epoch, seed=4)[0]
        order = numbers(x)
        assert sorted(order) == list(range(N))
        assert order != sorted(order)
        assert torch.equal(x, kept[[where[number] for number in order]])
        assert label.tolist() == [number % 3 for number in order]


def test_order_is_a_function_of_seed_and_step(place):
    def fresh():
        return load(**place, streaming=True, buffer=10)

    whole = [numbers(x) for x, _ in taken(fresh(), 7, 20, seed=1)]
    for start in (1, 5, 6, 13):
        assert [numbers(x) for x, _ in taken(fresh(), 7, 20 - start, start, seed=1)] == whole[start:]
    assert numbers(taken(fresh(), 7, 1, seed=2)[0][0]) != whole[0]
    flat = list(itertools.chain.from_iterable(whole))
    epochs = [flat[k * N : (k + 1) * N] for k in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one_process(place, world):
    def loader(rank, size):
        return Loader(load(**place, streaming=True, buffer=10), 8, seed=3, rank=rank, world=size, flip=True)

    one, many = loader(0, 1), [loader(rank, world) for rank in range(world)]
    for step in range(6):
        joined = torch.cat([each.batch(step)[0] for each in many])
        assert torch.equal(joined, one.batch(step)[0])


def test_the_loader_reads_on_and_goes_back(place):
    loader = Loader(load(**place, streaming=True, buffer=10), 5, seed=3)
    forward = [numbers(loader.batch(step)[0]) for step in range(10)]
    assert [numbers(loader.batch(step)[0]) for step in (4, 5, 2, 9)] == [forward[k] for k in (4, 5, 2, 9)]
    assert [numbers(x) for x, _ in loader.prefetch(3, 8)] == forward[3:8]


def test_rows_that_cannot_be_read_stop_the_stream_with_their_name(make_parquet):
    stream = load(str(make_parquet(rows(bad=[11]))), streaming=True, held_out=0.0)
    with pytest.raises(DataError, match=r"row 11 \(train-00000-of-00001.parquet, its row 11\)"):
        taken(stream, N, 1)
    ahead = Loader(stream, N).prefetch(0)
    with pytest.raises(DataError, match="row 11"):
        next(ahead)


def test_skipping_fills_the_place_with_the_next_row_for_any_number_of_processes(make_parquet):
    bad = [0, 11, 12, 13, 36]

    def fresh():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(str(make_parquet(rows(bad))), streaming=True, held_out=0.0, on_error="skip", buffer=8)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stream = load(str(make_parquet(rows(bad))), streaming=True, held_out=0.0, on_error="skip", buffer=8)
        whole = taken(stream, 6, 20)
    assert ["left out of the stream" in str(one.message) for one in warned] == [True]
    assert sorted(one.row for one in stream.skipped) == bad
    assert len(stream.summary()["skipped"]) == 5
    for x, label in whole:
        assert label.tolist() == [number % 3 for number in numbers(x)]
    flat = [number for x, _ in whole for number in numbers(x)]
    counts = Counter(flat[:N])
    assert set(counts) == set(range(N)) - set(bad)
    assert sum(counts.values()) == N
    assert flat == [n for x, _ in taken(fresh(), 6, 7) + taken(fresh(), 6, 13, 7) for n in numbers(x)]
    halves = [taken(fresh(), 6, 20, rank=rank, world=2) for rank in range(2)]
    assert flat == [n for step in range(20) for half in halves for n in numbers(half[step][0])]


def test_nothing_readable_ends_with_an_error(make_parquet):
    place = str(make_parquet([(b"broken", 0)] * 9))
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match="none of the first 9 rows can be read"),
    ):
        load(place, streaming=True, held_out=0.0, on_error="skip")
    one = str(make_parquet([(encode(picture(1)), 0)] + [(b"broken", 0)] * 30))
    stream = load(one, streaming=True, held_out=0.0, on_error="skip", buffer=4)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"4 rows of .* in a row cannot be read"),
    ):
        taken(stream, 2, 30)


def test_another_size_in_the_stream_is_named(make_folder):
    files = {f"{k}.png": encode(picture(k)) for k in range(9)} | {"5.png": encode(np.zeros((4, 8), np.uint8))}
    place = str(make_folder(files))
    with pytest.raises(
        DataError, match=r"row 5 \(5.png\) of photos has shape \(1, 4, 8\).*\(1, 6, 6\): give data.size"
    ):
        taken(load(place, streaming=True, held_out=0.0), 9, 1)
    assert taken(load(place, streaming=True, held_out=0.0, size=6), 9, 1)[0][0].shape == (9, 1, 6, 6)


def test_splits_and_limits_are_those_of_the_loaded_data(make_folder, make_parquet):
    folder = str(make_folder({f"{k:02}.png": encode(picture(k)) for k in range(N)}))
    for path in (folder, str(make_parquet(rows()))):
        for options in ({"held_out": 0.3}, {"held_out": 0.3, "limit": 9}, {"split": "held-out", "held_out": 0.3}):
            loaded, stream = load(path, **options), load(path, streaming=True, **options)
            assert stream.n == len(stream) == len(loaded)
            assert sorted(numbers(taken(stream, stream.n, 1)[0][0])) == numbers(
                loaded.batch(torch.arange(len(loaded)))[0]
            )


def test_a_stream_reads_each_row_group_about_once(make_parquet, monkeypatch):
    from undiffuse.data.parquet import RowGroups

    loads = Counter()
    load_group = RowGroups._load
    monkeypatch.setattr(RowGroups, "_load", lambda self, group: loads.update([group]) or load_group(self, group))
    stream = load(str(make_parquet(rows())), streaming=True, held_out=0.0, buffer=10)
    taken(stream, N, 1)
    assert len(loads) == 8
    assert max(loads.values()) <= 2
    loads.clear()
    taken(stream, 1, 1, start=10 * N + 5)
    assert sum(loads.values()) <= 1


def test_threads_change_nothing(make_folder, monkeypatch):
    place = str(make_folder({f"{k:02}.png": encode(picture(k)) for k in range(N)}))
    at_once = taken(load(place, streaming=True, held_out=0.0), 8, 5)
    monkeypatch.setattr(records, "SMALL", 0)
    in_threads = load(place, streaming=True, held_out=0.0)
    assert in_threads._crew.threads > 1
    assert all(torch.equal(a[0], b[0]) for a, b in zip(at_once, taken(in_threads, 8, 5)))
