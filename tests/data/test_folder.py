"""Image folders: layouts, splits, and what is wrong with them."""

import warnings

import numpy as np
import pytest
import torch

from data.pictures import encode, numbers, picture
from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.data import Loader, lazy, load, records

GOOD = {f"{name}/{k:03}.png": encode(picture(k + 50 * c)) for c, name in enumerate(["ant", "bee"]) for k in range(40)}


def every(dataset):
    """All rows of a data set."""
    return dataset.batch(torch.arange(len(dataset)))


def test_class_folders_become_labels_by_name(make_folder):
    dataset = load("folder", path=str(make_folder(GOOD)), held_out=0.0)
    x, label = every(dataset)
    assert dataset.class_names == ["ant", "bee"]
    assert numbers(x) == [*range(40), *range(50, 90)]
    assert torch.equal(label, torch.tensor([0] * 40 + [1] * 40))
    assert (((x[3, 0] + 1) * 127.5).round().numpy() == picture(3)).all()
    assert dataset.summary()["classes"] == {"ant": 40, "bee": 40}


def test_train_and_held_out_are_a_partition_that_files_keep(make_folder):
    place = str(make_folder(GOOD))
    parts = {split: set(numbers(every(load(place, split, held_out=0.3))[0])) for split in ("train", "held-out")}
    assert parts["train"] | parts["held-out"] == {*range(40), *range(50, 90)}
    assert not parts["train"] & parts["held-out"]
    assert 10 < len(parts["held-out"]) < 40
    make_folder({f"ant/{k}-new.png": encode(picture(k)) for k in range(100, 130)})
    later = set(numbers(every(load(place, "held-out", held_out=0.3))[0]))
    assert later & (parts["train"] | parts["held-out"]) == parts["held-out"]


def test_split_folders_are_used_and_share_their_classes(make_folder):
    place = make_folder({"train/bee/1.png": encode(picture(1)), "train/cow/2.png": encode(picture(2)),
                         "test/ant/3.png": encode(picture(3)), "test/cow/4.png": encode(picture(4))})  # fmt: skip
    train, test = load(str(place)), load(str(place), "held-out")
    assert train.class_names == test.class_names == ["ant", "bee", "cow"]
    assert every(train)[1].tolist() == [1, 2]
    assert every(test)[1].tolist() == [0, 2]
    assert numbers(every(load(str(place), "test"))[0]) == [3, 4]
    with pytest.raises(ArgumentError, match="Known: test, train"):
        load(str(place), "trial")


def test_flat_and_unlabelled_folders_have_no_labels(make_folder):
    flat = load(str(make_folder({f"{k}.png": encode(picture(k)) for k in range(9)}, "flat")), held_out=0.0)
    assert (flat.num_classes, every(flat)[1]) == (None, None)
    unlabelled = load(str(make_folder(GOOD)), held_out=0.0, label=None)
    assert len(unlabelled) == 80
    assert (unlabelled.num_classes, every(unlabelled)[1]) == (None, None)


def test_an_unreadable_image_is_named_with_its_row_before_anything_starts(make_folder):
    place = make_folder(GOOD | {"ant/007.png": b"\x89PNG broken", "bee/001.png": encode(picture(1))[:60]})
    with pytest.raises(DataError) as caught:
        load(str(place), held_out=0.0)
    message = str(caught.value)
    assert "2 row(s)" in message
    assert "row 7 (ant/007.png)" in message
    assert "row 41 (bee/001.png)" in message
    assert "data.on_error=skip" in message


def test_skip_leaves_them_out_and_keeps_labels_aligned(make_folder):
    place = make_folder(GOOD | {"ant/007.png": b"broken", "bee/001.png": b""})
    with pytest.warns(UserWarning, match="2 of 80 rows") as warned:
        dataset = load(str(place), held_out=0.0, on_error="skip")
    assert len(warned) == 1
    assert [(one.row, one.where) for one in dataset.skipped] == [
        (7, "row 7 (ant/007.png)"),
        (41, "row 41 (bee/001.png)"),
    ]
    x, label = every(dataset)
    assert numbers(x) == [k for k in [*range(40), *range(50, 90)] if k not in (7, 51)]
    assert torch.equal(label, torch.tensor([int(k >= 50) for k in numbers(x)]))
    assert len(dataset.summary()["skipped"]) == 2


def test_nothing_readable_is_an_error_even_when_skipping(make_folder):
    place = make_folder({"a.png": b"x", "b.png": b"y"})
    with pytest.raises(DataError, match="none of the 2 rows"):
        load(str(place), held_out=0.0, on_error="skip")


def test_mixed_sizes_and_channels_are_listed_with_an_example(make_folder):
    odd = make_folder(GOOD | {"ant/007.png": encode(picture(7, size=9))})
    with pytest.raises(DataError) as caught:
        load(str(odd), held_out=0.0)
    message = str(caught.value)
    assert "mixed sizes" in message
    assert "9 x 9" in message
    assert "1 images, such as row 7 (ant/007.png)" in message
    assert "79 images" in message
    assert "data.size=" in message
    assert load(str(odd), held_out=0.0, size=4).shape == (1, 4, 4)
    coloured = make_folder(GOOD | {"ant/007.png": encode(picture(7, channels=3))}, "coloured")
    with pytest.raises(DataError, match=r"mixed channels(.|\n)*data.channels=1, 3 or 4"):
        load(str(coloured), held_out=0.0)
    assert load(str(coloured), held_out=0.0, channels=3).shape == (3, 6, 6)


def test_folders_without_images_say_what_is_there(make_folder, tmp_path):
    with pytest.raises(DataError, match=r"2 file\(s\) .heic, 1 file\(s\) no suffix"):
        load("folder", path=str(make_folder({"a.heic": b"", "b.HEIC": b"", "notes": b""})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing"):
        load(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no file or folder .*phtos'. Did you mean 'photos'"):
        load("folder", path=str(tmp_path / "phtos"))
    with pytest.raises(DataError, match="no file or folder"):
        load(str(tmp_path / "phtos"))
    with pytest.raises(DataError, match=r"beside its class folders, such as 'stray.png'"):
        load(str(make_folder(GOOD | {"stray.png": encode(picture(1))}, "mixed")))
    with pytest.raises(DataError, match="held-out split is empty"):
        load(str(make_folder({"a.png": encode(picture(1))}, "single")), "held-out", held_out=0.001)


def test_hidden_files_are_passed_over_and_links_followed(make_folder):
    place = make_folder({"ant/1.png": encode(picture(1)), ".cache/2.png": b"junk", "ant/.3.png": b"junk"})
    outside = make_folder({"4.png": encode(picture(4))}, "elsewhere")
    (place / "bee").symlink_to(outside)
    (place / "loop").mkdir()
    (place / "loop" / "again").symlink_to(place)
    dataset = load(str(place), held_out=0.0)
    assert numbers(every(dataset)[0]) == [1, 4]
    assert dataset.class_names == ["ant", "bee"]


def test_progress_counts_up_to_the_whole(make_folder):
    calls = []
    load(str(make_folder(GOOD)), held_out=0.0, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(64, 80), (80, 80)]


@pytest.mark.parametrize("small", [0, 10**9], ids=["in threads", "at once"])
def test_too_many_to_keep_decoded_are_the_same_images(make_folder, monkeypatch, small):
    place = str(make_folder(GOOD | {"ant/007.png": b"broken"}))
    options = {"held_out": 0.2, "on_error": "skip", "size": 5, "limit": 50}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = load(place, **options)
        monkeypatch.setattr(records, "MEMORY_LIMIT", 100)
        monkeypatch.setattr(records, "SMALL", small)
        on_the_way = load(place, **options)
    assert isinstance(on_the_way, lazy.LazyImages)
    assert on_the_way.fingerprint == kept.fingerprint
    assert on_the_way.summary() == kept.summary()
    for step in range(9):
        pairs = [Loader(one, 11, seed=2, flip=True).batch(step) for one in (kept, on_the_way)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs))


def test_a_file_that_changes_after_it_was_verified_is_named(make_folder, monkeypatch):
    monkeypatch.setattr(records, "MEMORY_LIMIT", 100)
    place = make_folder(GOOD)
    dataset = load(str(place), held_out=0.0)
    (place / "ant" / "005.png").write_bytes(b"gone")
    (place / "ant" / "006.png").write_bytes(encode(np.zeros((3, 3), np.uint8)))
    assert dataset.batch(torch.tensor([4]))[0].shape == (1, 1, 6, 6)
    for row in (5, 6):
        with pytest.raises(DataError, match=rf"row {row} \(ant/00{row}.png\) has changed"):
            dataset.batch(torch.tensor([row]))


def test_fingerprints_follow_the_content_and_not_the_place(make_folder):
    first = load(str(make_folder(GOOD, "one")))
    assert load(str(make_folder(GOOD, "two"))).fingerprint == first.fingerprint
    changed = [
        load(str(make_folder(GOOD | {"ant/002.png": encode(picture(99))}, "three"))),
        load(str(make_folder(GOOD, "two")), "held-out"),
        load(str(make_folder(GOOD, "two")), size=5),
        load(str(make_folder(GOOD, "two")), label=None),
    ]
    assert len({first.fingerprint, *(one.fingerprint for one in changed)}) == 5
