"""Training energies: what an objective keeps is saved, resumed, shared by the parts of a step, and written down."""

import pytest
import torch
from test_resume import FailingLoader, Interrupted
from torch import nn
from training_toys import TinyLoader, fingerprint, records, train

from undiffuse.core.errors import TrainingError
from undiffuse.fields.energy import NetworkEnergy
from undiffuse.objectives.contrastive import ContrastiveDivergence, Stop
from undiffuse.objectives.noise_contrastive import NoiseContrastive
from undiffuse.objectives.starts import ReplayBuffer
from undiffuse.oracles import Gaussian
from undiffuse.solvers.langevin import MALA, Langevin
from undiffuse.training import load_checkpoint


class TinyEnergy(nn.Module):
    """Two-dimensional, with dropout, so that the negative phase and the loss see different modes."""

    def __init__(self, width=16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, x, c_noise, cond=None):
        return self.net(x)


def energy():
    torch.manual_seed(0)
    return NetworkEnergy(TinyEnergy(), prior_std=2.0)


class Points(TinyLoader):
    """Without the labels."""

    def batch(self, step):
        return super().batch(step)[0], None


class FailingPoints(FailingLoader, Points):
    pass


def persistent(kernel=None, **options):
    buffer = ReplayBuffer([2], size=20, reinit=0.2, initial="normal")
    return ContrastiveDivergence(kernel or Langevin(0.05), 3, start=buffer, data_noise=0.05, **options)


def run(folder, objective=None, **changes):
    return train(
        folder, model=energy(), objective=objective or persistent(), loader=Points(), cond_dropout=0, **changes
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("energy")
    run(folder)
    return folder


def test_interrupted_run_has_the_same_chains_to_the_bit(tmp_path, whole):
    for at in (5, 13):
        with pytest.raises(Interrupted):
            train(tmp_path, model=energy(), objective=persistent(), loader=FailingPoints(at), cond_dropout=0)
    run(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(whole)
    assert records(tmp_path) == records(whole)
    saved = load_checkpoint(whole).tensors("objective")
    assert saved["start.x"].shape == (20, 2)
    assert int(saved["start.age"].max()) > 1
    assert int(saved["step"]) == 24


def test_parts_of_a_batch_make_the_same_chains(tmp_path, whole):
    """Micro-batches of 6, 6 and 4 (the settings') or the batch at once: the same up to rounding, dropout aside."""
    model = energy()
    model.net.net[2].p = 0.0
    parts = tmp_path / "parts"
    train(parts, model=model, objective=persistent(), loader=Points(), cond_dropout=0)
    model = energy()
    model.net.net[2].p = 0.0
    once = tmp_path / "once"
    train(once, model=model, objective=persistent(), loader=Points(), cond_dropout=0, micro_batch=None)
    for name, value in load_checkpoint(parts).tensors("objective").items():
        torch.testing.assert_close(
            load_checkpoint(once).tensors("objective")[name], value, rtol=1e-3, atol=1e-4, equal_nan=True
        )
    assert fingerprint(parts)["model.safetensors"] != fingerprint(whole)["model.safetensors"]


def test_metrics_tell_what_energies_need(tmp_path, whole):
    last = records(whole)[-1]
    assert {"energy_data", "energy_chains", "energy_gap", "chain_move", "chain_age", "score_norm"} <= set(last)
    assert "chain_acceptance" not in last
    run(tmp_path, persistent(MALA(0.05)), steps=6)
    assert 0.5 < records(tmp_path)[-1]["chain_acceptance"] <= 1
    assert 1 < last["chain_age"] < 10  # begun anew with chance 0.2: five runs on average


def test_divergence_ends_the_run_with_the_last_checkpoint_whole(tmp_path):
    objective = persistent(stop=Stop(energy=1e-3))
    with pytest.raises(TrainingError, match="training diverges at step 1: the mean energy"):
        run(tmp_path, objective)
    objective = persistent(stop=Stop(gap=1e-9, patience=7))
    with pytest.raises(TrainingError, match="at step 7: the energy gap"):
        run(tmp_path / "gap", objective)
    assert load_checkpoint(tmp_path / "gap").step == 4


def test_log_z_is_trained_with_the_model(tmp_path):
    noise = NoiseContrastive(Gaussian(torch.zeros(2), 1.5))
    run(tmp_path, noise, steps=12)
    last = records(tmp_path)[-1]
    assert last["log_z"] == float(load_checkpoint(tmp_path).tensors("objective")["log_z"]) != 0.0
    assert 0.5 <= last["noise_accuracy"] < 1


def test_bf16_keeps_the_graph_of_the_weights(tmp_path):
    """Casts made while the chains run must not stand in for those of the loss, or nothing would be learned."""
    run(tmp_path, persistent(MALA(0.05)), steps=4, precision="bf16")
    before, after = energy().state_dict(), load_checkpoint(tmp_path).tensors("model")
    for name in ("net.net.0.weight", "net.net.3.weight"):
        assert not torch.equal(before[name], after[name])
    assert records(tmp_path)[-1]["grad_norm"] > 0
