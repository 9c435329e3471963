"""`edit`: what is known of a picture is in the result, bit for bit where the file can hold it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse as ud
from recipes.tiny import image_folder, overrides, pixels, png
from undiffuse.cli.pictures import inpainting, nearest_within
from undiffuse.inference import ChannelMix


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory) -> ud.Run:
    place = tmp_path_factory.mktemp("colour")
    data = [f"data.path={image_folder(place / 'images')}", "data.size=16"]
    return ud.train(ud.load_recipe("folder", overrides("folder", data)), place / "run")


def saved(file, shape, seed=0):
    file.write_bytes(png(pixels(seed, shape)))
    return pixels(seed, shape)


def read(file):
    return np.asarray(Image.open(file)).astype(int)


FEW = ["--steps", 4, "--n", 2, "--seed", 5, "--out", "out", "--json", "--label", 1]


def test_inpainting_keeps_what_the_mask_keeps(image_run, command, tmp_path):
    given = saved(tmp_path / "a.png", (8, 8))
    saved(tmp_path / "b.png", (8, 8), seed=1)
    done = command("edit", image_run.folder, "inpaint", "a.png", "b.png", "--box", "2,1,6,4", *FEW)
    assert done.exit_code == 0, done.stderr
    found = done.json()
    assert (found["solver"]["name"], found["steps"], found["task"]) == ("ddpm", 4, "inpaint")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "overview.png", "a-5.png", "a-6.png", "b-5.png", "b-6.png",
    }  # fmt: skip
    hole = np.zeros((8, 8), bool)
    hole[1:4, 2:6] = True
    first, second = read("out/a-5.png"), read("out/a-6.png")
    assert np.array_equal(first[~hole], given[~hole])
    assert not np.array_equal(first[hole], given[hole])
    assert not np.array_equal(first[hole], second[hole])
    # Alone, in batches of one, and with the same hole as a mask: the same but for rounding.
    (tmp_path / "mask.png").write_bytes(png(np.where(hole, 0, 255).astype(np.uint8)))
    alone = ["--steps", 4, "--n", 1, "--seed", 6, "--out", "alone", "--batch-size", 1, "--label", 1]
    assert command("edit", image_run.folder, "inpaint", "a.png", "--mask", "mask.png", *alone).exit_code == 0
    assert np.abs(read("alone/a-6.png") - second).max() <= 1


def test_super_resolution_keeps_the_means_of_blocks(image_run, command, tmp_path):
    given = saved(tmp_path / "small.png", (4, 4))
    done = command("edit", image_run.folder, "super-resolve", "small.png", *FEW)
    assert done.exit_code == 0, done.stderr
    overview = read("out/overview.png")
    scale = 64 // 8
    assert np.array_equal(overview[: 8 * scale : 2 * scale, : 8 * scale : 2 * scale], given)
    got = read("out/small-5.png")
    assert np.ptp(got) == 255  # some values were cut off,
    assert np.abs(got.reshape(4, 2, 4, 2).mean((1, 3)) - given).max() <= 0.5 + 1e-6  # and the means are kept


def test_colourisation_keeps_the_mean_of_the_channels(colour_run, command, tmp_path):
    given = saved(tmp_path / "grey.png", (16, 16))  # from black to white: colours are cut off
    done = command("edit", colour_run.folder, "colourise", "grey.png", *FEW, "--resample", 2, "--solver", "heun")
    assert done.exit_code == 0, done.stderr
    got = read("out/grey-5.png")
    assert ((got == 0) | (got == 255)).any(2).mean() > 0.1
    assert np.abs(got.mean(2) - given).max() <= 0.5 + 1e-6
    assert np.ptp(got, axis=2).max() > 20  # there is colour


def test_the_nearest_picture_with_given_means():
    """Against the projection in closed form: of (2, 0.5, 0) on a mean of 0.7, and of one that is inside."""
    mix = ChannelMix((1 / 3, 1 / 3, 1 / 3))
    x = torch.tensor([[2.0, 0.5, 0.0], [0.4, 0.2, 0.0]]).reshape(2, 3, 1, 1)
    got = nearest_within(x, torch.tensor([0.7, 0.2]).reshape(2, 1, 1, 1), mix.mixed, mix.lifted)
    wanted = torch.tensor([[1.0, 0.8, 0.3], [0.4, 0.2, 0.0]], dtype=torch.float64)
    assert torch.allclose(got[..., 0, 0], wanted, atol=1e-7)


def test_what_is_clear_in_a_mask_is_black(tmp_path):
    saved(tmp_path / "a.png", (8, 8))
    mask = np.full((8, 8, 4), 255, np.uint8)
    mask[:, :3, 3] = 0  # clear white
    mask[:, 3:5, :3] = 0  # opaque black
    Image.fromarray(mask, "RGBA").save(tmp_path / "mask.png")
    kept = inpainting([tmp_path / "a.png"], (1, 8, 8), tmp_path / "mask.png", None).more[0]
    assert kept[0, 0].tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["inpant", "a.png", "--box", "0,0,4,4"], 2, "Did you mean 'inpaint'"),
        (["inpaint", "a.png"], 2, "needs either --mask"),
        (["inpaint", "a.png", "--box", "1,2,3"], 2, "expected x0,y0,x1,y1"),
        (["inpaint", "a.png", "--box", "0,0,9,4"], 2, "x1 <= 8"),
        (["inpaint", "a.png", "--box", "0,0,8,8"], 2, "mask is empty"),
        (["inpaint", "a.png", "--mask", "small.png"], 3, "the model makes 8 x 8"),
        (["inpaint", "small.png", "--box", "0,0,4,4"], 3, "small.png has 4 x 4 pixels: the model makes 8 x 8"),
        (["inpaint", "none.png", "--box", "0,0,4,4"], 3, "none.png: No such file"),
        (["inpaint", "text.png", "--box", "0,0,4,4"], 3, "text.png cannot be read as a picture"),
        (["inpaint", "a.png", "sub/a.png", "--box", "0,0,4,4"], 2, "two pictures are called a"),
        (["colourise", "a.png"], 2, "has 1 channels"),
        (["super-resolve", "a.png"], 3, "a whole number of times, at least 2"),
        (["super-resolve", "small.png", "--box", "0,0,1,1"], 2, "belong to inpaint"),
        (["super-resolve", "small.png", "--n", 0], 2, "at least 1"),
        (["super-resolve", "small.png", "--resample", 0], 2, "resample is 0"),
        (["super-resolve", "small.png", "--out", "x.png"], 2, "expected a folder"),
        (["inpaint", "x-0.png", "--out", ".", "--mask", "overview.png"], 2, "written over overview.png"),
        (["inpaint", "x-3.png", "x.png", "--out", ".", "--box", "0,0,4,4"], 2, "written over x-3.png"),
        (["super-resolve", "small.png", "--solver", "langevin"], 2, "langevin"),
        (["super-resolve", "small.png", "--label", 10], 2, "label 10"),
    ],
)
def test_wrong_words_are_explained(image_run, command, tmp_path, words, code, says):
    saved(tmp_path / "a.png", (8, 8))
    saved(tmp_path / "small.png", (4, 4))
    (tmp_path / "text.png").write_text("no picture")
    label = [] if "--label" in words else ["--label", 1]
    done = command("edit", image_run.folder, *words, *label)
    assert done.exit_code == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_never_saw_data_without_a_class_is_told_one(image_run, command, tmp_path):
    saved(tmp_path / "a.png", (8, 8))
    done = command("edit", image_run.folder, "inpaint", "a.png", "--box", "0,0,4,4")
    assert done.exit_code == 2
    assert "give --label 0 ... 9" in done.stderr


def test_points_are_no_pictures(plane_run, command, tmp_path):
    saved(tmp_path / "a.png", (8, 8))
    done = command("edit", plane_run.folder, "inpaint", "a.png", "--box", "0,0,4,4", "--label", 0)
    assert done.exit_code == 2
    assert "are no pictures" in done.stderr


def test_a_solver_of_all_steps_at_once_is_refused_before_anything_is_done(image_run, command, tmp_path):
    """Nothing can be imposed between its steps; the reason, and what to take."""
    folder = tmp_path / "run"
    shutil.copytree(image_run.folder, folder)
    saved(tmp_path / "a.png", (8, 8))
    made = command("tune", folder, "--calls", 3, "--n", 32, "--most-steps", 1, "--reference", 20)
    assert made.exit_code == 0, made.stderr
    for solver, name in (("picard", "Picard"), ("tuned-3", "Tuned")):
        words = ["--box", "2,1,6,4", "--label", 1, "--out", "out", "--solver", solver]
        done = command("edit", folder, "inpaint", "a.png", *words)
        assert done.exit_code == 2
        assert f"solver {name}: it makes all steps at once" in done.stderr
        assert "ddpm" in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()
