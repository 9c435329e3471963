"""The recipe key `threshold`: what it draws is what `ud.sample` draws from the bounded denoiser."""

import pytest
import torch

import undiffuse as ud
from recipes.tiny import overrides
from undiffuse.cli.drawing import How, Model
from undiffuse.core.errors import ArgumentError, RecipeError
from undiffuse.recipes import Recipe
from undiffuse.recipes.text import parse_yaml


def recipe_of(*more):
    return ud.load_recipe("digits", [*overrides("digits"), *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Barely trained, so that estimates leave the range of pixels."""
    more = [
        "sampling.threshold={name: dynamic, quantile: 0.8, limit: 0.5}",
        "sampling.steps=4",
        "sampling.precision=fp32",
    ]
    return ud.train(recipe_of(*more), tmp_path_factory.mktemp("runs") / "digits")


def drawn(run, bound):
    solver = run.recipe.settings.sampling.solver["name"]
    grid = run.recipe.settings.sampling.grid
    cond = torch.tensor([5, 6, 7])
    return ud.sample(bound(run.denoiser()), (3, 1, 8, 8), seed=[5, 6, 7], cond=cond, solver=solver, steps=4, grid=grid)


def test_the_recipe_s_threshold_is_that_of_the_library(run):
    expected = drawn(run, lambda d: ud.DynamicThreshold(d, 0.8, 0.5))
    sampler = Model.load(ud.load_run(run.folder), How(device="cpu")).sampler
    torch.testing.assert_close(sampler([5, 6, 7]), expected)
    assert sampler.said.endswith(", threshold dynamic(quantile=0.8, limit=0.5)")
    assert sampler.nfe == 4
    for other in (lambda d: ud.DynamicThreshold(d, 0.81, 0.5), lambda d: ud.Clipped(d, -0.5, 0.5), lambda d: d):
        assert (drawn(run, other) - expected).abs().max() > 1e-4


def test_the_command_may_say_another_or_none(run):
    def sampler(text):
        return Model.load(run, How(threshold=text, device="cpu")).sampler

    torch.testing.assert_close(sampler("clip:low=-0.5")([5, 6, 7]), drawn(run, lambda d: ud.Clipped(d, low=-0.5)))
    torch.testing.assert_close(sampler("none")([5, 6, 7]), drawn(run, lambda d: d))
    assert sampler("dynamic").threshold == {"name": "dynamic", "quantile": 0.995, "limit": 1.0}
    with pytest.raises(RecipeError, match=r"--threshold: unknown threshold 'dynamc'. Did you mean 'dynamic'"):
        sampler("dynamc")
    with pytest.raises(RecipeError, match=r"--threshold: quantile is 0.0: expected a share in \(0, 1\]"):
        sampler("dynamic:quantile=0")
    seals = [Model.load(run, How(threshold=text, device="cpu")).settings() for text in (None, "clip", "none")]
    assert [seal.get("threshold", {}).get("name") for seal in seals] == ["dynamic", "clip", None]


def test_absent_keys_are_not_written():
    """Recipes of runs that were made before there was this key are the same recipes."""
    said = recipe_of("sampling.threshold=none")
    assert said == recipe_of()
    assert "threshold" not in set(said.to_dict()["sampling"]) | set(said.to_dict()["evaluation"])
    full = recipe_of("sampling.threshold=clip", "evaluation.threshold=none")
    assert full.to_dict()["sampling"]["threshold"] == {"name": "clip", "low": -1.0, "high": 1.0}
    assert Recipe.from_tree(parse_yaml(full.to_yaml(), "own")) == full


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.threshold=dynamc", "sampling.threshold: unknown threshold 'dynamc'. Did you mean 'dynamic'?"),
        ("evaluation.threshold=clp", "evaluation.threshold: unknown threshold 'clp'. Did you mean 'clip'?"),
        ("sampling.threshold={name: dynamic, limit: 0}", "limit is 0.0: expected the largest magnitude of the data"),
        ("sampling.threshold={name: clip, low: 1, high: -1}", "low is 1.0, high is -1.0: expected the range"),
        ("sampling.threshold={name: dynamic, quantil: 0.9}", "Did you mean 'sampling.threshold.quantile'?"),
        ("sampling.threshold={name: dynamic, denoiser: 1}", "unknown key 'sampling.threshold.denoiser'"),
    ],
)
def test_what_is_wrong_is_named(override, says):
    with pytest.raises(RecipeError) as error:
        recipe_of(override)
    assert says in str(error.value)


def test_an_energy_and_a_classifier_have_no_estimate_to_bound(tmp_path):
    for key in ("sampling.threshold", "evaluation.threshold"):
        with pytest.raises(RecipeError, match=rf"{key}: chains of an energy estimate no x_0"):
            ud.load_recipe("ebm-ring", [f"{key}=clip"])
        with pytest.raises(RecipeError, match=rf"{key}: a classifier draws no samples"):
            ud.load_recipe("classifier-digits", [f"{key}=clip"])
    run = ud.train(ud.load_recipe("ebm-ring", [*overrides("ebm-ring"), "data.n=100"]), tmp_path / "run")
    with pytest.raises(ArgumentError, match=r"--threshold clip: .* is an energy"):
        Model.load(run, How(threshold="clip", device="cpu"))
