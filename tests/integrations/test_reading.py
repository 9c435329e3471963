"""Files of other projects: code is never run, kinds are recognised, and a run folder comes out of the command."""

import json
import os
import pickle
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import undiffuse as ud
from integrations import planted
from undiffuse.cli import app
from undiffuse.core.errors import ArgumentError, CheckpointError, RunError
from undiffuse.integrations.reading import import_weights, read_file
from undiffuse.recipes.adopt import adopt
from undiffuse.recipes.run import find_run
from undiffuse.training import locked

FLAGS = " ".join(f"--{name} {value}" for name, value in planted.GUIDED["adm"].items())


class Evil:
    """What a pickle can do to whoever opens it."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.mark.parametrize("name", ["network-snapshot.pkl", "weights.pt", "ema.pth"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_is_refused_and_not_run(name, how, tmp_path):
    place, trap = tmp_path / name, tmp_path / "ran"
    if how == "pickle":
        place.write_bytes(pickle.dumps({"ema": Evil(trap)}))
    else:
        torch.save({"ema": Evil(trap)}, place)
    with pytest.raises(CheckpointError, match="names code") as caught:
        import_weights(place)
    assert not trap.exists()
    said = str(caught.value)
    assert "torch.save(net.state_dict()" in said
    assert "net.init_kwargs" in said


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.randn(1000)}, file)
    whole = file.read_bytes()
    for content in (whole[:2000], b"", b"hello"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights\.pt"):
            read_file(file)
    (tmp_path / "w.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="as safetensors"):
        read_file(tmp_path / "w.safetensors")
    with pytest.raises(ArgumentError, match="there is no file"):
        import_weights(tmp_path / "absent.pt")


def edm_file(folder, case="edm-ddpmpp"):
    kind, arguments = planted.EDM[case]
    file = folder / "EDM network.pt"
    torch.save({"class": kind, "arguments": arguments, "weights": planted.weights(case)}, file)
    return file


def diffusers_folder(folder, case="diffusers"):
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    config = {"_class_name": "UNet2DModel", **planted.DIFFUSERS[case]}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    save_file(planted.weights(case), folder / "unet" / "diffusion_pytorch_model.safetensors")
    scheduler = {"beta_schedule": "linear", "num_train_timesteps": 500, "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_kinds_are_recognised(tmp_path):
    assert import_weights(edm_file(tmp_path)).prediction == "edm"
    found = import_weights(diffusers_folder(tmp_path / "pipeline"))
    assert (found.prediction, found.path["levels"]) == ("v", 500)
    alone = import_weights(tmp_path / "pipeline" / "unet")
    assert (alone.prediction, alone.path["levels"]) == ("v", 500)  # the scheduler beside it
    torch.save(planted.weights("adm"), tmp_path / "adm.pt")
    with pytest.raises(ArgumentError, match="MODEL_FLAGS"):
        import_weights(tmp_path / "adm.pt")
    assert import_weights(tmp_path / "adm.pt", flags=FLAGS).net["shape"] == [3, 8, 8]
    torch.save({"model": planted.weights("ncsnpp")}, tmp_path / "song.pth")
    with pytest.raises(ArgumentError, match="ve/cifar10_ncsnpp_continuous"):
        import_weights(tmp_path / "song.pth")
    with pytest.raises(CheckpointError, match="missing"):
        import_weights(tmp_path / "song.pth", config="ve/cifar10_ncsnpp_continuous")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match="holds x"):
        import_weights(tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match="no folder of diffusers"):
        import_weights(tmp_path)


def test_the_old_names_of_attention_in_diffusers(tmp_path):
    folder = diffusers_folder(tmp_path / "old")
    new = import_weights(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = planted.weights("diffusers")
    for ours, theirs in old.items():
        state = {name.replace(f".{ours}.", f".{theirs}."): tensor for name, tensor in state.items()}
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    again = import_weights(folder)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in new.weights.items())


def test_the_command_writes_a_run_that_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, folder = edm_file(tmp_path), tmp_path / "imported"
    call = CliRunner().invoke(app, ["import", str(file), "evaluation.n=50", "--run", str(folder), "--json"])
    assert call.exit_code == 0, call.stderr
    assert json.loads(call.stdout)["run"] == str(folder)
    run = ud.load_run(folder)
    assert run.recipe.name == "edm-network"
    assert run.recipe.settings.evaluation.n == 50
    assert run.checkpoints() == [0]
    x, sigmas = planted.image(), torch.tensor([0.3, 20.0])
    answer = run.denoiser()(x, sigmas, planted.LABELS)
    torch.testing.assert_close(answer, planted.answer("edm-ddpmpp"), rtol=1e-4, atol=1e-4)
    call = CliRunner().invoke(app, ["sample", str(folder), "--seeds", "0-3", "--steps", "3", "--format", "npz"])
    assert call.exit_code == 0, call.stderr
    call = CliRunner().invoke(app, ["import", str(file), "--run", str(folder)])
    assert call.exit_code == RunError.exit_code
    assert "not empty" in call.stderr
    call = CliRunner().invoke(app, ["import", str(file), "path.sigma_min=-1", "--run", str(tmp_path / "other")])
    assert call.exit_code == ArgumentError.exit_code
    assert not (tmp_path / "other").exists()


def test_adopting_the_weights_of_another_network_is_refused(tmp_path):
    found = import_weights(edm_file(tmp_path))
    weights = dict(found.weights)
    weights.pop("last.bias")
    net = {"name": "unet", **found.net}
    with pytest.raises(CheckpointError, match=r"last\.bias"):
        adopt("a", {"net": net, "prediction": "edm"}, found.path, weights, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", ["save_checkpoint", "replace_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", ["absent", "empty"])
def test_a_failed_write_leaves_nothing_behind(failing, error, before, tmp_path, monkeypatch):
    found, place = import_weights(edm_file(tmp_path)), tmp_path / "runs" / "deep" / "run"
    if before == "empty":
        place.mkdir(parents=True)
    module = sys.modules["undiffuse.recipes.adopt"]
    real = getattr(module, failing)

    def fail(*given, **named):
        real(*given, **named)
        raise error

    monkeypatch.setattr(module, failing, fail)
    arguments = ("a", {"net": {"name": "unet", **found.net}, "prediction": "edm"}, found.path, found.weights)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        adopt(*arguments, folder=place)
    if isinstance(error, OSError):
        assert "No space left on device. Nothing of it was left behind" in str(caught.value)
    assert (list(place.iterdir()) == []) if before == "empty" else not (tmp_path / "runs").exists()
    monkeypatch.undo()
    assert adopt(*arguments, folder=place).checkpoints() == [0]


def test_a_kill_in_the_middle_leaves_no_run_and_the_next_import_cleans_up(tmp_path, monkeypatch):
    """SIGKILL when the weights are written and the recipe is not: no run folder, or the empty one that was there."""
    found = import_weights(edm_file(tmp_path))
    arguments = ("a", {"net": {"name": "unet", **found.net}, "prediction": "edm"}, found.path, found.weights)
    for place in (tmp_path / "runs" / "new", tmp_path / "empty"):
        if place.name == "empty":
            place.mkdir()
        child = os.fork()
        if child == 0:
            module = sys.modules["undiffuse.recipes.adopt"]
            monkeypatch.setattr(module, "replace_file", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
            try:
                adopt(*arguments, folder=place)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        left = place.parent / f".tmp-{place.name}"
        assert list(left.glob("checkpoints/step-*/*"))
        assert (list(place.iterdir()) == []) if place.name == "empty" else not place.exists()
        with pytest.raises(RunError, match="there is no run folder 'a'") as caught:
            find_run("a", place.parent)
        assert ".tmp-" not in str(caught.value)
        (left / "checkpoints" / "stray").touch()
        assert adopt(*arguments, folder=place).checkpoints() == [0]
        assert not left.exists()
        assert {file.name for file in place.rglob("*") if file.suffix != ".safetensors"} == {
            ".lock", "recipe.yaml", "checkpoints", "step-0000000", "state.json",
        }  # fmt: skip


def test_another_process_that_fills_the_same_place_is_left_alone(tmp_path, monkeypatch):
    found, place = import_weights(edm_file(tmp_path)), tmp_path / "run"
    arguments = ("a", {"net": {"name": "unet", **found.net}, "prediction": "edm"}, found.path, found.weights)
    with locked(tmp_path / ".tmp-run"):
        (tmp_path / ".tmp-run" / "theirs").touch()
        with pytest.raises(RunError, match="run is being filled by another process: give another run folder"):
            adopt(*arguments, folder=place)
        assert (tmp_path / ".tmp-run" / "theirs").exists()
    module = sys.modules["undiffuse.recipes.adopt"]
    real = module.replace_file

    def meanwhile(*given):
        real(*given)
        place.mkdir()
        (place / "theirs").touch()

    monkeypatch.setattr(module, "replace_file", meanwhile)
    with pytest.raises(RunError, match="run was filled by another process"):
        adopt(*arguments, folder=place)
    assert [file.name for file in place.iterdir()] == ["theirs"]
    assert not (tmp_path / ".tmp-run").exists()
    monkeypatch.chdir(place)
    (place / "theirs").unlink()
    with pytest.raises(RunError, match="the folder you are in"):
        adopt(*arguments, folder=".")


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    found, place = import_weights(edm_file(tmp_path)), tmp_path / "run"
    module = sys.modules["undiffuse.recipes.adopt"]

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "replace_file", fail)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *given, **named: None)
    with pytest.raises(RunError, match=r"No space left on device. Left behind, remove by hand: .*\.tmp-run"):
        adopt("a", {"net": {"name": "unet", **found.net}, "prediction": "edm"}, found.path, found.weights, folder=place)
