"""`undiffuse compare` on tiny runs: its files, its figures, its advice, and every refusal."""

import json
import shutil

import pytest
import torch
from PIL import Image

import undiffuse as ud
from recipes.tiny import overrides
from undiffuse.cli.compare import _names
from undiffuse.solvers import Comparison

FEW = ["--solvers", "abm-4,heun", "--calls", "3,6", "--n", 4]


@pytest.fixture
def run(image_run, tmp_path, monkeypatch):
    monkeypatch.setattr("undiffuse.solvers.comparing.CHECK_STEPS", 20)  # of the truth's check, which is not looked at
    folder = tmp_path / "run"
    shutil.copytree(image_run.folder, folder)
    return folder


def test_figures_and_files(run, command):
    result = command("compare", run, *FEW, "--seed", 3, "--grids", "own,karras", "--error", 100, "--json")
    assert result.exit_code == 0, result.stderr
    record = result.json()
    assert json.loads((run / "compare/compare.json").read_text()) == {k: v for k, v in record.items() if k != "files"}
    found = Comparison.from_dict(record)
    assert found.rows == [("abm-4", "own"), ("abm-4", "karras"), ("heun", "own"), ("heun", "karras")]

    # One cell by hand: seeds 3 to 6, each the class that `sample` gives it, in fp32.
    denoiser, shape = ud.load_run(run).denoiser(), (4, 1, 8, 8)
    options = {"seed": [3, 4, 5, 6], "cond": torch.tensor([3, 4, 5, 6])}
    truth = ud.sample(denoiser, shape, solver=ud.Adaptive("tsit5", 1e-6, 1e-6), **options)
    x = ud.sample(denoiser, shape, solver="heun", steps=3, grid="karras", **options)
    each = (x - truth).flatten(1).square().mean(1).sqrt() / truth.square().mean().sqrt()
    cell = found.cell("heun", "karras", 6)
    assert (cell.steps, cell.nfe) == (3, 5)
    assert cell.median == pytest.approx(float(each.median()), rel=5e-3)
    assert cell.error == pytest.approx(float(each.square().mean().sqrt()), rel=5e-3)

    text = (run / "compare/compare.md").read_text()
    assert text.count("**") == 2 * 2  # the best of each column
    assert record["recommended"]["command"] in text
    with Image.open(run / "compare/compare.png") as picture:
        assert picture.width == 1200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert not list((run / "compare").glob(".tmp-*"))


def test_the_recommended_command_samples_so(run, command):
    """The recipe has a grid of its own, so that of the solver is asked for by name."""
    said = command("compare", run, *FEW, "--error", 100, "--out", "here")
    assert said.exit_code == 0, said.stderr
    (line,) = [line.strip() for line in said.stdout.splitlines() if line.strip().startswith("undiffuse sample")]
    assert ud.load_run(run).recipe.settings.sampling.grid is not None
    words = line.split()[1:]
    assert words[-2:] == ["--grid", "own"]
    drawn = command(*words, "--seeds", "0-1", "--format", "npz", "--json")
    assert drawn.exit_code == 0, drawn.stderr
    record = drawn.json()
    assert record["grid"] == f"{record['solver']['name']}'s own"
    assert record["nfe"] <= 3
    assert (run.parent / "here/compare.md").is_file()
    assert not (run / "compare").exists()


def test_the_label_is_that_of_all(run, command):
    made = [command("compare", run, *FEW, "--json", *label) for label in ((), ("--label", 7))]
    assert not any(result.exit_code for result in made), [result.stderr for result in made]
    cells = [result.json()["cells"] for result in made]
    assert cells[0] != cells[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solvers", "abm4"], "Did you mean 'abm-4'"),
        (["--solvers", "ddpm"], "draws noise"),
        (["--solvers", "mala"], "draws noise"),
        (["--solvers", "edm:S_churn=40,S_noise=1.003"], "draws noise"),
        (["--solvers", ","], "names nothing"),
        (["--grids", "karas"], "Did you mean 'karras'"),
        (["--calls", "5,0"], "at least 1"),
        (["--calls", "five"], "whole numbers"),
        (["--n", "1"], "at least 2"),
        (["--error", "0"], "above 0"),
        (["--label", "10"], "0 ... 9"),
    ],
)
def test_refusals(run, command, words, message):
    result = command("compare", run, *words)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (run / "compare").exists()


@pytest.mark.parametrize(("name", "what"), [("ebm-ring", "an energy"), ("classifier-digits", "a classifier")])
def test_runs_of_another_kind_are_refused(name, what, command, tmp_path):
    made = ud.train(ud.load_recipe(name, overrides(name)), tmp_path / name)
    result = command("compare", made.folder)
    assert result.exit_code == 4
    assert what in result.stderr


def test_settings_stay_with_their_solver():
    assert _names("edm:S_churn=0,S_noise=1,heun, ab4") == ["edm:S_churn=0,S_noise=1", "heun", "ab4"]
