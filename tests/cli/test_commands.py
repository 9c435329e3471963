"""The commands as a user meets them: what they print, where, and how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import undiffuse as ud
from recipes.tiny import overrides
from undiffuse.cli import console
from undiffuse.cli.page import commands, recipe_arguments
from undiffuse.metrics import frechet_distance
from undiffuse.recipes import Recipe, list_recipes

TINY = overrides("gaussians")


def test_help_and_listing_are_quick_because_they_load_nothing_heavy():
    script = (
        "import sys; sys.argv = ['undiffuse', {words}]\n"
        "from undiffuse.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {{'torch', 'numpy', 'matplotlib', 'sklearn', 'PIL', 'datasets'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for words in ("'--help'", "'train', '--help'", "'recipes'", "'recipes', 'show', 'digits', '--as-written'"):
        done = subprocess.run([sys.executable, "-c", script.format(words=words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "compare", "report", "recipes", "demo"])
def test_every_help_shows_examples_that_parse(command, name):
    text = command(name, "--help").stdout
    examples = re.findall(rf"^ +undiffuse {name}(.*)$", text, re.MULTILINE)
    assert len(examples) >= 1 + (name != "demo")
    options = set(re.findall(r"--[a-z0-9-]+", text.split("Options:")[1]))
    used = set(re.findall(r"(?<!\S)--[a-z0-9-]+", " ".join(examples)))
    assert used <= options
    recipes = set(list_recipes())
    for example in examples:
        for word in example.split():
            if re.fullmatch(r"(training|model|data|evaluation)\.\S+=\S+", word):
                Recipe.from_tree(ud.load_recipe("folder", [word]).to_dict())
    assert name in ("recipes", "demo") or any(recipes & set(example.split()) for example in examples)


def test_recipes(command):
    listed = command("recipes")
    assert listed.exit_code == 0
    for name, text in list_recipes().items():
        assert re.search(rf"^{name} +{re.escape(text)}$", listed.stdout, re.MULTILINE)
    assert command("recipes", "--json").json() == list_recipes()
    shown = command("recipes", "show", "vp-digits")
    assert shown.exit_code == 2
    assert "Did you mean" in shown.stderr
    shown = command("recipes", "show", "digits", "training.steps=7", "--json")
    assert shown.json() == ud.load_recipe("digits", ["training.steps=7"]).to_dict()
    assert "# " in command("recipes", "show", "digits", "--as-written").stdout


def test_a_shown_recipe_is_a_recipe_file(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(command("recipes", "show", "gaussians", *TINY).stdout)
    assert ud.load_recipe(tmp_path / "mine.yaml") == ud.load_recipe("gaussians", TINY)


def test_train_sample_evaluate_report(command, tmp_path):
    """The main job, in miniature, by the recipe's name."""
    trained = command("train", "gaussians", *TINY, "training.sample_every=1")
    assert trained.exit_code == 0, trained.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"gaussians-\d{8}-\d{6}", folder.name)
    for word in ("sample", "evaluate", "report"):
        assert f"undiffuse {word} runs/{folder.name}" in trained.stdout
    assert {f.name for f in (folder / "samples").iterdir()} == {"step-0000001.png", "step-0000002.png"}

    assert command("sample", "gaussians", "--seeds", "0-9").exit_code == 0

    words = ["evaluate", "gaussians", "--n", 50, "--metrics", "mmd,frechet", "--json"]
    measured = command(*words, "data.n=200")
    assert measured.exit_code == 0, measured.stderr
    results = measured.json()["results"]
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert lines == results
    assert [r["name"] for r in results] == ["mmd", "frechet"]
    protocol = results[0]["protocol"]
    assert (protocol["n"], protocol["seeds"], protocol["split"]) == (50, "0-49", "train")
    assert (protocol["solver"], protocol["steps"], protocol["nfe"]) == ("heun", 3, 5)
    recipe = ud.load_recipe("gaussians", ["data.n=200"])
    train, held_out = (d.batch(torch.arange(len(d)))[0] for d in (recipe.data(), recipe.data("held-out")))
    expected = frechet_distance(held_out, train)
    assert results[1]["references"]["held-out"] == pytest.approx(expected, rel=1e-6)
    assert results[1]["references"]["resampled training"] > 0
    assert set(results[1]["references"]) == {"resampled training", "held-out"}

    printed = command("evaluate", "gaussians", "--n", 50, "--metrics", "frechet", "data.n=200")
    assert re.search(r"frechet +" + f"{results[1]['value']:.4g}", printed.stdout)
    assert "50 samples (heun, 3 steps, 5 calls) against" in printed.stdout
    assert len((folder / "evaluation.jsonl").read_text().splitlines()) == 3

    written = command("report", "gaussians", "--json")
    assert written.exit_code == 0, written.stderr
    page = (folder / "report.html").read_text()
    assert written.json()["file"] == str(folder.relative_to(tmp_path) / "report.html")
    assert f"undiffuse evaluate runs/{folder.name}" in page
    assert "training.steps=2" in page


def test_evaluate_on_images_with_classes(image_run, command, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(image_run.folder, folder)
    done = command("evaluate", folder, "--n", 40, "--metrics", "class-accuracy,nearest", "data.limit=200", "--json")
    assert done.exit_code == 0, done.stderr
    accuracy, nearest = done.json()["results"]
    assert accuracy["references"] == {"resampled training": 1.0, "held-out": pytest.approx(0.97, abs=0.03)}
    assert nearest["references"]["held-out"] == pytest.approx(1.0)
    assert nearest["references"]["resampled training"] == 0.0
    assert accuracy["protocol"]["data_range"] == [-1.0, 1.0]
    assert command("report", folder, "data.limit=200").exit_code == 0
    assert "Nearest training items" in (folder / "report.html").read_text()
    plain = command(
        "evaluate", folder, "--n", 20, "--metrics", "frechet", "--no-references", "data.limit=200", "--json"
    )
    assert plain.json()["results"][0]["references"] == {}


def test_features_need_their_checksum(image_run, command, tmp_path):
    for words in (["--features", "x.pt"], ["--sha256", "0" * 64]):
        done = command("evaluate", image_run.folder, *words)
        assert done.exit_code == 2
        assert "go together" in done.stderr
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Flatten()))
    module.save(str(tmp_path / "features.pt"))
    done = command("evaluate", image_run.folder, "--features", "features.pt", "--sha256", "0" * 64)
    assert done.exit_code == 3
    assert "sha256" in done.stderr


def test_a_trained_run_keeps_its_model(image_run, command):
    done = command("evaluate", image_run.folder, "model.net.width=16")
    assert done.exit_code == 2
    assert "cannot be changed on a trained run" in done.stderr


def test_demo(command, tmp_path):
    words = ["demo", "--recipe", "gaussians", *TINY, "evaluation.n=30", "evaluation.metrics=[frechet]", "data.n=100"]
    done = command(*words, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json()["files"] == ["runs/demo/scatter.png", "runs/demo/report.html"]
    for file in done.json()["files"]:
        assert (tmp_path / file).stat().st_size > 500
    again = command(*words)  # nothing left to train or draw
    assert again.exit_code == 0
    assert str((tmp_path / "runs/demo/report.html").resolve()) in again.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "digit"], 2, "Did you mean 'digits'?"),
        (["train", "digits", "training.stepz=3"], 2, "Did you mean 'training.steps'?"),
        (["train", "digits", "training.steps"], 2, "key=value"),
        (["train", "digits", "--device", "cuda:9"], 2, "Devices here: cpu"),
        (["train", "folder", "data.path=nowhere"], 3, "nowhere"),
        (["train", "mnist"], 2, "data.path"),
        (["train", "digits", "data.source=digts"], 2, "Did you mean 'digits'?"),
        (["sample", "nowhere"], 4, "no run folder 'nowhere'"),
        (["evaluate", "nowhere"], 4, "no run folder"),
        (["report", "nowhere"], 4, "no run folder"),
        (["recipes", "shwo"], 2, "Did you mean 'show'?"),
        (["sampel", "x"], 2, "sample"),
        (["train", "digits", "--nope"], 2, "--nope"),
    ],
)
def test_errors_are_one_paragraph_with_a_code(command, tmp_path, words, code, says):
    done = command(*words)
    assert done.exit_code == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_run_folders_that_cannot_be_used(image_run, command, tmp_path):
    bare, mangled = tmp_path / "bare", tmp_path / "mangled"
    bare.mkdir()
    shutil.copy(image_run.folder / "recipe.yaml", bare)
    shutil.copytree(image_run.folder, mangled)
    for folder in (mangled / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    for folder, says in ((bare, "no checkpoint"), (mangled, "pickle"), (tmp_path, "no recipe.yaml")):
        for name in ("sample", "evaluate", "report"):
            done = command(name, folder)
            assert done.exit_code == 4, done.stderr
            assert says in done.stderr
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite(command):
    done = command(
        "train", "gaussians", *TINY, "training.steps=50", "training.lr=1e30", "training.clip=null", "--run", "run"
    )
    assert done.exit_code == 5
    assert "not finite" in done.stderr
    assert "run/failed-step" in done.stderr


def test_an_error_of_our_own_is_said_to_be_one(command, monkeypatch):
    def broken(*_args, **_options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("undiffuse.recipes.load.read_tree", broken)
    done = command("recipes", "show", "digits")
    assert done.exit_code == console.BUG
    assert "inside undiffuse: ZeroDivisionError: oh" in done.stderr
    assert "--debug" in done.stderr
    shown = command("--debug", "recipes", "show", "digits")
    assert "Traceback" in shown.stderr
    assert "in broken" in shown.stderr


def test_train_json_and_quiet(command):
    done = command("train", "gaussians", *TINY, "--run", "a", "--json")
    record = done.json()
    assert record["run"] == "a"
    assert (record["step"], record["stopped"]) == (2, False)
    quiet = command("train", "gaussians", *TINY, "--run", "b", "--quiet")
    assert quiet.exit_code == 0
    assert quiet.stdout + quiet.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_makes_a_checkpoint_and_the_same_command_goes_on(process, tmp_path, number, code):
    words = ["train", "gaussians", *TINY, "training.steps=100000", "training.checkpoint_every=100000", "--run", "run"]
    job = process(*words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(job.pid, number)
    out, error = job.communicate(timeout=300)
    assert job.returncode == code, error
    assert "To go on" in out
    assert "Traceback" not in error
    (step,) = ud.load_run(tmp_path / "run").checkpoints()
    assert f"stopped at step {step:,}" in out
    longer = process(*words[:-2], f"training.steps={step + 2}", "--run", "run", "--json")
    out, error = longer.communicate(timeout=600)
    assert longer.returncode == 0, error
    assert json.loads(out)["step"] == step + 2
    assert f"resuming from step {step:,}" in error


def test_options_that_torchrun_would_take_for_its_own_have_another_name(command):
    from torch.distributed.run import get_args_parser

    for name in ("train", "sample", "evaluate", "report", "demo"):
        lines = command(name, "--help").stdout.split("Options:")[1].splitlines()
        groups = [re.findall(r"--[a-z0-9-]+", line.split("  ")[1]) for line in lines if line.startswith("  -")]
        assert groups
        for group in groups:
            assert group == ["--help"] or any(_passes(get_args_parser(), name, option) for option in group), group


def _passes(parser, name, option):
    try:
        return option in parser.parse_args(["-m", "undiffuse.cli", name, "x", option]).training_script_args
    except SystemExit:
        return False


def test_two_processes_train_as_one(command, process, tmp_path):
    more = ["training.steps=5", "training.schedule=constant"]
    job = process("train", "gaussians", *TINY, *more, "--json", processes=2)
    out, error = job.communicate(timeout=600)
    assert job.returncode == 0, error
    two = ud.load_run(tmp_path / json.loads(out)["run"])  # one folder, agreed on by both
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert command("train", "gaussians", *TINY, *more, "--run", "one").exit_code == 0
    losses = [[line["loss"] for line in run.metrics()] for run in (ud.load_run(tmp_path / "one"), two)]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_evaluate_as_one(plane_run, command, process, tmp_path):
    values = []
    for processes in (2, 1):
        folder = tmp_path / f"run{processes}"
        shutil.copytree(plane_run.folder, folder)
        words = ["evaluate", folder, "--samples", 60, "--metrics", "frechet", "data.n=200", "--json"]
        job = process(*words, processes=processes)
        out, error = job.communicate(timeout=600)
        assert job.returncode == 0, error
        values.append(json.loads(out)["results"][0]["value"])
        assert len((folder / "evaluation.jsonl").read_text().splitlines()) == 1
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_the_commands_on_the_page_make_the_same_recipe(tmp_path):
    for changes in (
        ["training.steps=7", "sampling.solver=heun", "model.net.width=48"],
        ["path=linear", "model.prediction=velocity"],
    ):
        run = ud.Run(tmp_path, ud.load_recipe("digits", changes).resolved())
        words = recipe_arguments(run.recipe, "runs/x")
        if words == ["runs/x/recipe.yaml"]:
            assert changes[0] == "path=linear"
            continue
        assert ud.load_recipe(words[0], words[1:]).resolved() == run.recipe
    assert commands(run)[0].startswith("undiffuse train")


def test_progress_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Console().progress("training", "steps") as bar:
        for step in range(0, 101, 10):
            bar.to(step, 100, note="loss 1")
            now[0] += 5.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 20/100  2 steps/s  0:40 left  loss 1"
    assert lines[-1] == "training: 100/100  2 steps/s  loss 1"
    assert len(lines) == 5  # every ten seconds, not every call


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = console.Console(as_json=True)
    out.say("hello")
    out.table("t", ["a"], [["1"]])
    out.result({"a": 1})
    with out.progress("x", "steps") as bar:
        bar.to(10, 10)
    assert capsys.readouterr() == ("", "")
    console.complain("error: mine")  # its own error it does report
    assert "[process 1] error: mine" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (73, "1:13"), (7509, "2:05:09")])
def test_clock(seconds, text):
    assert console.clock(seconds) == text
