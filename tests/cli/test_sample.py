"""`sample`: every seed is a sample of its own, whoever draws it, with whom, and however often it was interrupted."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import undiffuse as ud
from cli.conftest import npz
from undiffuse.cli.options import parse_seeds, write_seeds
from undiffuse.core.errors import ArgumentError
from undiffuse.report.pictures import to_bytes

# A churning solver draws noise in every step: what is claimed of seeds is claimed of those draws too.
CHURN = ["--solver", "edm:S_churn=5", "--steps", 4]


def images(folder):
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_seed_17_alone_is_row_17_of_many(image_run, command, batch):
    for words in (["--seeds", "0-63", "--batch-size", batch, "--out", "many"], ["--seeds", 17, "--out", "one"]):
        assert command("sample", image_run.folder, *words, *CHURN, "--format", "npz").exit_code == 0
    many, one = npz(ud_path("many")), npz(ud_path("one"))
    assert list(many["seeds"]) == list(range(64))
    assert list(many["labels"]) == [s % 10 for s in range(64)]
    assert one["labels"] == [7]
    assert np.abs(many["samples"][17] - one["samples"][0]).max() <= 1e-4
    # and is it the seed that decides, not the place?
    assert np.abs(many["samples"][18] - one["samples"][0]).max() > 0.1


def ud_path(name):
    from pathlib import Path

    return Path.cwd() / name


def test_the_noise_of_a_seed_is_bit_identical(image_run, monkeypatch):
    """Every draw of the solver, caught on its way: seed 17 alone, and as one of 64 in batches of 7."""
    from undiffuse.cli.drawing import How, Model
    from undiffuse.core.random import Streams

    model = Model.load(image_run, How(solver="edm:S_churn=5", steps=4, batch=7, device="cpu"))
    drawn: list[torch.Tensor] = []
    original = Streams.normal

    def spy(self, *args, **options):
        drawn.append(original(self, *args, **options))
        return drawn[-1]

    monkeypatch.setattr(Streams, "normal", spy)
    model.sampler([17])
    alone = [noise[0].clone() for noise in drawn]
    drawn.clear()
    model.sampler(list(range(64)))
    per_batch = len(alone)
    assert per_batch >= 3  # the start, and churn in more than one step
    third = drawn[2 * per_batch : 3 * per_batch]  # seeds 14 ... 20
    assert all(torch.equal(a, b[3]) for a, b in zip(alone, third))


def test_what_the_command_draws_is_what_the_library_draws(image_run, command):
    assert command("sample", image_run.folder, "--seeds", "3,8-10", "--format", "npz", "--out", "out").exit_code == 0
    section = image_run.recipe.settings.sampling
    expected = ud.sample(
        image_run.denoiser(),
        (4, 1, 8, 8),
        seed=[3, 8, 9, 10],
        cond=torch.tensor([3, 8, 9, 0]),
        solver=section.solver["name"],
        steps=section.steps,
        grid=section.grid,
    )
    assert np.abs(npz(ud_path("out"))["samples"] - expected.numpy()).max() <= 1e-4


def test_labels(image_run, plane_run, command):
    for label in (3, -1):
        out = f"label{label}"
        done = command("sample", image_run.folder, "--seeds", "0-4", "--label", label, "--format", "npz", "--out", out)
        assert done.exit_code == 0
        assert set(npz(ud_path(out))["labels"]) == {label}
    assert np.abs(npz(ud_path("label3"))["samples"] - npz(ud_path("label-1"))["samples"]).max() > 1e-3
    for run, label in ((image_run, 10), (image_run, -2)):
        done = command("sample", run.folder, "--label", label)
        assert done.exit_code == 2
        assert "0 ... 9" in done.stderr


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_png_folder_is_resumable_and_equal(image_run, command, batch):
    words = ["sample", image_run.folder, "--seeds", "5-24", "--format", "png", "--batch-size", batch, *CHURN]
    assert command(*words, "--out", "whole").exit_code == 0
    whole = images(ud_path("whole"))
    assert list(whole) == [f"{s:06d}.png" for s in range(5, 25)]
    assert {(image.shape, image.dtype.name) for image in whole.values()} == {((8, 8), "uint8")}
    shutil.copytree(ud_path("whole"), ud_path("part"))
    gone, cut, other = (ud_path("part") / f"{s:06d}.png" for s in (7, 12, 20))
    kept = (ud_path("part") / "000009.png").stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:40])
    Image.new("L", (4, 4)).save(other)
    again = command(*words, "--out", "part", "--json")
    assert again.exit_code == 0
    assert again.json()["new"] == 3
    assert (ud_path("part") / "000009.png").stat().st_mtime_ns == kept
    part = images(ud_path("part"))
    assert all(np.abs(part[name].astype(int) - whole[name]).max() <= 1 for name in whole)
    assert not list(ud_path("part").glob(".*.tmp"))


def test_pngs_are_the_samples_rounded(image_run, command):
    for kind in ("png", "npz"):
        assert command("sample", image_run.folder, "--seeds", "0-3", "--format", kind, "--out", kind).exit_code == 0
    expected = to_bytes(torch.from_numpy(npz(ud_path("npz"))["samples"]))
    found = np.stack(list(images(ud_path("png")).values()))
    assert np.array_equal(found, expected[:, 0])


def test_shards_are_kept_checked_and_merged(image_run, command, monkeypatch):
    """Half the shards there, one of them spoilt: only what is missing is drawn, and the whole is the same."""
    monkeypatch.setattr("undiffuse.cli.shards.NpzShards.rows", 4)
    words = ["sample", image_run.folder, "--seeds", "0-21", "--format", "npz", "--batch-size", 4]
    assert command(*words, "--out", "whole").exit_code == 0
    assert {file.name for file in ud_path("whole").iterdir()} == {"sampling.json", "samples.npz"}

    import undiffuse.cli.drawing as drawing

    original, calls = drawing.NpzShards.write, []

    def stop_at_third(self, index, *rest):
        if index == 3:
            raise KeyboardInterrupt
        calls.append(index)
        original(self, index, *rest)

    monkeypatch.setattr(drawing.NpzShards, "write", stop_at_third)
    stopped = command(*words, "--out", "part")
    assert stopped.exit_code == 130
    assert calls == [0, 1, 2]
    spoilt = ud_path("part") / "shard-0001.npz"
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 255
    spoilt.write_bytes(content)
    calls.clear()
    monkeypatch.setattr(
        drawing.NpzShards, "write", lambda self, index, *rest: (calls.append(index), original(self, index, *rest))
    )
    again = command(*words, "--out", "part", "--json")
    assert again.exit_code == 0, again.stderr
    assert calls == [1, 3, 4, 5]
    assert again.json()["new"] == 4 + 4 + 4 + 2
    whole, part = npz(ud_path("whole")), npz(ud_path("part"))
    assert set(whole) == {"samples", "seeds", "labels"}
    for name in whole:
        assert whole[name].dtype == part[name].dtype
        assert np.array_equal(whole[name], part[name])
    calls.clear()
    assert command(*words, "--out", "part", "--json").json()["new"] == 0
    assert calls == []


def test_killed_half_way_then_finished_equals_uninterrupted(image_run, process, tmp_path):
    words = [
        "sample",
        image_run.folder,
        "--seeds",
        "0-39",
        "--format",
        "png",
        "--batch-size",
        1,
        "--steps",
        8,
        "--quiet",
    ]
    job = process(*words, "--out", "part")
    part = tmp_path / "part"
    until = time.monotonic() + 120
    while len(list(part.glob("[0-9]*.png"))) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    there = len(list(part.glob("[0-9]*.png")))
    assert 5 <= there < 40
    again = process(*words, "--out", "part", "--json")
    out, error = again.communicate(timeout=600)
    assert again.returncode == 0, error
    assert 40 - there <= json.loads(out)["new"] <= 40 - there + 1  # the kill may fall within a rename
    whole = process(*words, "--out", "whole")
    assert whole.wait(600) == 0
    one, two = images(part), images(tmp_path / "whole")
    assert list(one) == list(two)
    # Kernels may round differently from one process to the next: at most one grey level.
    assert all(np.abs(one[name].astype(int) - two[name]).max() <= 1 for name in one)


def test_sigterm_ends_cleanly(image_run, process, tmp_path):
    job = process("sample", image_run.folder, "--seeds", "0-5000", "--format", "png", "--batch-size", 1, "--out", "out")
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("[0-9]*.png")) and time.monotonic() < until:
        time.sleep(0.02)
    job.terminate()
    _, error = job.communicate(timeout=60)
    assert job.returncode == 143
    assert "goes on where it stopped" in error
    assert "Traceback" not in error


def test_two_processes_draw_what_one_draws(image_run, command, process, tmp_path):
    words = ["sample", image_run.folder, "--seeds", "0-24", "--batch-size", 8, *CHURN]
    for kind in ("npz", "png"):
        job = process(*words, "--format", kind, "--out", f"two-{kind}", "--json", processes=2)
        out, error = job.communicate(timeout=600)
        assert job.returncode == 0, error
        assert json.loads(out)["n"] == 25  # one object, from one process
        assert command(*words, "--format", kind, "--out", f"one-{kind}").exit_code == 0
    one, two = npz(tmp_path / "one-npz"), npz(tmp_path / "two-npz")
    assert np.array_equal(one["seeds"], two["seeds"])
    assert np.array_equal(one["labels"], two["labels"])
    assert np.abs(one["samples"] - two["samples"]).max() <= 1e-4
    pictures = images(tmp_path / "one-png"), images(tmp_path / "two-png")
    assert list(pictures[0]) == list(pictures[1])
    assert not list((tmp_path / "two-npz").glob("shard-*"))


def test_grid_of_classes(image_run, command):
    done = command("sample", image_run.folder, "--seeds", "0-19", "--out", "out", "--json")
    assert done.exit_code == 0
    assert [file.rsplit("/")[-1] for file in done.json()["files"]] == ["grid.png", "samples.npz"]
    grid = Image.open(ud_path("out") / "grid.png")
    scale = (grid.width + 2) // 10 // 8  # ten columns, one for each class, a gap of 2 pixels between
    assert grid.size == (10 * (8 * scale + 2) - 2, 2 * (8 * scale + 2) - 2)
    pixels, samples = np.asarray(grid), to_bytes(torch.from_numpy(npz(ud_path("out"))["samples"]))
    cell = 8 * scale + 2
    assert np.array_equal(
        pixels[cell : cell + 8 * scale : scale, 3 * cell : 3 * cell + 8 * scale : scale], samples[13, 0]
    )


def test_points_are_scattered(plane_run, command):
    done = command("sample", plane_run.folder, "--seeds", "0-99", "--out", "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert (ud_path("out") / "scatter.png").is_file()
    assert npz(ud_path("out"))["samples"].shape == (100, 2)
    refused = command("sample", plane_run.folder, "--format", "png")
    assert refused.exit_code == 2
    assert "no pictures" in refused.stderr


def test_samples_made_otherwise_are_not_mixed(image_run, command):
    words = ["sample", image_run.folder, "--seeds", "0-3", "--format", "png", "--out", "out"]
    assert command(*words).exit_code == 0
    for change, key in (
        (["--steps", 5], "steps was 3, is 5"),
        (["--label", 2], "label"),
        (["--solver", "heun"], "solver"),
        (["--corrector", "langevin"], "corrector"),
        (["--threshold", "dynamic"], "threshold"),
    ):
        refused = command(*words, *change)
        assert refused.exit_code == 4
        assert key in refused.stderr
    ud_path("mine").mkdir()
    (ud_path("mine") / "thesis.tex").write_text("x")
    refused = command(*words[:-1], "mine")
    assert refused.exit_code == 4
    assert "other files" in refused.stderr


def test_by_default_unlike_samples_lie_apart(image_run, command):
    places = {
        command("sample", image_run.folder, "--seeds", "0-1", "--format", "npz", "--json", *more).json()["out"]
        for more in ([], ["--steps", 2], ["--ema", "none"], ["--step", 11], ["--label", 1])
    }
    assert len(places) == 5


def test_what_another_solver_leaves_out_is_said(image_run, command, tmp_path):
    """A recipe's corrector belongs to its solver: --solver comes without it, and the command says so."""
    corrected = tmp_path / "corrected"
    shutil.copytree(image_run.folder, corrected)
    recipe = ud.load_recipe(corrected / "recipe.yaml", ["sampling.corrector=langevin", "sampling.solver=ddpm"])
    (corrected / "recipe.yaml").write_text(recipe.to_yaml())
    asked = ["sample", corrected, "--seeds", "0-1", "--format", "npz", "--json"]
    whole, other = command(*asked), command(*asked, "--solver", "dopri5")
    assert (whole.exit_code, other.exit_code) == (0, 0), other.stderr
    assert "ddpm + langevin(snr=0.16, steps=1, rule=score), 3 steps" in whole.stderr
    assert "without" not in whole.stderr
    assert (
        "(without the recipe's corrector langevin(snr=0.16, steps=1, rule=score) and grid karras: that is for its own"
        in other.stderr
    )
    assert whole.json()["corrector"]["snr"] == 0.16
    assert "corrector" not in other.json()


def test_network_calls_are_counted(image_run, command):
    for solver, steps, nfe in (("heun", 5, 9), ("dpmpp-2m", 5, 5)):
        words = [
            "sample",
            image_run.folder,
            "--seeds",
            0,
            "--solver",
            solver,
            "--steps",
            steps,
            "--format",
            "npz",
            "--json",
        ]
        assert command(*words).json()["nfe"] == nfe


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--seeds", "9-3"], 2, "must rise"),
        (["--seeds", "a"], 2, "neither a number nor a range"),
        (["--seeds", "1,1"], 2, "given twice"),
        (["--seeds", "0-999999999999"], 2, "at most"),
        (["--seeds", "0-20000"], 2, "use png or npz"),
        (["--format", "gif"], 2, "expected grid, png, npz"),
        (["--solver", "huen"], 2, "Did you mean 'heun'?"),
        (["--solver", "edm:S_chrn=1"], 2, "S_churn"),
        (["--corrector", "langevn"], 2, "Did you mean 'langevin'?"),
        (["--corrector", "langevin:snr=-1"], 2, "expected 0 < snr < 1"),
        (
            ["--corrector", "langevin:snr"],
            2,
            "'snr' is no setting. Expected NAME:KEY=VALUE,KEY=VALUE, for example --cor",
        ),
        (["--corrector", "langevin:0.16"], 2, "--corrector langevin:snr=0.16,steps=2"),
        (["--corrector", "langevin:snr.x=0.1"], 2, "--corrector langevin:snr.x=0.1: 'snr.x=0.1' is no setting"),
        (["--solver", "edm:S_churn"], 2, "--solver edm:S_churn: 'S_churn' is no setting. Expected NAME:KEY=VALUE"),
        (["--threshold", "clp"], 2, "Did you mean 'clip'?"),
        (["--threshold", "dynamic:quantile=99.5"], 2, "expected a share in (0, 1]"),
        (["--grid", "tim"], 2, "Did you mean 'time'?"),
        (["--steps", 0], 2, "expected at least 1"),
        (["--batch-size", 0], 2, "expected at least 1"),
        (["--step", 99], 4, "no checkpoint of step 99"),
        (["--ema", 77], 4, "half-life-1"),
        (["--device", "cuda:9"], 2, "Devices here: cpu"),
        (["--out", "x.png"], 2, "expected a folder"),
    ],
)
def test_wrong_options(image_run, command, words, code, says):
    done = command("sample", image_run.folder, *words)
    assert done.exit_code == code
    assert says in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["0-9", "17", "3,8-10", "5,4,3", "9223372036854775807"])
def test_seeds_are_read_and_written(text):
    seeds = parse_seeds(text)
    assert seeds.dtype == np.int64
    assert np.array_equal(parse_seeds(write_seeds(seeds)), seeds)
    with pytest.raises(ArgumentError):
        parse_seeds(text + ",x")
