"""Recipes of energies: what they are made of, how they are trained, kept and sampled."""

import json
import re

import pytest
import torch

import undiffuse as ud
from recipes.test_load import ALL, DENOISERS, data_of
from recipes.tiny import overrides
from undiffuse.core.errors import ArgumentError, RecipeError, RunError
from undiffuse.core.random import Streams
from undiffuse.data.plane import MODE_STD, ring_means
from undiffuse.objectives.contrastive import ContrastiveDivergence
from undiffuse.objectives.noise_contrastive import NoiseContrastive
from undiffuse.objectives.score_matching import (
    DenoisingScoreMatching,
    FiniteDifferenceSliced,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from undiffuse.objectives.starts import ReplayBuffer
from undiffuse.recipes import Recipe
from undiffuse.recipes.chains import EnergySampler, sampler_of
from undiffuse.recipes.text import flatten, parse_yaml
from undiffuse.solvers.langevin import MALA, Langevin
from undiffuse.solvers.tempering import ParallelTempering

PERSISTENT = (
    "objective={name: contrastive-divergence, kernel: {name: mala, step_size: 0.01}, steps: 3, "
    "start: {name: buffer, size: 32, scale: 2.0}}"
)
TINY = [*overrides("ebm-ring"), "data.n=200"]


def ring(*more):
    return ud.load_recipe("ebm-ring", [*TINY, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Persistent chains, with samples on schedule."""
    folder = tmp_path_factory.mktemp("runs") / "ebm-ring-20260101-000000"
    return ud.train(ring(PERSISTENT, "training.steps=4", "training.sample_every=2", "sampling.n=3"), folder)


def test_what_a_recipe_says_is_what_is_built():
    recipe = ring(PERSISTENT, "objective.penalty=0.3", "objective.stop.gap=7", "objective.data_noise=0.02")
    objective = recipe.resolved().objective()
    assert isinstance(objective, ContrastiveDivergence)
    assert (objective.steps, objective.penalty, objective.data_noise) == (3, 0.3, 0.02)
    assert (objective.stop.gap, objective.stop.patience) == (7, 50)
    assert isinstance(objective.kernel, MALA)
    assert objective.kernel.step_size == 0.01
    assert isinstance(objective.start, ReplayBuffer)
    assert (len(objective.start), tuple(objective.start.x.shape), objective.start.noise.scale) == (32, (32, 2), 2.0)
    assert isinstance(ring().objective(), NoiseContrastive)
    assert float(ring().objective().noise.covariance[0, 0]) == pytest.approx(1.21)


def test_every_default_is_written_and_read_again():
    recipe = ring(PERSISTENT)
    keys = flatten(recipe.to_dict())
    assert keys["objective.start.reinit"] == 0.05
    assert keys["objective.stop.energy"] == 1e4
    assert Recipe.from_tree(parse_yaml(recipe.to_yaml(), "own")) == recipe
    full = recipe.resolved()
    assert Recipe.from_tree(parse_yaml(full.to_yaml(), "own")) == full


def test_sampling_follows_training_unless_told():
    persistent = ["sampling={n: 3}", PERSISTENT]
    section = ring(*persistent).settings.sampling
    assert section.solver == {"name": "mala", "step_size": 0.01, "preconditioner": None}
    assert section.initial == {"name": "uniform", "scale": 2.0}
    assert ring("sampling.initial=null").settings.sampling.initial == {"name": "normal", "scale": 1.5}  # the prior's
    told = ring(*persistent, "sampling.solver={name: langevin, step_size: 0.1}", "sampling.initial=uniform")
    assert told.settings.sampling.solver["name"] == "langevin"
    assert told.settings.sampling.initial == {"name": "uniform", "scale": 1.0}


def test_denoisers_are_written_as_before():
    for name in DENOISERS:
        tree = ud.load_recipe(name).to_dict()
        assert set(tree["model"]) == {"net", "prediction", "sigma_data", "conditional"}
        assert set(tree["objective"]) == {"time", "weight"} | ({"target"} if name == "digits" else set())
        assert "initial" not in tree["sampling"]
        assert tree["path"] is not None
    plain, said = (
        ud.load_recipe("digits"),
        ud.load_recipe("digits", ["model.kind=denoiser", "objective.name=denoising"]),
    )
    assert plain == said


@pytest.mark.parametrize("name", [name for name in ALL if ud.load_recipe(name).kind == "energy"])
def test_every_energy_takes_a_step(name, tmp_path):
    """The gradient of its loss, along which data and noise or chains are told apart better."""
    recipe = ud.load_recipe(name, [*overrides(name, data_of(name, tmp_path))]).resolved()
    model, objective = recipe.model(), recipe.objective()
    x = recipe.data().batch(torch.arange(8))[0]
    loss = objective(model, x, None, Streams.of(1, 8)).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert sum(float(g.square().sum()) for g in gradients if g is not None) > 0


@pytest.mark.parametrize(
    ("objective", "made"),
    [
        ("implicit-score-matching", ImplicitScoreMatching()),
        ("{name: sliced-score-matching, probe: gaussian, probes: 2}", SlicedScoreMatching("gaussian", 2)),
        ("{name: finite-difference-score-matching, step: 0.05}", FiniteDifferenceSliced(0.05)),
        ("{name: denoising-score-matching, sigma: 0.3}", DenoisingScoreMatching(0.3)),
    ],
)
def test_an_energy_by_score_matching(objective, made, tmp_path):
    recipe = ring(f"objective={objective}", "training.steps=3", "training.lr=0.01")
    assert recipe.objective() == made
    run = ud.train(recipe, tmp_path / "run")
    before, after = recipe.model().state_dict(), run.energy(ema="none").state_dict()
    assert not torch.equal(before["net.layers.0.weight"], after["net.layers.0.weight"])
    assert run.recipe.settings.sampling.initial == {"name": "normal", "scale": 1.5}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("path=vp", "path: an energy has none"),
        ("sampling.grid=time", "no grid of times"),
        ("sampling.solver=heun", "unknown kernel 'heun'"),
        ("model.net=mlp", "unknown network 'mlp'"),
        ("model.prediction=noise", "unknown key 'model.prediction'"),
        ("model.kind=enrgy", "one of denoiser, energy, classifier"),
        ("model.prior_std=0", "model.prior_std = 0: must be greater than 0"),
        ("objective.nois.std=1", "Did you mean 'objective.noise'?"),
        ("objective.noise.stdd=1", "Did you mean 'objective.noise.std'?"),
        ("objective.name=noise-contrastiv", "Did you mean 'noise-contrastive'?"),
        ("objective.ratio=0", "ratio is 0"),
        ("objective={time: uniform}", "give objective.name"),
        ("objective={name: contrastive-divergence, steps: 3}", "'objective.kernel' is required"),
        (PERSISTENT.replace("step_size: 0.01", "step: 1"), "Did you mean 'objective.kernel.step_size'?"),
        (PERSISTENT.replace("name: buffer", "name: bufer"), "Did you mean 'buffer'?"),
        (PERSISTENT.replace("size: 32", "size: 0"), "size 0"),
        (PERSISTENT.replace("mala", "parallel-tempering"), "unknown key 'objective.kernel.step_size'"),
    ],
)
def test_what_is_wrong_is_named(override, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        ring(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective={name: noise-contrastive}", "a denoiser is trained by denoising"),
        ("sampling.initial=normal", "the path's own law"),
        ("path=null", "'path' is required"),
        ("model.net=energy-mlp", "unknown network 'energy-mlp'"),
    ],
)
def test_what_denoisers_have_not(override, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        ud.load_recipe("gaussians", [override])


def test_a_buffer_larger_than_memory_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("undiffuse.objectives.starts.free_memory", lambda: 1000)
    ring(PERSISTENT.replace("size: 32", "size: 50"))  # the size of an event is not known yet
    with pytest.raises(RecipeError, match=r"objective.start: a replay buffer of 70 events of shape \[2\] takes"):
        ud.train(ring(PERSISTENT.replace("size: 32", "size: 70")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_energy(trained):
    energy = trained.energy()
    assert not energy.training
    assert not any(p.requires_grad for p in energy.parameters())
    with pytest.raises(RunError, match=r"use run.energy\(\)"):
        trained.denoiser()
    with pytest.raises(RecipeError, match="no path"):
        trained.recipe.path()
    assert "energy_gap" in trained.metrics()[-1]
    assert {file.name for file in (trained.folder / "samples").iterdir()} == {
        "step-0000002.npz",
        "step-0000004.npz",
    }
    again = ud.load_run(trained.folder)
    assert (again.recipe, again.recipe.kind) == (trained.recipe, "energy")


def test_a_denoiser_is_no_energy(tmp_path):
    run = ud.train(ud.load_recipe("gaussians", overrides("gaussians")), tmp_path / "run")
    with pytest.raises(RunError, match=r"use run.denoiser\(\)"):
        run.energy()


def test_resuming_ends_in_the_same_bits(tmp_path):
    steady = [PERSISTENT, "training.schedule=constant"]
    whole = ud.train(ring(*steady, "training.steps=4"), tmp_path / "whole")
    ud.train(ring(*steady, "training.steps=2"), tmp_path / "parts")
    parts = ud.train(ring(*steady, "training.steps=4"), tmp_path / "parts")
    for name, value in whole.energy().state_dict().items():
        assert torch.equal(parts.energy().state_dict()[name], value)
    states = [json.loads((r.folder / "checkpoints/step-0000004/state.json").read_text()) for r in (whole, parts)]
    first, second = ({name: f["sha256"] for name, f in state["files"].items()} for state in states)
    assert first == second
    assert "objective.safetensors" in first


def test_a_seed_is_a_chain_of_its_own(trained):
    sampler = sampler_of(trained.energy(), trained.recipe.settings, batch=2)
    assert isinstance(sampler, EnergySampler)
    whole, one = sampler([5, 6, 7]), sampler([7])
    torch.testing.assert_close(one[0], whole[2], rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole[0], whole[1])
    assert (sampler.nfe, sampler.grid) == (4, None)  # MALA: one call per step and one before
    film = sampler.film([5, 6, 7], 2)
    assert [caption for caption, _ in film] == ["step 1", "step 3"]
    torch.testing.assert_close(film[-1][1], whole, rtol=1e-5, atol=1e-6)


def test_a_chain_that_diverges_is_said_to(trained):
    far = {"solver": {"name": "langevin", "step_size": 1e3}, "steps": 60}
    sampler = sampler_of(trained.energy(), trained.recipe.settings, **far)
    with pytest.raises((UserWarning, ArithmeticError), match="became infinite"):
        sampler([0, 1])
    with pytest.raises(ArgumentError, match="steps = 0"):
        sampler_of(trained.energy(), trained.recipe.settings, steps=0)


def test_kernels_have_their_arguments():
    tempering = "{name: parallel-tempering, kernel: {name: mala, step_size: 0.02}, temperatures: [1, 4]}"
    from undiffuse.recipes import energies

    made = energies.kernel(ring(f"sampling.solver={tempering}").settings.sampling.solver)
    assert isinstance(made, ParallelTempering)
    assert (made.kernel.step_size, made.temperatures) == (0.02, (1.0, 4.0))
    made = energies.kernel(ring("sampling.solver={name: langevin, step_size: 2, clip: 0.1}").settings.sampling.solver)
    assert isinstance(made, Langevin)
    assert (made.step_size, made.noise, made.clip) == (2.0, None, 0.1)


@pytest.mark.slow
def test_the_ring_is_learned_with_its_normalising_constant(tmp_path):
    """Mean absolute error of the log-density under the data at most 0.05 nats; log Z by quadrature on a grid."""
    run = ud.train("ebm-ring", tmp_path / "run")
    energy = run.energy().double()
    truth = ud.GaussianMixture(ring_means().double(), torch.full((8,), MODE_STD, dtype=torch.float64))
    axis = torch.linspace(-3.5, 3.5, 701, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    x = truth.sample(20_000, Streams.of(1234, 20_000))
    with torch.no_grad():
        log_z = torch.logsumexp(-energy(grid), 0) + 2 * torch.log(axis[1] - axis[0])
        error = -energy(x) - log_z - truth.log_prob(x)
    assert float(error.abs().mean()) < 0.05
    assert run.metrics()[-1]["log_z"] == pytest.approx(float(log_z), abs=0.1)
