"""Guiding by a classifier, on the command line: what is drawn, how it is recorded, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import undiffuse as ud
from cli.conftest import npz
from cli.test_edit import read, saved
from recipes.tiny import image_folder, overrides

# Trained far enough that states, noise levels and classes matter.
LONGER = ["training.steps=12", "training.lr=0.02", "training.ema=[1]", "training.ema_ramp=10"]
# A network of clean data stays in their range however little it was trained.
PLAIN = [*overrides("score-sde-digits"), *LONGER, "model.net.dropout=0", "model.prediction=data"]
GUIDE = [*overrides("classifier-digits"), *LONGER]
TOLD = [*GUIDE, "training.steps=80", "training.batch=64", "training.checkpoint_every=40", "model.net.width=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(place) -> ud.Run:
    """An unconditional denoiser."""
    return ud.train(ud.load_recipe("score-sde-digits", [*PLAIN, "model.conditional=false"]), place / "plain")


@pytest.fixture(scope="module")
def guide(place) -> ud.Run:
    """A classifier whose gradients can be seen."""
    return ud.train(ud.load_recipe("classifier-digits", TOLD), place / "guide")


@pytest.fixture(scope="module")
def energy(place) -> ud.Run:
    return ud.train(ud.load_recipe("ebm-ring", [*overrides("ebm-ring"), "data.n=100"]), place / "energy")


def words(plain, guide, *more):
    return ["sample", plain.folder, "--classifier", guide.folder, *more]


def drawn(plain, guide, scale, label=7, seeds=(3, 8, 9, 10)):
    """The same by the library."""
    model = ud.ClassifierGuidance(plain.denoiser(), guide.classifier(), scale)
    cond = torch.full((len(seeds),), label)
    options = {"solver": "ddim", "steps": 3, "grid": "time", "seed": list(seeds), "cond": cond}
    return ud.sample(model, (len(seeds), 1, 8, 8), **options).numpy()


@pytest.mark.parametrize(("flags", "scale"), [([], 1.0), (["--classifier-scale", -2.5], -2.5)])
def test_what_the_command_draws_is_what_the_library_draws(plain, guide, command, tmp_path, flags, scale):
    seeds = ["--label", 7, "--seeds", "3,8-10", "--format", "npz", "--out", "out", "--json"]
    done = command(*words(plain, guide, *flags, *seeds))
    assert done.exit_code == 0, done.stderr
    arrays, wanted = npz(tmp_path / "out"), drawn(plain, guide, scale)
    assert np.abs(arrays["samples"] - wanted).max() <= 1e-4
    assert arrays["labels"].tolist() == [7] * 4
    # 1 % more of the scale, another class and no guide at all are other samples.
    for other in (drawn(plain, guide, 1.01 * scale), drawn(plain, guide, scale, label=6), drawn(plain, guide, 0.0)):
        assert np.abs(wanted - other).max() > 1e-3
    told = json.loads((tmp_path / "out/sampling.json").read_text())["classifier"]
    assert told == done.json()["classifier"]
    assert (told["recipe"], told["scale"], told["step"]) == ("classifier-digits", scale, 80)
    assert (told["ema"], len(told["weights"])) == ("half-life-1", 16)
    assert done.json()["nfe"] == 3
    assert f"at scale {scale:g}" in done.stderr


def test_what_guided_is_part_of_how_samples_were_made(plain, guide, command, tmp_path):
    asked = ["--label", 2, "--seeds", "0-9", "--format", "npz", "--batch-size", 4, "--json"]
    first = command(*words(plain, guide, *asked))
    assert first.exit_code == 0, first.stderr
    again = command(*words(plain, guide, *asked))
    assert (again.json()["out"], again.json()["new"]) == (first.json()["out"], 0)
    places = {first.json()["out"]}
    for more in (["--classifier-scale", 2], ["--label", 3]):
        places.add(command(*words(plain, guide, *asked, *more)).json()["out"])
    assert len(places) == 3
    refused = command(*words(plain, guide, *asked, "--classifier-scale", 2, "--out", first.json()["out"]))
    assert refused.exit_code == 4
    assert re.search(r"made otherwise: classifier was \{.*'scale': 1.0\}, is \{.*'scale': 2.0\}", refused.stderr)
    # What was interrupted goes on, and is the same.
    whole = npz(tmp_path / first.json()["out"])
    shutil.copytree(first.json()["out"], tmp_path / "part")
    (tmp_path / "part/samples.npz").unlink()
    part = command(*words(plain, guide, *asked, "--out", "part"))
    assert part.json()["new"] == 10
    assert np.array_equal(npz(tmp_path / "part")["samples"], whole["samples"])


def test_two_processes_draw_what_one_draws(plain, guide, command, process, tmp_path):
    asked = words(plain, guide, "--label", 4, "--seeds", "0-8", "--batch-size", 4, "--format", "npz")
    job = process(*asked, "--out", "two", "--json", processes=2)
    out, error = job.communicate(timeout=600)
    assert job.returncode == 0, error
    assert json.loads(out)["n"] == 9
    assert command(*asked, "--out", "one").exit_code == 0
    one, two = npz(tmp_path / "one"), npz(tmp_path / "two")
    assert np.array_equal(one["labels"], two["labels"])
    assert np.abs(one["samples"] - two["samples"]).max() <= 1e-4


def test_a_grid_of_guided_samples_and_a_note_of_other_data(plain, guide, place, command, tmp_path):
    fewer = ud.train(ud.load_recipe("classifier-digits", [*GUIDE, "data.limit=200"]), place / "fewer")
    done = command(*words(plain, fewer, "--label", 1, "--seeds", "0-19", "--out", "out"))
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out/grid.png").is_file()
    assert "other data" in done.stdout
    assert "other data" not in command(*words(plain, guide, "--label", 1, "--seeds", "0", "--out", "same")).stdout


def test_edits_are_guided_as_in_the_library(plain, guide, command, tmp_path):
    given = saved(tmp_path / "a.png", (8, 8))
    flags = ["--steps", 4, "--n", 2, "--seed", 5, "--out", "out", "--json", "--label", 7, "--classifier-scale", 3]
    done = command(
        "edit", plain.folder, "inpaint", "a.png", "--box", "2,1,6,4", "--classifier", guide.folder, *flags
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.json()["classifier"]["scale"] == 3.0
    known = torch.ones(1, 8, 8, dtype=torch.bool)
    known[:, 1:4, 2:6] = False
    model = ud.ClassifierGuidance(plain.denoiser(), guide.classifier(), 3.0)
    x = torch.from_numpy(given.astype(np.float32))[None, None].expand(2, 1, 8, 8) / 127.5 - 1
    options = {"solver": "ddpm", "steps": 4, "seed": [5, 6]}
    guided = ud.inpaint(model, x, known, cond=torch.full((2,), 7), **options)
    free = ud.inpaint(plain.denoiser(), x, known, **options)
    for i, seed in enumerate((5, 6)):
        got = read(f"out/a-{seed}.png")
        wanted, other = (np.clip((y[i, 0].numpy() + 1) * 127.5, 0, 255).round() for y in (guided, free))
        assert np.abs(got - wanted).max() <= 1
        assert np.abs(got - other)[1:4, 2:6].max() > 5


def other_guide(place, name, *more):
    return ud.train(ud.load_recipe("classifier-digits", [*GUIDE, "training.steps=1", *more]), place / name)


def test_a_classifier_of_another_path_is_refused(plain, place, command):
    run = other_guide(place, "other-path", "path.beta_max=10.0")
    done = command(*words(plain, run, "--label", 3))
    assert done.exit_code == 2
    assert f"the classifier {run.folder} was trained on the path VP(beta_min=0.1, beta_max=10.0, " in done.stderr
    assert f"and {plain.folder} on VP(beta_min=0.1, beta_max=20.0, " in done.stderr
    override = re.search(r"Train one on it: undiffuse train classifier-digits '(path=[^']*)'; or", done.stderr)
    assert override is not None
    assert ud.load_recipe("classifier-digits", [override[1]]).path() == plain.recipe.path()
    assert "ud.on_path" in done.stderr


def test_a_classifier_of_data_of_another_shape_or_other_classes_is_refused(plain, place, command):
    folder = image_folder(place / "pictures", n=16, side=8)
    data = [f"data={{source: folder, path: {folder}, size: 8}}"]
    run = other_guide(place, "colours", *data)
    done = command(*words(plain, run, "--label", 1))
    assert done.exit_code == 2
    assert f"{run.folder} was trained on data of shape [3, 8, 8], and {plain.folder} on [1, 8, 8]" in done.stderr
    dropped = [*PLAIN, "training.cond_dropout=0.5", "training.steps=1"]
    both = ud.train(ud.load_recipe("score-sde-digits", dropped), place / "both")
    run = other_guide(place, "two-classes", f"data={{source: folder, path: {folder}, size: 8, channels: 1}}")
    done = command(*words(both, run, "--label", 1))
    assert done.exit_code == 2
    assert (
        f"{run.folder} tells 2 classes apart, ['cat', 'dog'], and {both.folder} was trained on 10, ['0'" in done.stderr
    )
    # Where the classes cannot be compared, the difference of the data is said.
    assert "other data" in command(*words(plain, run, "--label", 1, "--seeds", 0)).stdout


def test_a_model_that_never_saw_data_without_a_class_is_refused_and_one_that_did_is_guided(guide, place, command):
    only = ud.train(ud.load_recipe("score-sde-digits", [*PLAIN, "training.steps=1"]), place / "only")
    done = command(*words(only, guide, "--label", 3))
    assert done.exit_code == 2
    assert f"{only.folder} was trained with classes and never without: --label chooses one" in done.stderr
    assert "model.conditional=false" in done.stderr
    dropped = [*PLAIN, "training.cond_dropout=0.5", "training.steps=3"]
    both = ud.train(ud.load_recipe("score-sde-digits", dropped), place / "dropped")
    done = command(*words(both, guide, "--label", 3, "--seeds", 0, "--format", "npz", "--out", "out"))
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--classifier", "GUIDE"], "no --label is given: --classifier guides to one class, expected --label 0 ... 9"),
        (["--classifier", "GUIDE", "--label", 10], "--label 10: --classifier guides to one class, expected --label 0"),
        (["--classifier", "GUIDE", "--label", -1], "--label -1: --classifier guides to one class"),
        (
            ["--classifier", "GUIDE", "--label", 3, "--classifier-scale", "nan"],
            "--classifier-scale nan: expected a",
        ),
        (["--classifier", "GUIDE", "--label", 3, "--classifier-scale", "-inf"], "--classifier-scale -inf: expected a"),
        (["--classifier-scale", 2], "--classifier-scale 2 belongs to --classifier RUN, which is not given"),
        (["--label", 3], "label 3: this model knows none"),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "edit"])
def test_wrong_options_are_explained(plain, guide, command, tmp_path, verb, flags, says):
    saved(tmp_path / "a.png", (8, 8))
    given = [guide.folder if flag == "GUIDE" else flag for flag in flags]
    start = {"sample": [plain.folder], "edit": [plain.folder, "inpaint", "a.png", "--box", "0,0,4,4"]}[verb]
    done = command(verb, *start, *given)
    assert done.exit_code == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("run", "other", "code", "says"),
    [
        ("plain", "plain", 4, "plain trained a denoiser: expected the run of a classifier of noisy data. Train one on"),
        (
            "plain",
            "energy",
            4,
            "energy trained an energy: expected the run of a classifier of noisy data. Train one on",
        ),
        (
            "guide",
            "guide",
            4,
            "guide trained a classifier, no denoiser: use run.classifier(), or guide the samples of a",
        ),
        ("energy", "guide", 4, "energy trained an energy: a classifier guides the samples of a denoiser; give a run"),
        ("plain", "nowhere", 4, "there is no run folder 'nowhere'"),
    ],
)
def test_runs_of_another_kind_are_refused(plain, guide, energy, command, run, other, code, says):
    runs = {"plain": plain.folder, "guide": guide.folder, "energy": energy.folder, "nowhere": "nowhere"}
    done = command("sample", runs[run], "--classifier", runs[other], "--label", 3)
    assert done.exit_code == code, done.stderr
    assert says in done.stderr
    # What it says to train is on the path of the denoiser.
    advice = re.search(r"undiffuse train RECIPE '(path=[^']*)'", done.stderr)
    assert (advice is None) == (run != "plain" or other == "nowhere")
    if advice is not None:
        assert ud.load_recipe("classifier-digits", [advice[1]]).path() == plain.recipe.path()


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["sample", "GUIDE"], 4, "trained a classifier, no denoiser: use run.classifier(), or guide the samples of a"),
        (["likelihood", "GUIDE"], 4, "undiffuse sample RUN --classifier"),
        (["report", "GUIDE"], 4, "trained a classifier, no denoiser"),
        (["edit", "GUIDE", "colourise", "a.png"], 2, "trained a classifier; edit needs a denoiser, of whole pictures"),
        (["train", "score-sde-digits", "--run", "GUIDE"], 4, "the recipe has changed since run folder"),
        (["sample", "GUIDE", "--solver", "heun"], 4, "trained a classifier, no denoiser"),
        (["evaluate", "GUIDE", "--solver", "heun"], 2, "--solver: "),
        (
            ["evaluate", "GUIDE", "--metrics", "frechet"],
            2,
            "unknown metric 'frechet' where model.kind is",
        ),
        (["evaluate", "GUIDE", "evaluation.metrics=[acuracy]"], 2, "Did you mean 'accuracy'?"),
        (["evaluate", "GUIDE", "evaluation.metrics=[]"], 2, "evaluation.metrics"),
        (["evaluate", "GUIDE", "--batch-size", 0], 2, "--batch-size 0"),
    ],
)
def test_commands_that_a_classifier_has_no_answer_to(guide, command, line, code, says):
    done = command(*[guide.folder if word == "GUIDE" else word for word in line])
    assert done.exit_code == code, done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (
            ["likelihood", "ENERGY"],
            4,
            "trained an energy, no denoiser: use run.energy(), or draw from it: undiffuse samp",
        ),
        (["edit", "ENERGY", "colourise", "a.png"], 2, "trained an energy; edit needs a denoiser, of whole pictures"),
        (["evaluate", "ENERGY", "--corrector", "langevin"], 2, "its chains have no corrector"),
        (["evaluate", "ENERGY", "--metrics", "accuracy"], 2, "'accuracy' where model.kind is energy"),
    ],
)
def test_commands_that_an_energy_has_no_answer_to(energy, command, line, code, says):
    done = command(*[energy.folder if word == "ENERGY" else word for word in line])
    assert done.exit_code == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def without_time(result):
    return {key: value for key, value in result.items() if key != "at"}


def test_from_training_to_figures(command, tmp_path):
    done = command("train", "classifier-digits", *GUIDE, "--run", "run")
    assert done.exit_code == 0, done.stderr
    assert "undiffuse sample RUN --classifier run --label 0" in done.stdout
    measured = command("evaluate", "run", "--n", 300, "--json")
    assert measured.exit_code == 0, measured.stderr
    loss, accuracy = measured.json()["results"]
    assert (loss["name"], accuracy["name"]) == ("cross-entropy", "accuracy")
    protocol = loss["protocol"]
    assert (protocol["n"], protocol["split"], protocol["path"]) == (300, "held-out", repr(ud.VP(0.1, 20.0)))
    assert [level["t"] for level in accuracy["extra"]["levels"]] == pytest.approx(
        [0.1009, 0.3007, 0.5005, 0.7003, 0.9001]
    )
    assert ud.load_run(tmp_path / "run").evaluations() == measured.json()["results"]
    # What is asked for alone is the same figure, and nothing else is recorded.
    for words, wanted in (
        (["evaluation.metrics=[accuracy]"], [accuracy]),
        (["--metrics", "accuracy,cross-entropy"], [accuracy, loss]),
        (["--metrics", "cross-entropy"], [loss]),
    ):
        alone = command("evaluate", "run", "--n", 300, "--json", *words)
        assert [without_time(one) for one in alone.json()["results"]] == [without_time(one) for one in wanted]
    names = [one["name"] for one in ud.load_run(tmp_path / "run").evaluations()]
    assert names == ["cross-entropy", "accuracy", "accuracy", "accuracy", "cross-entropy", "cross-entropy"]
    said = command("evaluate", "run", "--n", 300, "--metrics", "cross-entropy").stdout
    assert f"cross entropy {loss['value']:.4f}" in said
    assert "noise level" not in said
    # The figure is that of the library, at other times and noises.
    run = ud.load_run(tmp_path / "run")
    x, labels = run.recipe.data("held-out").batch(torch.arange(300))
    with torch.no_grad():
        again = [run.recipe.objective()(run.classifier(), x, labels, ud.Streams.of(k, 300)) for k in range(40, 60)]
    own = torch.stack(again).double()
    error = float(own.std(0).square().sum().sqrt()) / 300  # of one draw of each row
    assert abs(loss["value"] - float(own.mean())) < 4 * error / loss["settings"]["draws"] ** 0.5 < 0.05 * loss["value"]
