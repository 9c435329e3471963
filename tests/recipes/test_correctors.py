"""The recipe keys `corrector` and `denoise`: what they draw is what `ud.sample` draws when told the same."""

import pytest
import torch

import undiffuse as ud
from recipes.tiny import overrides
from undiffuse.cli.drawing import How, Model
from undiffuse.core.errors import ArgumentError, RecipeError
from undiffuse.recipes import Recipe
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.schema import FactsSection
from undiffuse.recipes.text import parse_yaml

VE = ["path={name: ve, sigma_min: 0.02, sigma_max: 9.63}", "model.prediction=noise-unscaled"]
PC = ["sampling.solver=reverse-diffusion", "sampling.corrector={name: langevin, snr: 0.1, steps: 2}"]


def recipe_of(*more):
    return ud.load_recipe("score-sde-digits", [*overrides("score-sde-digits"), *VE, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """VE with both keys, trained for a few steps so that the network says something."""
    folder = tmp_path_factory.mktemp("runs") / "ve"
    more = ["training.steps=12", "training.lr=0.02", "training.ema=[1]", "training.ema_ramp=10"]
    return ud.train(recipe_of(*PC, "sampling.denoise=true", *more), folder)


def drawn(run, corrector, denoise):
    return ud.sample(
        run.denoiser(),
        (3, 1, 8, 8),
        seed=[5, 6, 7],
        cond=torch.tensor([5, 6, 7]),
        solver="reverse-diffusion",
        steps=3,
        grid="time",
        corrector=corrector,
        denoise=denoise,
        return_info=True,
    )


def test_the_recipe_s_corrector_is_that_of_sample(run):
    expected = drawn(run, ud.LangevinCorrector(snr=0.1, steps=2), True)
    sampler = Model.load(ud.load_run(run.folder), How(device="cpu")).sampler
    torch.testing.assert_close(sampler([5, 6, 7]), expected.x)
    assert sampler.nfe == expected.nfe == 3 + 3 * 2 + 1
    assert sampler.said == "reverse-diffusion(eta=1.0) + langevin(snr=0.1, steps=2, rule=score), denoised"
    # Each key has its part in that.
    for corrector, denoise in ((ud.LangevinCorrector(snr=0.101, steps=2), True), (None, True)):
        assert (drawn(run, corrector, denoise).x - expected.x).abs().max() > 1e-3
    assert (drawn(run, ud.LangevinCorrector(snr=0.1, steps=2), False).x - expected.x).abs().max() > 1e-2


def test_the_command_may_say_another_or_none(run):
    def sampler(text):
        return Model.load(run, How(corrector=text, device="cpu")).sampler

    assert sampler(None).corrector == {"name": "langevin", "snr": 0.1, "steps": 2, "rule": "score"}
    assert sampler("langevin:snr=0.2,rule=level").corrector["rule"] == "level"
    torch.testing.assert_close(sampler("none")([5, 6, 7]), drawn(run, None, True).x)
    with pytest.raises(RecipeError, match=r"--corrector: unknown corrector 'langevn'. Did you mean 'langevin'"):
        sampler("langevn")
    with pytest.raises(RecipeError, match=r"--corrector: snr is 0.0: expected 0 < snr < 1"):
        sampler("langevin:snr=0")


def test_another_solver_comes_without_the_recipe_s_corrector(run):
    def model(solver=None, corrector=None, changes=None):
        return Model.load(run, How(solver=solver, corrector=corrector, device="cpu"), changes)

    for solver, calls in (("dpmpp-2m", 3), ("tsit5", None)):
        other = model(solver)
        assert other.sampler.corrector is None
        assert other.said.startswith(f"{other.sampler.said}, 3 steps, ")
        left = "corrector langevin(snr=0.1, steps=2, rule=score) and grid time"
        assert f"(without the recipe's {left}: that is for its own solver)" in other.said
        assert calls is None or other.nfe == calls + 1  # and the last denoising, which is the path's
        chosen = {"solver": solver, "steps": 3, "denoise": True}
        options = {"seed": [5, 6, 7], "cond": torch.tensor([5, 6, 7])}
        torch.testing.assert_close(
            other.sampler([5, 6, 7]), ud.sample(run.denoiser(), (3, 1, 8, 8), **chosen, **options)
        )
    # Settings of the same solver keep it, and so does saying it; "none" needs no explanation.
    assert model("reverse-diffusion:eta=0.5").sampler.corrector["snr"] == 0.1
    assert model("stay").sampler.corrector["snr"] == 0.1  # which would do nothing alone
    assert model("dpmpp-2m", "langevin:snr=0.2").sampler.corrector["snr"] == 0.2
    for told in (model(), model("reverse-diffusion"), model("stay")):
        assert told.left_out is None
        assert "without" not in told.said
        assert told.grid == "time"
    for told in (model("dpmpp-2m", "langevin"), model("dpmpp-2m", "none")):
        assert told.left_out == "grid time"
    # So with what `evaluation` says: its corrector is its solver's.
    its = {"solver": {"name": "ddpm"}}
    assert model(changes=its).sampler.corrector is None
    its["corrector"] = {"name": "langevin", "snr": 0.3, "steps": 1, "rule": "level"}
    assert model(changes=its).sampler.corrector["snr"] == 0.3
    assert model("ddpm", changes=its).sampler.corrector["snr"] == 0.3
    assert model("heun", changes=its).sampler.corrector is None
    assert "langevin(snr=0.3" in model("heun", changes=its).said


def test_another_solver_comes_on_its_own_grid(run):
    """The recipe's, "time", is kept by its own solver whatever its settings; one that is given is taken."""

    def model(solver=None, grid=None, changes=None):
        return Model.load(run, How(solver=solver, grid=grid, corrector="none", device="cpu"), changes)

    assert model("abm-4").grid == "abm-4's own"
    assert model("reverse-diffusion:eta=0.5").grid == "time"
    assert model("abm-4", "karras").grid == "karras"
    assert model("abm-4", "time").left_out is None
    assert model("abm-4", "own").left_out is None
    assert model(None, "own").grid == "reverse-diffusion's own"
    options = {"seed": [5, 6, 7], "cond": torch.tensor([5, 6, 7]), "solver": "abm-4", "steps": 3, "denoise": True}
    x = model("abm-4").sampler([5, 6, 7])
    torch.testing.assert_close(x, ud.sample(run.denoiser(), (3, 1, 8, 8), **options))
    assert (x - ud.sample(run.denoiser(), (3, 1, 8, 8), grid="time", **options)).abs().max() > 1e-2
    # So with what `evaluation` says: its grid is its solver's.
    its = {"solver": {"name": "ddpm"}}
    assert model(changes=its).grid == "ddpm's own"
    its["grid"] = "angle"
    assert [model(name, changes=its).grid for name in (None, "ddpm", "heun")] == ["angle", "angle", "heun's own"]


def test_evaluation_corrects_as_sampling_does_unless_told(run, tmp_path):
    from undiffuse.cli.console import Console
    from undiffuse.cli.measuring import Measuring, load_changed

    def protocol(*changes):
        less = ["evaluation.n=2", "evaluation.metrics=[sliced-wasserstein]"]
        loaded = load_changed(run.folder, [*less, *changes], ("evaluation.",))
        return Measuring(loaded, How(device="cpu"), references=False).run_all(Console(quiet=True))[0].result.protocol

    plain = protocol()
    assert plain.solver == "reverse-diffusion(eta=1.0) + langevin(snr=0.1, steps=2, rule=score), denoised"
    without = protocol("evaluation.corrector=none", "evaluation.denoise=false")
    assert (without.solver, without.nfe) == ("reverse-diffusion(eta=1.0)", 3)


def test_absent_keys_are_not_written():
    """Recipes of runs that were made before there were these keys are the same recipes."""
    said = recipe_of("sampling.corrector=none", "sampling.denoise=false")
    assert said == recipe_of()
    assert not {"corrector", "denoise"} & (set(said.to_dict()["sampling"]) | set(said.to_dict()["evaluation"]))
    full = recipe_of("sampling.corrector=langevin", "sampling.denoise=true", "evaluation.corrector=none")
    assert full.to_dict()["sampling"]["corrector"] == {"name": "langevin", "snr": 0.16, "steps": 1, "rule": "score"}
    assert full.to_dict()["evaluation"]["corrector"] == {"name": "none"}
    assert Recipe.from_tree(parse_yaml(full.to_yaml(), "own")) == full


def test_samples_of_then_have_the_folder_of_then():
    """What identifies a sample says nothing of a corrector where there is none."""
    recipe = recipe_of()
    facts = FactsSection(shape=[1, 8, 8], num_classes=10, image=True, data="none", fingerprint="none")
    loaded = Model(None, Sampler.of(recipe.model(), facts, recipe.settings.sampling), "none", 0, "seal")
    assert set(loaded.settings()) == {"weights", "ema", "step", "solver", "steps", "grid", "label", "precision"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.corrector=langevn", "sampling.corrector: unknown corrector 'langevn'. Did you mean 'langevin'?"),
        ("evaluation.corrector=langevn", "evaluation.corrector: unknown corrector 'langevn'. Did you mean"),
        ("sampling.corrector={name: langevin, snr: 0}", "sampling.corrector: snr is 0.0: expected 0 < snr < 1"),
        ("sampling.corrector={name: langevin, snr: -0.16}", "snr is -0.16: expected 0 < snr < 1"),
        ("sampling.corrector={name: langevin, snr: high}", "sampling.corrector.snr = 'high': must be a valid number."),
        ("sampling.corrector={name: langevin, srn: 0.1}", "Did you mean 'sampling.corrector.snr'?"),
        ("sampling.corrector={name: langevin, steps: 0}", "steps is 0: expected a whole number of at least 1"),
        ("sampling.corrector={name: langevin, steps: 1.5}", "sampling.corrector.steps = 1.5: must be a valid integer."),
        ("sampling.corrector={snr: 0.1}", "'name'"),
        ("sampling.corector=langevin", "Did you mean 'sampling.corrector'?"),
        ("sampling.denoise=1", "sampling.denoise = 1: must be a valid boolean"),
    ],
)
def test_what_is_wrong_is_named(override, says):
    with pytest.raises(RecipeError) as error:
        recipe_of(override)
    assert says in str(error.value)


def test_an_energy_has_no_path_to_correct(tmp_path):
    for override in ("sampling.corrector=langevin", "evaluation.corrector=langevin", "sampling.denoise=true"):
        with pytest.raises(RecipeError, match=rf"{override.split('=')[0]}: chains of an energy follow no path"):
            ud.load_recipe("ebm-ring", [override])
    run = ud.train(ud.load_recipe("ebm-ring", [*overrides("ebm-ring"), "data.n=100"]), tmp_path / "run")
    with pytest.raises(ArgumentError, match=r"--corrector langevin: .* is an energy"):
        Model.load(run, How(corrector="langevin", device="cpu"))
