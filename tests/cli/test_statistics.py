"""`statistics`: of a run's model, and the solver that goes by them, found again by its name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import undiffuse as ud
from cli.conftest import npz
from undiffuse.core.errors import ArgumentError


@pytest.fixture(scope="module")
def known_run(plane_run, tmp_path_factory):
    """A copy of the run with statistics, and what the command said."""
    from typer.testing import CliRunner

    from undiffuse.cli import app

    folder = tmp_path_factory.mktemp("known") / "gaussians-20260101-000000"
    shutil.copytree(plane_run.folder, folder)
    words = ["statistics", folder, "--n", 64, "--places", 20, "--seed", 7, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return ud.load_run(folder), json.loads(result.stdout)


def test_the_command_estimates_what_python_does(known_run):
    run, said = known_run
    assert said["file"] == str(run.folder / "solvers" / "dpm-v3.safetensors")
    found = ud.ModelStatistics.load(said["file"])
    section = run.recipe.settings.sampling
    x_0 = ud.sample(
        run.denoiser(), (64, 2), seed=list(range(7, 71)), solver=section.solver["name"], steps=section.steps,
        grid=section.grid,
    )  # fmt: skip
    by_hand = ud.model_statistics(run.denoiser(), x_0, places=20, seed=7)
    assert torch.allclose(found.half_log_snr, by_hand.half_log_snr)
    assert torch.allclose(found.linear, by_hand.linear, atol=2e-3)
    assert said["l"] == pytest.approx(found.linear.mean(1).tolist(), abs=1e-6)
    assert found.about["step"] == 12


def test_it_is_nearer_to_the_exact_ends_than_2m(known_run):
    run, _ = known_run
    found = ud.compare(run.denoiser(), (2,), {"v3": run.solver("dpm-v3"), "2m": "dpmpp-2m"}, calls=[5, 8], n=32)
    for calls in (5, 8):
        assert found.cell("v3", "own", calls).median < 0.8 * found.cell("2m", "own", calls).median


def test_sample_finds_it_by_name_and_settings(known_run, command):
    run, _ = known_run
    words = ("sample", run.folder, "--seeds", "0-4", "--steps", 2, "--grid", "own", "--format", "npz", "--json")
    result = command(*words, "--solver", "dpm-v3:points=1", "--out", "x")
    assert result.exit_code == 0, result.stderr
    assert result.json()["nfe"] == 2
    there = npz(Path("x"))["samples"]
    solvers = (run.solver("dpm-v3", {"points": 1}), "ddim")
    by_hand, other = (ud.sample(run.denoiser(), (5, 2), seed=list(range(5)), solver=s, steps=2) for s in solvers)
    assert np.abs(there - by_hand.numpy()).max() < 5e-4 < 0.2 * np.abs(there - other.numpy()).max()


def test_evaluate_and_compare_find_it_too(known_run, command):
    run, _ = known_run
    words = ("--metrics", "sliced-wasserstein", "--solver", "dpm-v3", "--steps", 5, "--grid", "own", "--json")
    result = command("evaluate", run.folder, "--n", 40, *words)
    assert result.exit_code == 0, result.stderr
    assert result.json()["results"][0]["protocol"]["nfe"] == 5
    words = ("--solvers", "dpm-v3,dpm-v3:corrector=false,dpmpp-2m", "--calls", "5", "--n", 8, "--out", "y", "--json")
    result = command("compare", run.folder, *words)
    assert result.exit_code == 0, result.stderr
    cells = {cell["solver"]: cell for cell in result.json()["cells"]}
    assert max(cells["dpm-v3"]["median"], cells["dpm-v3:corrector=false"]["median"]) < 0.2 * cells["dpmpp-2m"]["median"]
    assert cells["dpm-v3"]["median"] != cells["dpm-v3:corrector=false"]["median"]


def test_what_does_not_fit_is_refused(known_run, plane_run, image_run, command):
    run, _ = known_run
    for words, said in (
        (
            ["sample", plane_run.folder, "--solver", "dpm-v3"],
            f"Make them with: undiffuse statistics {plane_run.folder}",
        ),
        (["compare", plane_run.folder, "--solvers", "dpm-v3"], f"undiffuse statistics {plane_run.folder}"),
        (["sample", run.folder, "--solver", "dpm-v3:points=7"], "1 to 4"),
        (["statistics", run.folder, "--n", 1], "at least 2"),
        (["statistics", run.folder, "--seed", -1], "at least 0"),
    ):
        result = command(*words)
        assert result.exit_code == 2, words
        assert said in " ".join(result.stderr.split())
    with pytest.raises(ArgumentError, match="tuned-CALLS, and dpm-v3"):
        run.solver("heun")
    # Statistics of another run's folder are of another path, and of another shape.
    file = image_run.folder / "solvers" / "dpm-v3.safetensors"
    file.parent.mkdir(exist_ok=True)
    try:
        shutil.copy(run.folder / "solvers" / "dpm-v3.safetensors", file)
        result = command("sample", image_run.folder, "--seeds", "0-1", "--solver", "dpm-v3", "--out", "z")
        assert result.exit_code == 2
        assert "these statistics are of" in " ".join(result.stderr.split())
    finally:
        shutil.rmtree(file.parent)


def test_a_damaged_file_is_refused(known_run, command, tmp_path):
    run, _ = known_run
    folder = tmp_path / "gaussians-20260102-000000"
    shutil.copytree(run.folder, folder)
    file = folder / "solvers" / "dpm-v3.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    result = command("sample", folder, "--solver", "dpm-v3")
    assert result.exit_code == 4
    assert "cut short" in result.stderr


def test_other_weights_are_told_of(known_run, command):
    run, _ = known_run
    words = ("sample", run.folder, "--seeds", "0-1", "--solver", "dpm-v3", "--ema", "none", "--out", "y")
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert "fitted to other weights" in result.stdout + result.stderr


def test_an_energy_has_none(tmp_path, command):
    from recipes.tiny import overrides

    run = ud.train(ud.load_recipe("ebm-ring", [*overrides("ebm-ring"), "training.steps=2"]), tmp_path / "ebm-ring-1")
    result = command("statistics", run.folder)
    assert result.exit_code != 0
    assert "no denoiser" in result.stderr
