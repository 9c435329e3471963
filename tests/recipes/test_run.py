"""Runs: trained, resumed, refused, read."""

import json
import re
import shutil

import pytest
import torch

import undiffuse as ud
from recipes.tiny import image_folder, overrides
from undiffuse.core.errors import ArgumentError, CheckpointError, RunError
from undiffuse.recipes import Sampler, find_run
from undiffuse.recipes.run import new_run_folder
from undiffuse.training import load_checkpoint


def recipe(*more: str) -> ud.Recipe:
    return ud.load_recipe("gaussians", [*overrides("gaussians"), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ud.Run:
    """Four steps with two kinds of average."""
    folder = tmp_path_factory.mktemp("runs") / "gaussians-20260101-000000"
    more = [
        "training.steps=4",
        "training.keep=4",
        "training.ema=[2, 5]",
        "training.ema_power=[0.1]",
        "training.ema_ramp=10",
    ]
    return ud.train(recipe(*more, "training.lr=0.05", "training.snapshot_every=1"), folder)


def weights(run: ud.Run, **options) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.denoiser(**options).parameters()])


def test_a_run_is_read_as_it_was_written(trained):
    again = ud.load_run(trained.folder)
    assert again.recipe == trained.recipe
    assert again.checkpoints() == [1, 2, 3, 4]
    assert [line["step"] for line in again.metrics()] == [1, 2, 3, 4]
    assert trained.result.step == 4
    assert not trained.result.stopped
    assert again.result is None
    assert again.recipe.settings.facts.shape == [2]


def test_the_denoiser_is_the_first_average_frozen_and_evaluating(trained):
    denoiser = trained.denoiser()
    assert trained.average() == "half-life-2"
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    saved = load_checkpoint(trained.folder).weights("half-life-2")
    assert all(torch.equal(saved[name], value) for name, value in denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (None, "half-life-2"),
        (5, "half-life-5"),
        ("5", "half-life-5"),
        ("5.0", "half-life-5"),
        ("none", "none"),
        ("power-0.1", "power-0.1"),
    ],
)
def test_averages_by_name(trained, asked, name):
    assert trained.average(asked) == name


def test_averages_differ_and_the_recipe_can_prefer_one(trained):
    found = {name: weights(trained, ema=name) for name in ("half-life-2", "half-life-5", "power-0.1", "none")}
    names = list(found)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.equal(found[a], found[b])
    tree = trained.recipe.to_dict()
    tree["sampling"]["ema"] = "power-0.1"
    prefers = ud.Run(trained.folder, ud.Recipe.from_tree(tree))
    assert torch.equal(weights(prefers), found["power-0.1"])


def test_a_power_average_that_was_not_kept_is_rebuilt(trained):
    kept, rebuilt = weights(trained, ema="power-0.1"), weights(trained, ema="power-0.101")
    last = weights(trained, ema="none")
    assert 0 < float((rebuilt - kept).norm()) < 0.2 * float((last - kept).norm())


def test_older_checkpoints(trained):
    assert not torch.equal(weights(trained, step=2, ema="none"), weights(trained, ema="none"))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"step": 7}, CheckpointError, "no checkpoint of step 7"),
        ({"ema": "half-life-3"}, CheckpointError, "it has half-life-2, half-life-5, power-0.1"),
        ({"ema": "power-wide"}, ArgumentError, "power-WIDTH"),
        ({"device": "cuda:17"}, ArgumentError, "Devices here: cpu"),
        ({"device": "gpu"}, ArgumentError, "Devices here: cpu"),
    ],
)
def test_what_a_run_does_not_have(trained, options, kind, says):
    with pytest.raises(kind, match=re.escape(says)):
        trained.denoiser(**options)


def test_resuming_ends_in_the_same_bits(tmp_path):
    steady = "training.schedule=constant"  # a cosine knows how long it will be
    whole = ud.train(recipe("training.steps=4", steady), tmp_path / "whole")
    ud.train(recipe("training.steps=2", steady), tmp_path / "parts")
    seen = []
    longer = recipe("training.steps=4", steady)
    parts = ud.train(longer, tmp_path / "parts", on_log=lambda record: seen.append(record["step"]))
    assert seen == [3, 4]
    assert torch.equal(weights(whole), weights(parts))
    assert torch.equal(weights(whole, ema="none"), weights(parts, ema="none"))
    assert ud.load_run(parts.folder).recipe.settings.training["steps"] == 4


def test_a_changed_recipe_is_refused_by_key_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "run"
    ud.train(recipe(), folder)
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(RunError, match=r"training.lr was 0.002, is 0.01"):
        ud.train(recipe("training.steps=4", "training.lr=0.01"), folder)
    with pytest.raises(RunError, match=r"path.name was \"linear\", is \"vp\""):
        ud.train(recipe("path=vp"), folder)
    assert (folder / "recipe.yaml").read_bytes() == before
    assert ud.load_run(folder).checkpoints() == [1, 2]


def test_a_folder_without_checkpoints_takes_a_changed_recipe(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe().to_yaml())
    ud.train(recipe("training.lr=0.01"), folder)
    assert ud.load_run(folder).recipe.settings.training["lr"] == 0.01


def test_data_may_move_but_not_change(tmp_path):
    first = image_folder(tmp_path / "first")
    options = [f"data.path={first}", "data.size=16"]
    ud.train(ud.load_recipe("folder", overrides("folder", options)), tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.move(first, moved)
    options[0] = f"data.path={moved}"
    done = ud.train(ud.load_recipe("folder", [*overrides("folder", options), "training.steps=3"]), tmp_path / "run")
    assert done.result.step == 3
    next(moved.rglob("*.png")).unlink()
    with pytest.raises(RunError, match=r"facts\.(n|fingerprint) was"):
        ud.train(ud.load_recipe("folder", [*overrides("folder", options), "training.steps=4"]), tmp_path / "run")


def test_samples_on_schedule(tmp_path):
    calls = []
    ud.train(
        recipe("training.sample_every=1"),
        tmp_path / "run",
        on_sample=lambda run, step, sampler: calls.append((step, sampler([0, 1]))),
    )
    assert [step for step, _ in calls] == [1, 2]
    again = ud.load_run(tmp_path / "run")
    facts, section = again.recipe.settings.facts, again.recipe.settings.sampling
    assert torch.equal(calls[1][1], Sampler.of(again.denoiser(), facts, section)([0, 1]))


def test_folders_that_are_no_run(tmp_path, trained):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("name: x\nname: y\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained.folder / "recipe.yaml", bare)
    for folder, says in (
        (tmp_path / "empty", "has no recipe.yaml"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "absent", "no run folder"),
        (broken, "given twice"),
    ):
        with pytest.raises(RunError, match=says):
            ud.load_run(folder)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        ud.load_run(bare).denoiser()
    orphan = tmp_path / "orphan"
    shutil.copytree(trained.folder, orphan)
    (orphan / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="has checkpoints but no recipe"):
        ud.train(recipe(), orphan)


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_offered(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    file = folder / "checkpoints" / "step-0000004" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run = ud.load_run(folder)
    with pytest.raises(CheckpointError, match="step 3"):
        run.denoiser()
    assert torch.equal(weights(run, step=3), weights(trained, step=3))


def test_weights_of_another_network_are_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("hidden: 16", "hidden: 24"))
    with pytest.raises(CheckpointError, match="shape"):
        ud.load_run(folder).denoiser()


def test_metrics_tolerate_a_line_cut_short_at_the_end_only(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained.folder, folder)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[-1][: len(lines[-1]) // 2]]))
    run = ud.load_run(folder)
    assert [json.dumps(line) for line in run.metrics()] == lines
    file.write_text("\n".join([lines[0][:5], *lines]))
    with pytest.raises(RunError, match="line 1 is not JSON"):
        run.metrics()


def test_the_newest_run_of_a_name(tmp_path):
    runs = tmp_path / "runs"
    for stamp in ("20260101-000000", "20260301-000000", "20260201-000000"):
        (runs / f"digits-{stamp}").mkdir(parents=True)
    (runs / "digits-big-20270101-000000").mkdir()
    assert find_run("digits", runs).name == "digits-20260301-000000"
    assert find_run("digits-big", runs).name == "digits-big-20270101-000000"
    assert find_run(runs / "digits-20260101-000000").name == "digits-20260101-000000"
    with pytest.raises(RunError, match=r"Did you mean 'digits'.*Runs in .*: digits, digits-big"):
        find_run("digts", runs)


def test_new_folders_never_collide(tmp_path):
    first = new_run_folder("x", tmp_path)
    assert re.fullmatch(r"x-\d{8}-\d{6}", first.name)
    names = set()
    for _ in range(4):
        folder = new_run_folder("x", tmp_path)
        folder.mkdir(parents=True)
        names.add(folder.name)
    assert len(names) == 4
    assert find_run("x", tmp_path).name in names
