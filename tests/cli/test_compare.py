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
    assert cell.median == pytest.approx(float(each.quantile(0.5)), rel=5e-3)
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
    chosen = ["--label", "7", "--ema", "none", "--step", "12"]
    said = command("compare", run, *FEW, "--error", 100, "--out", "here", *chosen)
    assert said.exit_code == 0, said.stderr
    (line,) = [line.strip() for line in said.stdout.splitlines() if line.strip().startswith("undiffuse sample")]
    assert ud.load_run(run).recipe.settings.sampling.grid is not None
    words = line.split()[1:]
    assert words[-8:] == ["--grid", "own", *chosen]
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


MEASURED = ["--solvers", "heun,ddpm", "--grids", "karras", "--calls", "6", "--n", 2]


def test_quality_is_what_evaluate_measures(run, command):
    """Every cell, stochastic ones too: the same seeds, split and number as `evaluate` for that solver and grid."""
    made = command("compare", run, *MEASURED, "--metrics", "sliced-wasserstein,nearest", "--metrics-n", 40, "--json")
    assert made.exit_code == 0, made.stderr
    record = made.json()
    assert record["judged"]["better"] == {"sliced-wasserstein": "least", "nearest": None}
    lines = [json.loads(line) for line in (run / "compare/compare.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2
    for cell in record["cells"]:
        how = ["--solver", cell["solver"], "--grid", "karras", "--steps", cell["steps"], "--n", 40]
        asked = command("evaluate", run, *how, "--metrics", "sliced-wasserstein,nearest", "--json")
        assert asked.exit_code == 0, asked.stderr
        for result in asked.json()["results"]:
            assert cell["quality"][result["name"]] == pytest.approx(result["value"], rel=1e-4)
            assert record["judged"]["beside"]["held-out"][result["name"]] == result["references"]["held-out"]
            (line,) = [one for one in lines if one["name"] == result["name"] and one["protocol"] == result["protocol"]]
            assert line["value"] == cell["quality"][result["name"]]
    heun, ddpm = record["cells"]
    assert heun["median"] is not None
    assert ddpm["median"] is None
    assert not ddpm["failure"]
    least = min(record["cells"], key=lambda cell: cell["quality"]["sliced-wasserstein"])
    assert record["recommended_by_metric"]["metric"] == "sliced-wasserstein"
    assert record["recommended_by_metric"]["solver"] == least["solver"]
    assert Comparison.from_dict(record).to_dict() == {key: record[key] for key in Comparison.__dataclass_fields__}


def test_stochastic_solvers_alone_have_no_truth(run, command):
    words = ["--solvers", "ddpm", "--calls", "3,4", "--metrics", "mmd", "--metrics-n", 16]
    made = command("compare", run, *words, "--json")
    assert made.exit_code == 0, made.stderr
    record = made.json()
    assert (record["truth_error"], record["size"], record["recommended"]) == (None, None, None)
    text = (run / "compare/compare.md").read_text()
    assert "mmd of 16 samples against" in text
    assert "Error of the median" not in text
    assert record["recommended_by_metric"]["command"] in text
    with Image.open(run / "compare/compare.png") as picture:
        one = picture.height
    made = command("compare", run, "--solvers", "ddpm,ddim", *words[2:])
    assert made.exit_code == 0, made.stderr
    with Image.open(run / "compare/compare.png") as picture:
        assert picture.height == 2 * one  # the error's panel, and the number's


def test_where_nothing_can_be_best_nothing_is_recommended(run, command):
    words = ("--metrics", "nearest", "--metrics-n", "20", "--calls", "2", "--n", "2", "--solvers", "sa-2")
    result = command("compare", str(run), *words, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["recommended"] is None


def test_a_tuned_solver_is_compared_at_its_own_calls(run, command):
    made = command("tune", run, "--calls", 3, "--n", 32, "--most-steps", 1, "--reference", 20)
    assert made.exit_code == 0, made.stderr
    made = command("compare", run, "--solvers", "tuned-3", "--calls", "2,3,5", "--n", 2, "--json")
    assert made.exit_code == 0, made.stderr
    record = made.json()
    assert [cell["steps"] for cell in record["cells"]] == [0, 3, 3]
    assert record["recommended"]["solver"] == "tuned-3"
    drawn = command(*record["recommended"]["command"].split()[1:], "--seeds", "0", "--format", "npz")
    assert drawn.exit_code == 0, drawn.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "frechett"], "Did you mean 'frechet'"),
        (["--metrics", "precision-recall", "--metrics-n", "3"], "3 samples"),
        (["--metrics", "frechet", "--metrics-n", "1"], "evaluation.n"),
        (["--metrics-n", "50"], "--metrics recipe"),
        (["--metrics", "frechet", "--solvers", "mala"], "follows no grid"),
        (["--metrics", "frechet", "--solvers", "stay"], "follows no grid"),
        (["--metrics", "accuracy"], "of kind classifier"),
    ],
)
def test_refusals_of_metrics(run, command, words, message):
    result = command("compare", run, *words)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (run / "compare").exists()


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
        (["--seed", "-1"], "at least 0"),
        (["--seed", str(2**63)], "at least 0"),
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
