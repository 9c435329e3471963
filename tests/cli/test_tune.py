"""`tune`: a run's own solvers, found again by their names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import undiffuse as ud
from cli.conftest import npz
from undiffuse.core.errors import ArgumentError

QUICK = ["--n", 64, "--reference", 30, "--most-steps", 15]


@pytest.fixture(scope="module")
def tuned_run(plane_run, tmp_path_factory):
    """A copy of the run with a solver of 4 calls, and what the command said."""
    from typer.testing import CliRunner

    from undiffuse.cli import app

    folder = tmp_path_factory.mktemp("tuned") / "gaussians-20260101-000000"
    shutil.copytree(plane_run.folder, folder)
    words = ["tune", folder, "--calls", 4, *QUICK, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return ud.load_run(folder), json.loads(result.stdout)


def test_the_command_lowers_the_error_and_says_by_how_much(tuned_run):
    run, said = tuned_run
    assert said["file"] == str(run.folder / "solvers" / "tuned-4.safetensors")
    assert said["calls"] == 4
    assert said["after"]["median"] < 0.7 * said["before"]["median"]
    denoiser, noise = run.denoiser(), torch.randn(64, 2, generator=torch.Generator().manual_seed(5))
    noise = noise * float(denoiser.path.sigma(torch.tensor(denoiser.path.t_max)))
    ends = [
        ud.sample(denoiser, noise=noise, solver=solver, steps=steps)
        for solver, steps in (("abm-4", 100), ("abm-4", 4), (run.solver("tuned-4"), None))
    ]
    assert (ends[2] - ends[0]).norm(dim=1).median() < 0.7 * (ends[1] - ends[0]).norm(dim=1).median()


def test_what_is_fitted_is_what_is_sampled_from(plane_run, tmp_path, command):
    """With the recipe's threshold, by which the errors told are about those that `compare` finds."""
    folder = tmp_path / "run"
    shutil.copytree(plane_run.folder, folder)
    recipe = (folder / "recipe.yaml").read_text()
    threshold = "sampling:\n  threshold: {name: clip, low: -0.5, high: 0.5}\n"
    (folder / "recipe.yaml").write_text(recipe.replace("sampling:\n", threshold, 1))
    said = command("tune", folder, "--calls", 4, *QUICK, "--reference", 300, "--json")
    assert said.exit_code == 0, said.stderr
    found = command("compare", folder, "--solvers", "abm-4,tuned-4", "--calls", "4", "--n", 64, "--json")
    assert found.exit_code == 0, found.stderr
    for told, cell in zip(("before", "after"), found.json()["cells"]):
        assert 1 / 3 < said.json()[told]["rms"] / cell["error"] < 3
    assert ud.load_run(folder).solver("tuned-4").about["threshold"]["name"] == "clip"


def test_sample_finds_it_by_name(tuned_run, command):
    run, _ = tuned_run
    result = command(
        "sample", run.folder, "--seeds", "0-4", "--solver", "tuned-4", "--format", "npz", "--out", "x", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.json()["nfe"] == result.json()["steps"] == 4
    there = npz(Path("x"))["samples"]
    by_hand = ud.sample(run.denoiser(), (5, 2), seed=list(range(5)), solver=run.solver("tuned-4"))
    other = ud.sample(run.denoiser(), (5, 2), seed=list(range(5)), solver="abm-4", steps=4)
    # Whatever the solver, the command rounds otherwise than a call by hand: by 1e-4 here.
    assert np.abs(there - by_hand.numpy()).max() < 5e-4 < 0.1 * np.abs(there - other.numpy()).max()


def test_evaluate_finds_it_too(tuned_run, command):
    run, _ = tuned_run
    result = command(
        "evaluate", run.folder, "--n", 40, "--metrics", "sliced-wasserstein", "--solver", "tuned-4", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert result.json()["results"][0]["protocol"]["nfe"] == 4


def test_what_does_not_fit_is_refused(tuned_run, command):
    run, _ = tuned_run
    for words, said in (
        (
            ["sample", run.folder, "--solver", "tuned-9"],
            f"It has tuned-4. Make it with: undiffuse tune {run.folder} --calls 9",
        ),
        (["sample", run.folder, "--solver", "tuned-4", "--steps", 5], "made for 4 calls"),
        (["sample", run.folder, "--solver", "tuned-4", "--grid", "time"], "times of its own"),
        (["sample", run.folder, "--solver", "tuned-4:points=2"], "has no settings"),
        (["tune", run.folder, "--calls", 0, *QUICK], "1 to 64"),
        (["tune", run.folder, "--n", 8], "at least 32"),
    ):
        result = command(*words)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
    with pytest.raises(ArgumentError, match="no solver tuned to this run"):
        run.solver("heun")


def test_a_damaged_or_renamed_file_is_refused(tuned_run, command):
    run, _ = tuned_run
    folder = run.folder / "solvers"
    (folder / "tuned-3.safetensors").write_bytes((folder / "tuned-4.safetensors").read_bytes()[:-5])
    shutil.copy(folder / "tuned-4.safetensors", folder / "tuned-7.safetensors")
    cut, renamed = (command("sample", run.folder, "--solver", f"tuned-{n}") for n in (3, 7))
    assert cut.exit_code == 4
    assert "cut short" in cut.stderr
    assert renamed.exit_code == 2
    assert "is of 4 calls" in renamed.stderr


def test_other_weights_are_told_of(tuned_run, command):
    run, _ = tuned_run
    result = command("sample", run.folder, "--seeds", "0-1", "--solver", "tuned-4", "--ema", "none", "--out", "y")
    assert result.exit_code == 0
    assert "fitted to other weights" in result.stdout + result.stderr
