"""`tune --only grid`: a run's own grids, found again by their names."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import undiffuse as ud
from cli.conftest import npz
from undiffuse.core.errors import ArgumentError
from undiffuse.solvers import GRIDS

GRID_AND_SOLVER = ["--solver", "dpmpp-2m", "--grid", "optimised-5"]
QUICK = ["--only", "grid", "--calls", 5, "--start", "dpmpp-2m", "--n", 64, "--seed", 3]


@pytest.fixture(scope="module")
def fitted_run(plane_run, tmp_path_factory):
    """A copy of the run with a grid of 5 steps, and what the command said."""
    from typer.testing import CliRunner

    from undiffuse.cli import app

    folder = tmp_path_factory.mktemp("fitted") / "gaussians-20260101-000000"
    shutil.copytree(plane_run.folder, folder)
    result = CliRunner().invoke(app, [str(word) for word in ["tune", folder, *QUICK, "--json"]])
    assert result.exit_code == 0, result.stderr
    return ud.load_run(folder), json.loads(result.stdout)


def test_the_command_fits_times_only(fitted_run):
    run, said = fitted_run
    assert said["file"] == str(run.folder / "solvers" / "optimised-5.safetensors")
    assert (said["steps"], said["solver"]) == (5, "dpmpp-2m")
    assert said["after"]["median"] < said["before"]["median"]
    denoiser, options = run.denoiser(), {"shape": (64, 2), "seed": 100}
    truth = ud.sample(denoiser, solver="abm-4", steps=100, **options)

    def error(grid):
        x = ud.sample(denoiser, solver="dpmpp-2m", steps=5, grid=grid, **options)
        return float((x - truth).norm(dim=1).median())

    assert error(run.grid("optimised-5")) < min(error(name) for name in (None, *GRIDS))


def test_sample_evaluate_and_compare_find_it_by_name(fitted_run, command):
    run, _ = fitted_run
    words = GRID_AND_SOLVER
    made = command("sample", run.folder, "--seeds", "0-4", *words, "--format", "npz", "--out", "x", "--json")
    assert made.exit_code == 0, made.stderr
    record = made.json()
    assert record["steps"] == record["nfe"] == 5
    assert record["grid"].startswith("optimised-5 (")  # and the file's checksum: another file's samples are others
    by_hand = ud.sample(run.denoiser(), (5, 2), seed=list(range(5)), solver="dpmpp-2m", grid=run.grid("optimised-5"))
    other = ud.sample(run.denoiser(), (5, 2), seed=list(range(5)), solver="dpmpp-2m", steps=5, grid="quadratic")
    there = npz(Path("x"))["samples"]
    assert np.abs(there - by_hand.numpy()).max() < 5e-4 < 0.1 * np.abs(there - other.numpy()).max()

    asked = command("evaluate", run.folder, "--n", 50, "--metrics", "mmd", *words, "--json")
    assert asked.exit_code == 0, asked.stderr
    (result,) = asked.json()["results"]
    assert (result["protocol"]["steps"], result["protocol"]["grid"]) == (5, record["grid"])

    more = ["--solvers", "dpmpp-2m", "--grids", "own,optimised-5", "--calls", "4,5,8", "--n", 8]
    made = command("compare", run.folder, *more, "--metrics", "mmd", "--metrics-n", 50, "--error", 10, "--json")
    assert made.exit_code == 0, made.stderr
    found = ud.solvers.Comparison.from_dict(made.json())
    assert [found.cell("dpmpp-2m", "optimised-5", calls).nfe for calls in found.calls] == [0, 5, 5]
    assert found.best(5).grid == "optimised-5"
    assert found.cell("dpmpp-2m", "optimised-5", 5).quality["mmd"] == pytest.approx(result["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "optimised-5", "--steps", 6], "has 5 steps; leave them out"),
        (["--grid", "optimised-7"], "It has optimised-5. Make it with: undiffuse tune"),
        (["--grid", "optimized-5"], "unknown grid"),
    ],
)
def test_sample_refuses(fitted_run, command, words, message):
    run, _ = fitted_run
    result = command("sample", run.folder, "--seeds", "0", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_another_path_and_other_weights(fitted_run, plane_run, command, tmp_path):
    run, _ = fitted_run
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    found = ud.load_recipe(run.folder / "recipe.yaml", ["path={name: vp}"])
    (again / "recipe.yaml").write_text(found.to_yaml())
    result = command("sample", again, "--seeds", "0", "--grid", "optimised-5")
    assert result.exit_code == 2
    assert f"fitted on the path {run.recipe.path()!r}" in result.stderr
    told = command("sample", run.folder, "--seeds", "0", "--format", "npz", "--grid", "optimised-5", "--ema", "none")
    assert told.exit_code == 0, told.stderr
    assert "optimised-5 was fitted to other weights" in told.stdout
    words = ["--grid", "optimised-5", "--solver", "deis-2"]
    told = command("sample", run.folder, "--seeds", "0", "--format", "npz", *words)
    assert "optimised-5 was fitted to dpmpp-2m, and deis-2 may do better on another" in told.stdout
    told = command("sample", run.folder, "--seeds", "1", "--format", "npz", *GRID_AND_SOLVER)
    assert "fitted to" not in told.stdout
    with pytest.raises(ArgumentError, match="called optimised-STEPS"):
        run.grid("karras")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "weights"], "expected grid"),
        (["--only", "grid", "--start", "ddpm"], "deterministic"),
        (["--only", "grid", "--calls", 0], "1 to 64"),
        (["--only", "grid", "--n", 8], "at least 16"),
        (["--only", "grid", "--grids", "own"], "begins on the best named grid"),
        (["--grids", "own,angel"], "Did you mean 'angle'"),
        (["--only", "grid", "--start", "abm4"], "Did you mean 'abm-4'"),
    ],
)
def test_tune_refuses(fitted_run, command, words, message):
    run, _ = fitted_run
    result = command("tune", run.folder, *words)
    assert result.exit_code == 2
    assert message in result.stderr
