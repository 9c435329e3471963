"""Batches are a pure function of (seed, step)."""

import itertools
import threading

import pytest
import torch

from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.data import ArrayDataset, Labels, Loader


def counted(n: int) -> ArrayDataset:
    """Row k holds the number k, and so does its label."""
    index = torch.arange(n)
    return ArrayDataset(index.float()[:, None], Labels(index, None, n))


def images(n: int) -> ArrayDataset:
    """Distinct images without mirror symmetry."""
    return ArrayDataset(torch.rand((n, 3, 4, 5), generator=torch.Generator().manual_seed(0)))


def test_each_epoch_visits_each_row_once_in_an_order_of_its_own():
    n, batch = 23, 7
    loader = Loader(counted(n), batch, seed=3)
    seen = torch.cat([loader.batch(step)[0][:, 0] for step in range(3 * n)]).long()
    epochs = seen[: 21 * n].reshape(21, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 21
    # Were some rows placed rather than shuffled, their mean place over the epochs would stand out.
    first = [int(epoch[0]) for epoch in epochs]
    assert len(set(first)) > 10


def test_a_batch_larger_than_the_data_still_visits_all_equally():
    x, _ = Loader(counted(5), 35, seed=0).batch(2)
    assert torch.bincount(x[:, 0].long()).tolist() == [7] * 5


def test_order_does_not_depend_on_what_was_asked_before():
    dataset = counted(50)
    whole = [Loader(dataset, 8, seed=1).batch(step)[0] for step in range(40)]
    resumed = Loader(dataset, 8, seed=1)
    for step in (39, 0, 17, 3, 38, 17):
        assert torch.equal(resumed.batch(step)[0], whole[step])
    assert not torch.equal(Loader(dataset, 8, seed=2).batch(0)[0], whole[0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one_process(world):
    options = {"seed": 5, "flip": True, "change": lambda x, streams: x + streams.uniform(x.shape)}
    one = Loader(images(30), 8, **options)
    many = [Loader(images(30), 8, rank=rank, world=world, **options) for rank in range(world)]
    for step in range(12):
        joined = torch.cat([loader.batch(step)[0] for loader in many])
        assert torch.equal(joined, one.batch(step)[0])


def test_flip_is_an_exact_mirror_of_half_of_the_rows():
    plain, flipped = Loader(images(64), 64, seed=9), Loader(images(64), 64, seed=9, flip=True)
    mirrored, steps = 0, 40
    patterns = set()
    for step in range(steps):
        before, after = plain.batch(step)[0], flipped.batch(step)[0]
        same = (after == before).flatten(1).all(dim=1)
        mirror = (after == before.flip(-1)).flatten(1).all(dim=1)
        assert (same ^ mirror).all()
        mirrored += int(mirror.sum())
        patterns.add(tuple(mirror.tolist()))
    # Binomial(2560, 1/2): five standard deviations are 127.
    assert abs(mirrored - 32 * steps) < 127
    assert len(patterns) == steps


def test_labels_stay_with_their_rows():
    for x, label in Loader(counted(13), 4, seed=0).prefetch(0, 20):
        assert torch.equal(x[:, 0].long(), label)


def test_prefetch_is_batch_in_order_and_ends():
    loader = Loader(counted(31), 6, seed=4)
    ahead = list(loader.prefetch(5, 25, depth=3))
    assert len(ahead) == 20
    assert all(torch.equal(x, loader.batch(5 + k)[0]) for k, (x, _) in enumerate(ahead))
    assert list(loader.prefetch(7, 7)) == []


def test_leaving_prefetch_ends_its_thread():
    before = threading.active_count()
    endless = Loader(counted(31), 6).prefetch(0)
    assert len(list(itertools.islice(endless, 3))) == 3
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before


class Breaking(ArrayDataset):
    """Fails on the fourth batch."""

    calls = 0

    def batch(self, indices):
        self.calls += 1
        if self.calls == 4:
            raise DataError("row 7 is gone")
        return super().batch(indices)


def test_an_error_in_the_thread_is_raised_at_its_step():
    ahead = Loader(Breaking(torch.rand(9, 2)), 3).prefetch(0)
    assert len(list(itertools.islice(ahead, 3))) == 3
    with pytest.raises(DataError, match="row 7 is gone"):
        next(ahead)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 10, "world": 4}, "multiple of 4, for example 12"),
        ({"batch_size": 0}, "batch is 0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2 of 2"),
        ({"batch_size": 4, "flip": True}, "flip=True needs images"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    with pytest.raises(ArgumentError, match=says):
        Loader(counted(8), **options)


def test_negative_steps_are_refused():
    with pytest.raises(ArgumentError, match="step is -1"):
        Loader(counted(8), 4).batch(-1)
