"""Recipes: every one loads, round-trips and takes a step; what is wrong is named, with the nearest right thing."""

import math

import pytest
import torch
import yaml

import undiffuse as ud
from recipes.tiny import image_folder, overrides, parquet
from undiffuse.core.errors import RecipeError
from undiffuse.data import Loader
from undiffuse.paths.levels import count_levels, levels_from_data
from undiffuse.recipes import Recipe, build, list_recipes
from undiffuse.recipes.datasets import check_levels, dequantiser
from undiffuse.recipes.text import flatten, parse_yaml
from undiffuse.training import TrainConfig

ALL = sorted(list_recipes())
DENOISERS = [name for name in ALL if ud.load_recipe(name).kind == "denoiser"]


def data_of(name, tmp_path):
    """Overrides that give a recipe data to read."""
    if name == "folder" or name.startswith("score-sde-celebahq"):
        return [f"data.path={image_folder(tmp_path / 'images')}", "data.size=16"]
    if name in ("mnist", "ebm-mnist", "ncsn-mnist", "classifier-mnist") or name.startswith("score-sde-mnist"):
        return [f"data.path={parquet(tmp_path / 'mnist', 'image', (28, 28))}"]
    if name == "cifar10" or name.startswith("score-sde-cifar10"):
        return [f"data.path={parquet(tmp_path / 'cifar', 'image', (32, 32, 3))}"]
    return []


def test_the_promised_recipes_are_there():
    assert {
        "digits",
        "gaussians",
        "mnist",
        "cifar10",
        "folder",
        "ddpm-digits",
        "ncsn-digits",
        "ncsn-mnist",
        "score-sde-digits",
        "score-sde-digits-ve",
        "score-sde-digits-vp",
        "score-sde-digits-subvp",
        "flow-digits",
        "classifier-digits",
        "classifier-mnist",
    } <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_says_its_name_and_what_it_is(name):
    assert ud.load_recipe(name).name == name
    assert 20 <= len(list_recipes()[name]) <= 120


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_round_trips_with_every_value_written(name):
    recipe = ud.load_recipe(name)
    text = recipe.to_yaml()
    assert Recipe.from_tree(parse_yaml(text, "own")) == recipe
    # Any reader of YAML finds the same numbers, not only ours.
    assert flatten(yaml.safe_load(text)) == flatten(recipe.to_dict())
    assert set(recipe.settings.training) == set(TrainConfig.__dataclass_fields__) - {"seed"}


@pytest.mark.parametrize("name", DENOISERS)
def test_every_recipe_takes_a_step_that_lowers_its_loss(name, tmp_path):
    still = [] if name == "gaussians" else ["model.net.dropout=0"]
    recipe = ud.load_recipe(name, [*overrides(name, data_of(name, tmp_path)), *still])
    dataset = recipe.data()
    model = recipe.model(dataset)
    objective = recipe.objective()
    x, cond = dataset.batch(torch.arange(8))

    def loss():
        return objective(model, x, cond, ud.Streams.of(1, 8)).mean()

    before = loss()
    assert math.isfinite(float(before.detach()))
    # The output layer starts at zero: along the gradient there, a small step goes down by what they say.
    gradients = torch.autograd.grad(before, list(model.parameters()), allow_unused=True)
    size = sum(float(g.square().sum()) for g in gradients if g is not None)
    assert size > 0
    rate = 1e-4 * float(before.detach()) / size
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients):
            if gradient is not None:
                parameter -= rate * gradient
    assert float((before - loss()).detach()) == pytest.approx(rate * size, rel=0.1)


def test_a_marginal_target_knows_the_training_data():
    recipe = ud.load_recipe("digits", overrides("digits"))
    dataset = recipe.data()
    x, label = dataset.batch(torch.arange(len(dataset)))
    target = recipe.objective().target
    t = torch.tensor(80.0)  # so noisy that the mean is that of the class
    guess = target(80.0 * torch.ones(1, 1, 8, 8) / 1e3, t, torch.tensor([3]))
    torch.testing.assert_close(guess[0], x[label == 3].mean(0), atol=2e-3, rtol=0)
    plain = ud.load_recipe("digits", [*overrides("digits"), "objective.target=conditional"])
    assert plain.objective(dataset).target is None
    assert "target" not in plain.to_dict()["objective"]
    assert recipe.to_dict()["objective"]["target"] == "marginal"


def test_a_marginal_target_on_every_path(tmp_path):
    for name in DENOISERS:
        chosen = [*overrides(name, data_of(name, tmp_path)), "objective.target=marginal"]
        chosen += ["data.flip=false", "data.dequantise=null"]
        recipe = ud.load_recipe(name, chosen)
        dataset = recipe.data()
        x, cond = dataset.batch(torch.arange(4))
        losses = recipe.objective(dataset)(recipe.model(dataset), x, cond, ud.Streams.of(1, 4))
        assert bool(torch.isfinite(losses).all())


def test_a_marginal_target_refuses_mirrored_images():
    with pytest.raises(RecipeError, match=r"'marginal' with data.flip: .* set objective.target to \"conditional\""):
        ud.load_recipe("digits", [*overrides("digits"), "data.flip=true"])
    with pytest.raises(RecipeError, match=r"'marginal' with data.dequantise"):
        ud.load_recipe("digits", [*overrides("digits"), "data.dequantise=17"])
    with pytest.raises(RecipeError, match=r"objective\.target = 'margin'"):
        ud.load_recipe("digits", ["objective.target=margin"])


def test_values_are_dequantised_where_training_draws_them():
    """Digits have 17 values: what training sees is `2 (k + u) / 17 - 1`, u uniform, another one at each step."""
    recipe = ud.load_recipe("ddpm-digits", ["data.dequantise=17"])
    assert "dequantise" not in ud.load_recipe("ddpm-digits").to_dict()["data"]
    dataset = recipe.data()
    plain, dequantised = (Loader(dataset, 64, seed=1, change=f) for f in (None, dequantiser(recipe.settings)))
    shares = []
    for step in range(3):
        k = (plain.batch(step)[0].double() + 1) * 8
        shares.append((dequantised.batch(step)[0].double() + 1) * 8.5 - k)
    u = torch.stack(shares).flatten()
    assert float(u.min()) > -1e-5
    assert float(u.max()) < 1 + 1e-5
    # 12,288 uniform numbers: 4 standard errors of the mean and of the mean square.
    assert abs(float(u.mean()) - 1 / 2) < 4 * (1 / 12 / len(u)) ** 0.5
    assert abs(float(u.square().mean()) - 1 / 3) < 4 * (4 / 45 / len(u)) ** 0.5
    assert not torch.allclose(shares[0], shares[1])
    check_levels(recipe.settings, dataset)
    for wrong in (256, 33):  # 33 values would hold the 17, each at another place
        with pytest.raises(
            RecipeError, match=rf"data.dequantise = {wrong}: the data 'digits' have 17 values; write 17"
        ):
            check_levels(ud.load_recipe("ddpm-digits", [f"data.dequantise={wrong}"]).settings, dataset)


def test_a_marginal_target_needs_its_data_in_memory(monkeypatch):
    monkeypatch.setattr("undiffuse.recipes.build.free_memory", lambda: 1000)
    with pytest.raises(RecipeError, match=r"keeps the data in memory: 0\.0006\d+ GiB, of which .* are free; set"):
        ud.load_recipe("digits", overrides("digits")).objective()


def test_the_data_fill_in_the_network():
    recipe = ud.load_recipe("digits", overrides("digits"))
    assert recipe.settings.facts is None
    full = recipe.resolved()
    assert full.settings.facts.shape == [1, 8, 8]
    assert full.settings.model.net["shape"] == [1, 8, 8]
    assert full.settings.model.net["num_classes"] == 10
    assert Recipe.from_tree(parse_yaml(full.to_yaml(), "own")) == full


def test_a_resolved_recipe_builds_its_model_without_data(tmp_path):
    folder = image_folder(tmp_path / "images")
    full = ud.load_recipe("folder", overrides("folder", [f"data.path={folder}", "data.size=16"])).resolved()
    for file in folder.rglob("*.png"):
        file.unlink()
    assert full.model().net.shape == (3, 16, 16)
    assert full.settings.facts.class_names == ["cat", "dog"]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_folder_recipe_takes_the_usual_sizes(tmp_path, size):
    """Word for word as the README writes it."""
    folder = image_folder(tmp_path / "photos")
    model = ud.load_recipe("folder", [f"data.path={folder}", f"data.size={size}"]).model()
    assert model.net.shape == (3, size, size)


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (
        ud.load_recipe("gaussians", [*overrides("gaussians"), f"seed={seed}"]).model() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_labels_a_recipe_is_unconditional():
    recipe = ud.load_recipe("digits", [*overrides("digits"), "model.conditional=false"])
    dataset = recipe.data()
    assert dataset.batch(torch.arange(3))[1] is None
    assert recipe.resolved(dataset).settings.model.net["num_classes"] is None


def test_the_network_may_not_contradict_the_data():
    with pytest.raises(RecipeError, match=r"model.net.num_classes = 3.*have 10"):
        ud.load_recipe("digits", [*overrides("digits"), "model.net.num_classes=3"]).model()
    with pytest.raises(RecipeError, match="divisible"):
        ud.load_recipe("digits", ["model.net.multipliers=[1, 1, 1, 1, 1]", "model.net.attention=[]"]).model()


def test_the_edm_weight_takes_the_models_sigma_data_unless_told():
    assert ud.load_recipe("digits", ["model.sigma_data=0.7"]).settings.objective.weight["sigma_data"] == 0.7
    told = ud.load_recipe("digits", ["model.sigma_data=0.7", "objective.weight.sigma_data=0.3"])
    assert told.settings.objective.weight["sigma_data"] == 0.3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.leanring_rate=1", "unknown key 'training.leanring_rate'. Did you mean 'training.lr'?"),
        ("training.stesp=1", "Did you mean 'training.steps'?"),
        ("lr=1", "Did you mean 'training.lr'?"),
        ("epochs=1", "Did you mean 'training.steps'?"),
        ("model.nett.width=3", "Did you mean 'model.net'?"),
        ("model.net.widht=3", "Did you mean 'model.net.width'?"),
        ("sampling.gird=time", "Did you mean 'sampling.grid'?"),
        ("objective.time.stdd=1", "Did you mean 'objective.time.std'?"),
        ("data.sise=3", "Did you mean 'data.size'?"),
        ("path.sigma_mn=1", "Did you mean 'path.sigma_min'?"),
        ("path=karas", "Did you mean 'karras'?"),
        ("objective.weight=simpel", "unknown weight 'simpel'. Did you mean 'simple'?"),
        ("sampling.solver=huen", "Did you mean 'heun'?"),
        ("sampling.grid=tme", "Did you mean 'time'?"),
        ("model.net.name=unett", "Did you mean 'unet'?"),
        ("model.prediction=velocty", "Did you mean 'velocity'?"),
        ("evaluation.metrics=[frechett]", "Did you mean 'frechet'?"),
        ("training.precision=fp16", "expected fp32 or bf16"),
        ("training.steps=abc", "training.steps = 'abc': must be a valid integer"),
        ("training.steps=1.5", "training.steps = 1.5"),
        ("training.steps='3'", "training.steps = '3'"),
        ("training.steps=true", "training.steps = True"),
        ("training.steps=0", "training.steps is 0: expected an integer >= 1"),
        ("training.lr=.inf", "training.lr = inf"),
        ("training.lr=.nan", "training.lr = nan"),
        ("path.sigma_min=-1", "expected 0 < sigma_min < sigma_max"),
        ("sampling.steps=0", "sampling.steps = 0: must be greater than or equal to 1"),
        ("seed=-1", "seed = -1: must be greater than or equal to 0"),
        ("name=A B", "name = 'A B'"),
        ("model.sigma_data=0", "model.sigma_data = 0: must be greater than 0"),
        ("model.net.input_fourier=[7]", "as 'noise-unscaled' gives it"),
        ("data.flip=1", "data.flip = 1: must be true or false"),
        ("data.dequantise=1", "data.dequantise = 1: must be the number of values per pixel, 256 for bytes"),
        ("data.dequantise=true", "data.dequantise = True: must be the number"),
        ("path=3", "path = 3"),
        ("path={sigma_min: 1}", "'name'"),
        ("data=digits", "data = 'digits'"),
        ("evaluation.metrics=[]", "evaluation.metrics = []"),
    ],
)
def test_what_is_wrong_is_named(override, says):
    with pytest.raises(RecipeError) as error:
        ud.load_recipe("digits", [override])
    assert says in str(error.value)


def test_a_missing_section_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndata: {source: digits}\npath: vp\n")
    with pytest.raises(RecipeError, match="'model' is required"):
        ud.load_recipe(file)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndata: {source: moons}\npath: vp\nmodel: {net: mlp}\n")
    recipe = ud.load_recipe(str(file), ["path.beta_max=10"])
    assert recipe.path() == ud.VP(beta_max=10.0)
    assert recipe.settings.model.net["hidden"] == 128


def written(folder, **files):
    """Recipe files by name, of one line each."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}\n")
    return folder


def test_a_recipe_extends_another_by_name_or_file(tmp_path):
    written(tmp_path, mine="extends: digits\ntraining: {steps: 7}\npath: ve\ndescription: of my own")
    written(tmp_path, deeper="extends: mine.yaml\nmodel: {net: {width: 48}}\ntraining: {batch: 9}")
    deeper = ud.load_recipe(tmp_path / "deeper.yaml", ["seed=3"])
    expected = ["seed=3", "name=deeper", "training.steps=7", "training.batch=9", "model.net.width=48", "description=''"]
    assert deeper == ud.load_recipe("digits", [*expected, "path={name: ve}"])
    assert ud.load_recipe(tmp_path / "mine.yaml").settings.description == "of my own"
    # What is written out needs no other file.
    written(tmp_path, mine="")
    assert Recipe.from_tree(parse_yaml(deeper.to_yaml(), "own")) == deeper


KIND = "model: {kind: classifier, net: {name: classifier-conv, width: 4}}\nobjective: {name: noisy-classification}"


def test_one_of_another_kind_takes_the_data_the_path_and_the_training_only(tmp_path):
    written(tmp_path, base="extends: score-sde-digits-ve\nseed: 5\nevaluation: {n: 77, metrics: [frechet]}")
    written(tmp_path, mine=f"extends: base.yaml\n{KIND}\ntraining: {{steps: 7}}")
    base, mine = (ud.load_recipe(tmp_path / f"{name}.yaml") for name in ("base", "mine"))
    assert (base.kind, mine.kind) == ("denoiser", "classifier")
    assert mine.path() == base.path()
    assert mine.settings.seed == 5
    assert mine.settings.data == base.settings.data
    assert mine.settings.training == base.settings.training | {"steps": 7}
    ours = ud.load_recipe("classifier-digits", ["model.net={name: classifier-conv, width: 4}", "evaluation.split=null"])
    assert mine.settings.model == ours.settings.model
    assert mine.settings.sampling == ours.settings.sampling
    assert (mine.settings.evaluation.metrics, mine.settings.evaluation.n) == (["cross-entropy", "accuracy"], 10_000)
    # And on: what extends that is a classifier without saying so, and a denoiser may extend it back.
    written(tmp_path, more="extends: mine.yaml\nmodel: {net: {width: 6}}\nevaluation: {metrics: [accuracy]}")
    more = ud.load_recipe(tmp_path / "more.yaml")
    assert (more.kind, more.settings.model.net["width"]) == ("classifier", 6)
    assert more.settings.objective == mine.settings.objective
    written(tmp_path, back="extends: mine.yaml\nmodel: {kind: denoiser, net: unet}")
    back = ud.load_recipe(tmp_path / "back.yaml")
    assert (back.kind, back.path(), back.settings.objective.time) == ("denoiser", base.path(), {"name": "uniform"})
    # The kind that is there already, said or not, is no other.
    written(tmp_path, same="extends: score-sde-digits-ve\nmodel: {kind: denoiser, net: {width: 16}}")
    expected = ["name=same", "description=''", "model.net.width=16"]
    assert ud.load_recipe(tmp_path / "same.yaml") == ud.load_recipe("score-sde-digits-ve", expected)
    written(tmp_path, energy="extends: gaussians\nmodel: {kind: energy, net: energy-mlp}\nobjective: {name: x}")
    with pytest.raises(RecipeError, match="write `path: null` where the recipe that this one extends has one"):
        ud.load_recipe(tmp_path / "energy.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: digit", r"mine.yaml, extends 'digit': unknown recipe 'digit'. Did you mean 'digits'"),
        ("extends: digit.yaml", r"mine.yaml, extends 'digit.yaml': there is no recipe file .*digit.yaml"),
        ("extends: mine.yaml", "goes in a circle: mine -> mine"),
        ("extends: other.yaml", "goes in a circle: mine -> other -> mine"),
        ("extends: [digits]", r"extends = \['digits'\]: expected the name of a recipe"),
        ("extends: digits\ntraining: {stesp: 3}", "Did you mean 'training.steps'"),
    ],
)
def test_what_cannot_be_extended(tmp_path, text, says):
    written(tmp_path, mine=text, other="extends: mine.yaml")
    with pytest.raises(RecipeError, match=says):
        ud.load_recipe(tmp_path / "mine.yaml")


def test_a_recipe_that_extends_has_a_name_of_its_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: digits\n")
    with pytest.raises(RecipeError, match="'name' is required"):
        ud.load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(RecipeError, match="'extends' can be written in a recipe's file"):
        ud.load_recipe("digits", ["extends=mnist"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digit", "Did you mean 'digits'?"),
        ("zzz", "Known: cifar10, classifier-digits, classifier-mnist, ddpm-digits, digits"),
        ("no/such.yaml", "no recipe file"),
        ("digits.yml", "no recipe file"),
    ],
)
def test_an_unknown_recipe(name, says):
    with pytest.raises(RecipeError) as error:
        ud.load_recipe(name)
    assert says in str(error.value)


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"its recipe is .*recipe.yaml"):
        ud.load_recipe(tmp_path)


def test_the_axes_are_points_not_classes():
    """DDPM, NCSN, Score SDE, EDM, flow matching: the same classes of objects, other values."""
    chosen = {
        name: ud.load_recipe(name)
        for name in ("ddpm-digits", "ncsn-digits", "score-sde-digits", "digits", "flow-digits")
    }
    assert {type(recipe.objective()) for recipe in chosen.values()} == {ud.Denoising}
    assert {(r.settings.path["name"], r.settings.model.prediction) for r in chosen.values()} == {
        ("tabulated-betas", "noise"),
        ("tabulated-sigmas", "noise"),
        ("vp", "noise"),
        ("karras", "edm"),
        ("linear", "velocity"),
    }
    # Ho et al. 2020, section 4: alpha_bar at the last of the 1000 levels is 4.04e-5.
    last = chosen["ddpm-digits"].path().alpha(torch.tensor(1.0, dtype=torch.float64))
    assert float(last) ** 2 == pytest.approx(4.0358e-5, rel=1e-3)
    # The smallest of NCSN's 24 levels is at t = 1 / 24, and sigma goes straight to 0 before it.
    t = torch.tensor([0.5 / 24, 1 / 24, 1.0], dtype=torch.float64)
    assert chosen["ncsn-digits"].path().sigma(t).tolist() == pytest.approx([0.005, 0.01, 9.63])


def test_ncsn_s_levels_are_those_of_its_data():
    recipe = ud.load_recipe("ncsn-digits")
    dataset = recipe.data()
    levels = levels_from_data(dataset.batch(torch.arange(len(dataset)))[0])
    t = torch.arange(1, len(levels) + 1, dtype=torch.float64) / len(levels)
    assert len(levels) == recipe.settings.path["levels"] == recipe.settings.objective.time["n"]
    assert torch.allclose(recipe.path().sigma(t), levels, rtol=1e-4)
    # MNIST's largest distance is 32 (of 20,000 images).
    mnist = ud.load_recipe("ncsn-mnist", ["data.path=somewhere"]).settings
    assert count_levels(0.01, mnist.path["largest"], 784) == mnist.path["levels"] == mnist.objective.time["n"]


@pytest.mark.parametrize(("name", "data"), [("ncsn-digits", []), ("ncsn-mnist", ["data.path=somewhere"])])
def test_ncsn_is_sampled_at_its_own_levels_and_by_another_solver_when_told(name, data):
    recipe = ud.load_recipe(name, data)
    sampling, path = recipe.settings.sampling, recipe.path()
    grid = build.solver(sampling.solver).default_grid(path, sampling.steps)
    places = grid[:-1] * len(path.table)
    assert torch.allclose(places, places.round())
    changed = ud.load_recipe(name, [*data, "sampling.solver=ddim"])
    assert changed.settings.sampling.solver == {"name": "ddim", "eta": 0.0}
