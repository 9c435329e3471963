"""What a step of training computes."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import TinyLoader, fingerprint, records, settings, tiny_model, train

from undiffuse.core.errors import ArgumentError, TrainingError
from undiffuse.core.random import Streams, hash_key
from undiffuse.training import fit, list_checkpoints, load_checkpoint
from undiffuse.training.conditions import drop_condition


class Quadratic:
    """Per-sample loss |w - x|^2 / 2 where w is the model's only weight: the gradient is w minus the mean of x."""

    def __call__(self, model, x, cond=None, generator=None):
        return 0.5 * (model.weight - x).square().sum(1)


NO_SNAPSHOTS = {"ema_power": (), "snapshot_every": None}


def linear(size=2):
    layer = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def test_gradient_is_the_mean_over_the_batch(tmp_path):
    """From w = 0 the norm of the gradient is |mean x| and the loss |x|^2 / 2, over all 16 rows."""
    x = TinyLoader().batch(0)[0]
    train(
        tmp_path,
        model=linear(),
        objective=Quadratic(),
        steps=1,
        clip=None,
        **NO_SNAPSHOTS,
    )
    record = records(tmp_path)[0]
    assert record["grad_norm"] == pytest.approx(float(x.mean(0).norm()), rel=1e-6)
    assert record["loss"] == pytest.approx(float(0.5 * x.square().sum(1).mean()), rel=1e-6)


def test_each_step_has_its_own_rate(tmp_path):
    """Under a constant gradient Adam moves a weight by the rate."""

    class Slope:
        def __call__(self, model, x, cond=None, generator=None):
            return -1000.0 * model.weight.sum().expand(len(x))

    layer = linear()
    options = {"lr": 0.4, "warmup": 4, "schedule": "constant", "clip": None}
    train(tmp_path, model=layer, objective=Slope(), steps=6, **options, **NO_SNAPSHOTS)
    expected = 0.1 + 0.2 + 0.3 + 3 * 0.4
    torch.testing.assert_close(layer.weight, torch.full_like(layer.weight, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro", [1, 5, 16, 100])
def test_accumulation_equals_the_full_batch(tmp_path, micro):
    options = {"model": tiny_model(dropout=0.0), **NO_SNAPSHOTS}
    train(tmp_path / "full", **(options | {"model": tiny_model(dropout=0.0)}), micro_batch=None)
    train(tmp_path / "parts", **options, micro_batch=micro)
    full, parts = records(tmp_path / "full"), records(tmp_path / "parts")
    for a, b in zip(full, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss_by_noise"]["count"] == b["loss_by_noise"]["count"]


def test_clipping(tmp_path):
    """SGD-like reading of Adam's first moment: after one step it is (1 - b_1) times the clipped gradient."""
    x = TinyLoader().batch(0)[0]
    for clip, expected in ((0.25, 0.25), (1e6, float(x.mean(0).norm())), (None, float(x.mean(0).norm()))):
        folder = tmp_path / str(clip)
        train(folder, model=linear(), objective=Quadratic(), steps=1, clip=clip, **NO_SNAPSHOTS)
        moment = load_checkpoint(folder).tensors("optimizer")["model.weight/exp_avg"]
        assert float(moment.norm()) / (1 - 0.9) == pytest.approx(expected, rel=1e-4)
        assert records(folder)[0]["grad_norm"] == pytest.approx(float(x.mean(0).norm()), rel=1e-6)


def test_adam_by_hand(tmp_path):
    """Three steps of the formula in the docstring, in float64, on gradients w - mean(x_k)."""
    torch.set_default_dtype(torch.float64)
    try:
        train(
            tmp_path, model=linear(), objective=Quadratic(), steps=3, warmup=2, schedule="constant", lr=0.1, clip=None,
            micro_batch=None, ema=(), **NO_SNAPSHOTS,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    w, m, v = torch.zeros(2, dtype=torch.float64), 0.0, 0.0
    for k in range(3):
        g = w - TinyLoader().batch(k)[0].double().mean(0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.1 * min((k + 1) / 2, 1)
        w = w - rate * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    assert torch.allclose(load_checkpoint(tmp_path).tensors("model")["weight"][0], w, rtol=1e-6)


def test_streams_belong_to_the_row_of_the_global_batch(tmp_path):
    """The objective sees (seed, "train", k) with the rows' own places, whatever the micro-batch."""
    seen = []

    class Spy(Quadratic):
        def __call__(self, model, x, cond=None, generator=None):
            seen.append(generator.keys)
            return super().__call__(model, x)

    train(tmp_path, model=linear(), objective=Spy(), steps=2, **NO_SNAPSHOTS)
    assert [len(keys) for keys in seen] == [6, 6, 4] * 2
    expected = torch.cat([Streams.of(hash_key(3, "train", k), 16).keys for k in range(2)])
    assert torch.equal(torch.cat(seen), expected)


def test_condition_dropout():
    streams = Streams.of(0, 4000)
    labels = torch.arange(4000) % 7
    vectors = torch.ones(4000, 3)
    kept = drop_condition({"label": labels, "vector": vectors}, 0.3, streams)
    dropped = kept["label"] == -1
    # Three standard deviations of a binomial share are 0.022; the seed is fixed.
    assert abs(float(dropped.float().mean()) - 0.3) < 0.022
    assert torch.equal(kept["vector"].isnan().all(1), dropped)
    assert torch.equal(kept["vector"].isnan().any(1), dropped)
    assert torch.equal(kept["label"][~dropped], labels[~dropped])
    assert int(labels.min()) == 0
    alone = torch.cat([drop_condition(labels[i : i + 1], 0.3, streams.select(slice(i, i + 1))) for i in range(50)])
    assert torch.equal(alone, kept["label"][:50])
    assert drop_condition(None, 0.5, streams) is None
    assert bool((drop_condition(labels, 1.0, streams) == -1).all())
    assert streams.draw == 0


def test_dropped_labels_reach_the_network(tmp_path):
    seen = []

    class Spy(Quadratic):
        def __call__(self, model, x, cond=None, generator=None):
            seen.append(cond)
            return super().__call__(model, x)

    train(tmp_path, model=linear(), objective=Spy(), cond_dropout=0.5, **NO_SNAPSHOTS)
    labels = torch.cat(seen)
    # 384 coins: four standard deviations are 0.1.
    assert abs(float((labels == -1).float().mean()) - 0.5) < 0.1
    assert set(labels.tolist()) == {-1, 0, 1, 2}


class Broken(Quadratic):
    """Not finite at call `at`, for two rows."""

    def __init__(self, at, value=math.nan):
        self.calls, self.at, self.value = 0, at, value

    def losses(self, model, x, cond=None, generator=None):
        loss = self(model, x)
        self.calls += 1
        if self.calls == self.at:
            loss = loss + torch.tensor([0.0, self.value] + [0.0] * (len(x) - 3) + [self.value])
        t = torch.linspace(0, 1, len(x))
        return type("Record", (), {"loss": loss, "t": t, "half_log_snr": 3 - 6 * t})()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_the_run(tmp_path, value):
    options = {"model": linear(), "micro_batch": None, **NO_SNAPSHOTS}
    with pytest.raises(
        TrainingError, match=r"loss of step 7 is not finite for 2 of 16 samples, at t = 0\.0666667, 1\."
    ):
        train(tmp_path, objective=Broken(7, value), **options)
    saved = load_file(tmp_path / "failed-step-0000007.safetensors")
    report = json.loads((tmp_path / "failed-step-0000007.json").read_text())
    x, labels = TinyLoader().batch(6)
    assert torch.equal(saved["x"], x)
    assert torch.equal(saved["cond/cond"], labels)
    assert saved["loss"].isfinite().logical_not().nonzero().flatten().tolist() == [1, 15] == report["bad_rows"]
    assert torch.equal(saved["t"], torch.linspace(0, 1, 16))
    assert report["t"] == pytest.approx([1 / 15, 1.0])
    assert list_checkpoints(tmp_path) == [4]
    train(tmp_path / "fine", objective=Broken(0), **(options | {"model": linear()}), steps=4, keep=9)
    assert fingerprint(tmp_path, 4) == fingerprint(tmp_path / "fine", 4) | {"sums": fingerprint(tmp_path, 4)["sums"]}


def test_non_finite_gradient_stops_the_run(tmp_path):
    class Steep(Quadratic):
        """sqrt at zero: the loss is finite, its slope is not."""

        def __call__(self, model, x, cond=None, generator=None):
            return (model.weight * 0).abs().sum(1).sqrt().expand(len(x))

    with pytest.raises(TrainingError, match=r"gradient of step 1 is not finite \(all losses are\)"):
        train(tmp_path, model=linear(), objective=Steep(), micro_batch=None, **NO_SNAPSHOTS)
    assert list_checkpoints(tmp_path) == []


def test_wrong_shape_of_the_loss(tmp_path):
    class Mean(Quadratic):
        def __call__(self, model, x, cond=None, generator=None):
            return super().__call__(model, x).mean()

    with pytest.raises(ArgumentError, match=r"returned shape \(\) for 6 samples"):
        train(tmp_path, model=linear(), objective=Mean())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path, number):
    class Asks(TinyLoader):
        def batch(self, step):
            if step == 9:
                os.kill(os.getpid(), number)
            return super().batch(step)

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    result = train(tmp_path, loader=Asks())
    assert (result.step, result.stopped) == (10, True)
    assert list_checkpoints(tmp_path) == [8, 10]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    train(tmp_path)
    train(tmp_path / "whole")
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "whole")
    assert records(tmp_path) == records(tmp_path / "whole")


def test_second_ctrl_c_aborts_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("undiffuse.training.run_folder._SAME_PRESS", 0.0)

    class Asks(TinyLoader):
        def batch(self, step):
            if step == 9:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loader=Asks())
    assert list_checkpoints(tmp_path) == [4, 8]


def test_one_press_that_arrives_twice_is_one(tmp_path):
    class Asks(TinyLoader):
        def batch(self, step):
            if step == 9:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(step)

    assert train(tmp_path, loader=Asks()).step == 10


def test_runs_in_another_thread(tmp_path):
    """Only the main thread may install handlers."""
    done = []
    thread = threading.Thread(target=lambda: done.append(train(tmp_path, steps=4).step))
    thread.start()
    thread.join()
    assert done == [4]


def test_samples_on_schedule_do_not_change_training(tmp_path):
    calls = []

    def on_sample(step, model):
        calls.append(step)
        assert not model.training
        assert model is not trained
        torch.manual_seed(0)
        torch.rand(3)
        expected = model.net.last.bias.clone()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        averages[step] = expected

    averages = {}
    trained = tiny_model()
    train(tmp_path / "a", model=trained, on_sample=on_sample, sample_every=8, keep=9)
    train(tmp_path / "b")
    assert calls == [8, 16, 24]
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    for step in calls:
        ema = load_checkpoint(tmp_path / "a", step).average("half-life-5")
        assert torch.equal(averages[step], ema["net.last.bias"])


def test_records(tmp_path):
    seen = []
    train(tmp_path, on_log=seen.append, log_every=7)
    assert [r["step"] for r in seen] == [7, 14, 21, 24]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == seen
    for record, steps in zip(seen, (7, 7, 7, 3)):
        levels = record["loss_by_noise"]
        assert sum(levels["count"]) == 16 * steps
        assert len(levels["edges"]) == len(levels["mean"]) + 1 == len(levels["count"]) + 1
        total = sum(m * n for m, n in zip(levels["mean"], levels["count"]) if n)
        assert total / (16 * steps) == pytest.approx(record["loss"], rel=1e-9)
        assert all((m is None) == (n == 0) for m, n in zip(levels["mean"], levels["count"]))
        assert record["eta_seconds"] == pytest.approx((24 - record["step"]) * 16 / record["images_per_second"])


def test_bf16_keeps_fp32_weights(tmp_path):
    seen = []
    model = tiny_model()
    model.net.last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(tmp_path, model=model, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    checkpoint = load_checkpoint(tmp_path)
    for name in ("model", "ema", "optimizer"):
        assert {v.dtype for v in checkpoint.tensors(name).values()} <= {torch.float32, torch.int64}
    train(tmp_path / "fp32")
    low, full = records(tmp_path)[-1]["loss"], records(tmp_path / "fp32")[-1]["loss"]
    assert low != full
    assert low == pytest.approx(full, rel=0.05)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.inputs = []

    def forward(self, x, c_noise, cond=None):
        self.inputs.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.body(x)


class Images(TinyLoader):
    def batch(self, step):
        return Streams.of(5, 16, first=16 * step).normal((16, 3, 6, 6)), None


def image_model():
    model = tiny_model()
    torch.manual_seed(0)
    model.net = Convolutions()
    return model


def test_channels_last_is_a_matter_of_memory_only(tmp_path):
    model = image_model()
    train(tmp_path / "last", model=model, loader=Images(), channels_last=True, steps=6)
    assert model.net.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(model.net.inputs)
    train(tmp_path / "first", model=image_model(), loader=Images(), steps=6)
    for name in ("model", "ema"):
        last = load_checkpoint(tmp_path / "last").tensors(name)
        first = load_checkpoint(tmp_path / "first").tensors(name)
        for key, value in first.items():
            assert last[key].is_contiguous()
            assert torch.allclose(last[key], value, atol=2e-4), key


def test_channels_last_resumes_bit_for_bit(tmp_path):
    options = {"loader": Images(), "channels_last": True, "schedule": "constant"}
    train(tmp_path / "once", model=image_model(), steps=8, **options)
    train(tmp_path / "twice", model=image_model(), steps=5, **options)
    train(tmp_path / "twice", model=image_model(), steps=8, **options)
    once, twice = fingerprint(tmp_path / "once"), fingerprint(tmp_path / "twice")
    assert {k: v for k, v in once.items() if k != "sums"} == {k: v for k, v in twice.items() if k != "sums"}


@pytest.mark.slow
def test_compiling_changes_no_name(tmp_path):
    # Without dropout: compiled code draws its own random numbers.
    train(tmp_path / "eager", model=tiny_model(dropout=0.0), steps=4)
    train(tmp_path / "compiled", model=tiny_model(dropout=0.0), steps=4, compile=True)
    eager = load_checkpoint(tmp_path / "eager").weights("half-life-5")
    compiled = load_checkpoint(tmp_path / "compiled").weights("half-life-5")
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[k].double(), compiled[k].double(), atol=1e-6) for k in eager)
    train(tmp_path / "compiled", model=tiny_model(dropout=0.0), steps=8)


def test_unknown_device(tmp_path):
    with pytest.raises(ArgumentError, match="unknown device 'gpu'"):
        fit(linear(), Quadratic(), TinyLoader(), settings(), tmp_path, device="gpu")
    count = torch.cuda.device_count()
    with pytest.raises(ArgumentError, match=f"cuda:{count}.* is not there: this machine has {count} CUDA devices"):
        fit(linear(), Quadratic(), TinyLoader(), settings(), tmp_path, device=f"cuda:{count}")
