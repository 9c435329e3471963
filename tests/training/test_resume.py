"""A run that was interrupted is the run that was not."""

import json

import pytest
import torch
from torch import nn
from training_toys import TinyLoader, fingerprint, records, settings, tiny_model, train

from undiffuse.core.errors import ArgumentError, CheckpointError, DataError, RunError
from undiffuse.objectives import Denoising
from undiffuse.training import list_checkpoints, load_checkpoint, rebuild
from undiffuse.training.posthoc import snapshot_shelf


class Interrupted(Exception):
    pass


class FailingLoader(TinyLoader):
    """Raises before batch `at`, as a process that dies there."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.at = at

    def batch(self, step):
        if step == self.at:
            raise Interrupted
        return super().batch(step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize("stops", [(5,), (4,), (1, 3), (9, 10, 23)])
def test_interrupted_run_is_bit_identical(tmp_path, whole, stops):
    for at in stops:
        with pytest.raises(Interrupted):
            train(tmp_path, loader=FailingLoader(at))
    result = train(tmp_path)
    assert (result.step, result.stopped) == (24, False)
    assert fingerprint(tmp_path) == fingerprint(whole)
    assert records(tmp_path) == records(whole)
    assert [r["step"] for r in records(tmp_path)] == list(range(3, 25, 3))
    assert snapshot_shelf(tmp_path).steps() == [6, 12, 18, 24]
    average, expected = rebuild(tmp_path, 0.15), rebuild(whole, 0.15)
    assert all(torch.equal(average[name], expected[name]) for name in expected)


def test_muon_goes_on_bit_for_bit(tmp_path, whole):
    for folder, stops in (("once", ()), ("twice", (9,))):
        for at in stops:
            with pytest.raises(Interrupted):
                train(tmp_path / folder, loader=FailingLoader(at), optimizer="muon", precision="bf16")
        train(tmp_path / folder, optimizer="muon", precision="bf16")
    assert fingerprint(tmp_path / "once") == fingerprint(tmp_path / "twice")
    assert fingerprint(tmp_path / "once") != fingerprint(whole)
    kept = load_checkpoint(tmp_path / "once").tensors("optimizer")
    assert set(kept) == {
        "model.net.first.weight/momentum",
        "model.net.last.weight/momentum",
        *(
            f"model.net.{p}/{q}"
            for p in ("labels.weight", "first.bias", "last.bias")
            for q in ("step", "exp_avg", "exp_avg_sq")
        ),
    }


def test_checkpoints_between_log_lines_keep_the_open_window(tmp_path, whole):
    """Step 4 lies inside the window 4..6: its mean must contain what came before the interruption."""
    with pytest.raises(Interrupted):
        train(tmp_path, loader=FailingLoader(5))
    assert records(tmp_path) == records(whole)[:1]
    train(tmp_path)
    assert records(tmp_path)[1] == records(whole)[1]


def test_every_random_number_matters(tmp_path, whole):
    """The comparison above would notice: another seed, dropout rate or order of rows gives other bits."""
    train(tmp_path / "seed", seed=4)
    train(tmp_path / "dropout", model=tiny_model(dropout=0.2))
    train(tmp_path / "cond", cond_dropout=0.3)
    for other in ("seed", "dropout", "cond"):
        assert fingerprint(tmp_path / other)["model.safetensors"] != fingerprint(whole)["model.safetensors"]


def test_the_initial_weights_of_the_second_session_do_not_matter(tmp_path, whole):
    with pytest.raises(Interrupted):
        train(tmp_path, loader=FailingLoader(13))
    other = tiny_model()
    nn.init.normal_(other.net.last.weight)
    other.net.calls.fill_(100)
    train(tmp_path, model=other)
    assert fingerprint(tmp_path) == fingerprint(whole)
    assert int(other.net.calls) == 24 * 3  # 16 rows in micro-batches of 6


def test_callers_random_numbers_are_given_back(tmp_path):
    model = tiny_model()
    torch.manual_seed(17)
    before = torch.get_rng_state()
    train(tmp_path, model=model, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_keeps_the_newest_and_no_rubbish(whole):
    assert list_checkpoints(whole) == [20, 24]
    left = {p.name for p in whole.iterdir()}
    assert left == {".lock", "checkpoints", "metrics.jsonl", "snapshots"}
    assert not list(whole.rglob(".tmp-*"))


def test_longer_run_may_be_asked_for(tmp_path):
    train(tmp_path, steps=8, schedule="constant")
    train(tmp_path, steps=12, schedule="constant", log_every=4, keep=1)
    train(tmp_path / "once", steps=12, schedule="constant")
    assert fingerprint(tmp_path)["model.safetensors"] == fingerprint(tmp_path / "once")["model.safetensors"]
    assert list_checkpoints(tmp_path) == [12]


def test_finished_run_does_nothing(tmp_path, whole):
    class Untouched:
        def batch(self, step):
            raise AssertionError("read")

    before = (whole / "metrics.jsonl").read_bytes()
    assert train(whole, loader=Untouched()).step == 24
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_changed_recipe_is_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(
        RunError, match=r"training\.lr was 0\.01, is 0\.02; training\.precision was \"fp32\", is \"bf16\""
    ):
        train(tmp_path, steps=4, lr=0.02, precision="bf16")
    assert fingerprint(tmp_path, 4)


def test_damaged_newest_falls_back_and_stays(tmp_path, whole):
    train(tmp_path, steps=8, keep=3)
    damaged = tmp_path / "checkpoints/step-0000008/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with (
        pytest.raises(Interrupted),
        pytest.warns(UserWarning, match=r"resuming from step 4: .*step-0000008.*truncated"),
    ):
        train(tmp_path, loader=FailingLoader(6))
    assert list_checkpoints(tmp_path) == [4, 8]
    with pytest.warns(UserWarning, match="step-0000008"):
        train(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(whole)


def test_damaged_newest_does_not_count_as_kept(tmp_path):
    """keep=1: pruning must not leave the damaged step 8 and delete the whole ones before it."""
    train(tmp_path, steps=8, keep=3)
    (tmp_path / "checkpoints/step-0000008/state.json").unlink()
    with pytest.raises(Interrupted), pytest.warns(UserWarning, match="state.json is missing"):
        train(tmp_path, checkpoint_every=2, keep=1, loader=FailingLoader(7))
    assert list_checkpoints(tmp_path) == [6, 8]
    assert load_checkpoint(tmp_path, 6).step == 6


def test_nothing_whole_is_an_error(tmp_path):
    train(tmp_path, steps=4)
    (tmp_path / "checkpoints/step-0000004/state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is whole: .*state\.json"):
        train(tmp_path, steps=4)


def test_snapshots_beyond_the_checkpoint_are_dropped(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, loader=FailingLoader(7))
    assert snapshot_shelf(tmp_path).steps() == [6]
    train(tmp_path, snapshot_every=5)
    assert snapshot_shelf(tmp_path).steps() == [5, 10, 15, 20]


def test_half_a_last_line_is_dropped(tmp_path):
    train(tmp_path, steps=4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    train(tmp_path, steps=8)
    assert [r["step"] for r in records(tmp_path)] == [3, 4, 6, 8]


def test_objective_with_parameters_is_trained_and_saved(tmp_path):
    class Scaled(nn.Module):
        """A learned log-scale s of the loss: exp(-s) l + s, least at s = log l."""

        def __init__(self):
            super().__init__()
            self.inner = Denoising()
            self.s = nn.Parameter(torch.zeros(()))

        def forward(self, model, x, cond=None, generator=None):
            return torch.exp(-self.s) * self.inner(model, x, cond, generator) + self.s

    once, twice = Scaled(), Scaled()
    train(tmp_path / "a", objective=once)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", objective=Scaled(), loader=FailingLoader(14))
    train(tmp_path / "b", objective=twice)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert torch.equal(once.s, twice.s)
    assert abs(float(once.s.detach())) > 0.01
    assert "loss_by_noise" not in records(tmp_path / "a")[0]


def test_tied_weights_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x, c_noise, cond=None):
            return self.b(torch.tanh(self.a(x)))

    def make():
        model = tiny_model()
        model.net = Tied()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        return model

    train(tmp_path / "a", model=make())
    with pytest.raises(Interrupted):
        train(tmp_path / "b", model=make(), loader=FailingLoader(14))
    train(tmp_path / "b", model=make())
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_data_that_ends_early(tmp_path):
    class Short(TinyLoader):
        def prefetch(self, start, stop):
            return iter([self.batch(k) for k in range(start, min(stop, 5))])

    with pytest.raises(DataError, match="before step 6 of 24"):
        train(tmp_path, loader=Short())
    assert list_checkpoints(tmp_path) == [4]


def test_loader_that_does_not_fit(tmp_path):
    with pytest.raises(ArgumentError, match="batch_size 8: this run has 16"):
        train(tmp_path, loader=TinyLoader(8))
    loader = TinyLoader(8)
    loader.batch_size = 16
    loader.batch = lambda step: TinyLoader(8).batch(step)
    with pytest.raises(ArgumentError, match="gave 8 samples"):
        train(tmp_path, loader=loader)


def test_state_says_what_it_is(whole):
    state = load_checkpoint(whole).state
    assert state["fingerprint"] == json.loads(json.dumps({"training": settings().as_dict()}))
    assert state["averages"] == ["half-life-5", "half-life-50", "power-0.1"]
    assert state["step"] == 24
    assert state["seconds"] > 0
