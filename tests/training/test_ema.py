"""Averages of the weights against their closed forms."""

import math

import numpy as np
import pytest
import torch
from training_toys import Point, load_checkpoint, tiny_model, train

from undiffuse.core.errors import ArgumentError, CheckpointError, RunError
from undiffuse.training import TrainConfig, rebuild
from undiffuse.training.ema import HalfLife, Power, WeightAverages, averages, gamma_of
from undiffuse.training.posthoc import combination, inner_product, snapshot_shelf


def follow(kind, trajectory, start=0.0):
    """The average after each point of a trajectory, float64."""
    point = Point(start)
    tracked = WeightAverages(point, [kind])
    values = []
    for step, value in enumerate(trajectory, start=1):
        with torch.no_grad():
            point.w.fill_(float(value))
        tracked.update(step)
        values.append(float(tracked.values[kind.name]["w"]))
    return np.array(values)


def test_half_life_on_a_ramp_of_weights():
    """w_k = k (a constant gradient): the geometric series gives a_n = n - b (1 - b^n) / (1 - b)."""
    kind = HalfLife(20.0, ramp=1e9)
    b = 0.5 ** (1 / 20)
    n = np.arange(1, 201)
    assert follow(kind, n) == pytest.approx(n - b * (1 - b**n) / (1 - b), rel=1e-12)


def test_half_of_the_average_is_new_after_a_half_life():
    """A step of height one at k = 1: after h steps the average is exactly 1/2, after 2 h 3/4."""
    values = follow(HalfLife(50.0, ramp=1e9), np.ones(150))
    assert values[[49, 99, 149]] == pytest.approx([0.5, 0.75, 0.875], rel=1e-12)


def test_warm_up_of_the_half_life():
    """While the ramp rules, 1 - a_n = prod 2^(-1 / (r k)) = 2^(-H_n / r) with the harmonic number H_n."""
    ramp, n = 0.5, 30
    values = follow(HalfLife(1e9, ramp), np.ones(n))
    harmonic = np.cumsum(1 / np.arange(1, n + 1))
    assert 1 - values == pytest.approx(2 ** (-harmonic / ramp), rel=1e-10)
    # It ends where ramp k reaches the half-life.
    kind = HalfLife(10.0, ramp=0.1)
    assert kind.new_weight(99) > kind.new_weight(100) == pytest.approx(1 - 2**-0.1, rel=1e-14)
    assert kind.new_weight(100) == kind.new_weight(5000)


def test_tiny_new_weights_do_not_cancel():
    """1 - 2^(-1/h) at h = 1e12 loses five digits when it is computed as written."""
    assert HalfLife(1e12, ramp=1e9).new_weight(10**6) == pytest.approx(math.log(2) * 1e-12, rel=1e-11)
    gamma = gamma_of(0.1)
    assert Power(0.1).new_weight(10**9) == pytest.approx((gamma + 1) * 1e-9, rel=1e-7)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_power_profile(width):
    """The share of step i is (i^(g+1) - (i-1)^(g+1)) / t^(g+1); measured by unit impulses."""
    t, gamma = 40, gamma_of(width)
    shares = np.array([follow(Power(width), np.eye(t)[i], start=9.0)[-1] for i in range(t)])
    i = np.arange(1, t + 1)
    assert shares == pytest.approx((i ** (gamma + 1) - (i - 1) ** (gamma + 1)) / t ** (gamma + 1), rel=1e-9, abs=1e-15)
    assert shares.sum() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_width_is_the_standard_deviation_of_the_profile(width):
    """Mean and variance of the density (g + 1) s^g on (0, 1], by quadrature."""
    gamma = gamma_of(width)
    assert gamma > -1e-9
    s = (np.arange(400_000) + 0.5) / 400_000
    density = (gamma + 1) * s**gamma / 400_000
    mean = (density * s).sum()
    assert math.sqrt((density * (s - mean) ** 2).sum()) == pytest.approx(width, rel=1e-5)


def test_known_exponent():
    """Karras et al. 2024 give 6.94 for 10 % and 16.97 for 5 %."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    with pytest.raises(ArgumentError, match="0 < width"):
        gamma_of(0.3)


@pytest.mark.parametrize(
    ("a", "b"), [((3.0, 7.0), (5.5, 10.0)), ((16.97, 500.0), (6.94, 300.0)), ((0.0, 2.0), (0.0, 5.0))]
)
def test_inner_product_by_quadrature(a, b):
    def profile(g, t, s):
        return np.where(s <= t, (g + 1) * s**g / t ** (g + 1), 0.0)

    n, end = 2_000_000, max(a[1], b[1])
    s = (np.arange(n) + 0.5) / n * end
    expected = (profile(*a, s) * profile(*b, s)).sum() * end / n
    assert inner_product(a, b) == pytest.approx(expected, rel=1e-5)
    assert inner_product(a, b) == pytest.approx(inner_product(b, a), rel=1e-14)


def test_combination_is_the_least_squares_one():
    """Any other coefficients that sum to one are worse; those of a profile that is there are 1 and 0."""
    profiles = [(gamma_of(w), t) for t in (100.0, 200.0, 300.0, 400.0) for w in (0.05, 0.1)]
    wanted = (gamma_of(0.07), 400.0)

    def error(x):
        gram = np.array([[inner_product(p, q) for q in profiles] for p in profiles])
        return (
            x @ gram @ x
            - 2 * x @ np.array([inner_product(p, wanted) for p in profiles])
            + inner_product(wanted, wanted)
        )

    best = combination(profiles, wanted)
    assert best.sum() == pytest.approx(1.0, abs=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(50):
        direction = rng.normal(size=len(profiles))
        direction -= direction.mean()
        assert error(best + 0.01 * direction) > error(best)
    assert error(best) < 2e-3 * inner_product(wanted, wanted)
    assert combination(profiles, profiles[5]) == pytest.approx(np.eye(8)[5], abs=1e-8)


class Walk:
    """A random walk of 200 independent weights: the hardest thing to average that training does."""

    def __init__(self, folder, steps, every, start, snapshot_widths=(0.05, 0.10), tracked=()):
        generator = torch.Generator().manual_seed(1)
        model = torch.nn.Linear(200, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.fill_(start)
        self.averages = WeightAverages(model, [Power(w) for w in (*snapshot_widths, *tracked)])
        names = [Power(w).name for w in snapshot_widths]
        for step in range(1, steps + 1):
            with torch.no_grad():
                model.weight += torch.randn(model.weight.shape, generator=generator, dtype=torch.float64)
            self.averages.update(step)
            if step % every == 0:
                kept = {k: v for k, v in self.averages.tensors().items() if k.split("/")[0] in names}
                state = {"averages": names, "widths": list(snapshot_widths)}
                snapshot_shelf(folder).save(step, {"ema": kept}, state)
        self.model = model

    def tracked(self, width):
        return self.averages.values[Power(width).name]["weight"]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_any_width_is_rebuilt_from_snapshots(tmp_path):
    """Against averages that were tracked directly. The walk starts far from zero: coefficients must sum to one."""
    widths = (0.06, 0.08, 0.12, 0.15, 0.2)
    walk = Walk(tmp_path, steps=2048, every=64, start=1000.0, tracked=widths)
    for width, tolerance in ((0.06, 2e-3), (0.08, 2e-3), (0.12, 2e-3), (0.15, 2e-3), (0.2, 2e-3)):
        wanted, got = walk.tracked(width), rebuild(tmp_path, width)["weight"]
        spread = walk.model.weight.detach() - wanted
        assert float((got - wanted).norm() / spread.norm()) < tolerance, width
    for width in (0.05, 0.10):
        assert relative(rebuild(tmp_path, width)["weight"], walk.tracked(width)) < 1e-9


def test_rebuilt_at_an_earlier_step(tmp_path):
    walk = Walk(tmp_path / "half", steps=1024, every=64, start=0.0, tracked=(0.15,))
    Walk(tmp_path / "whole", steps=2048, every=64, start=0.0)
    got = rebuild(tmp_path / "whole", 0.15, step=1024)["weight"]
    assert relative(got, walk.tracked(0.15)) < 5e-3
    assert torch.equal(got, rebuild(tmp_path / "half", 0.15)["weight"])


def test_more_snapshots_are_more_exact(tmp_path):
    errors = []
    for every in (512, 256, 128, 64):
        walk = Walk(tmp_path / str(every), steps=2048, every=every, start=0.0, tracked=(0.15,))
        errors.append(relative(rebuild(tmp_path / str(every), 0.15)["weight"], walk.tracked(0.15)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


def test_rebuilding_needs_snapshots(tmp_path):
    with pytest.raises(RunError, match="has no snapshot: it has none"):
        rebuild(tmp_path, 0.1)
    Walk(tmp_path, steps=8, every=4, start=0.0)
    with pytest.raises(RunError, match=r"no snapshot of step 5: it has \[4, 8\]"):
        rebuild(tmp_path, 0.1, step=5)
    (tmp_path / "snapshots/step-0000004/ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        rebuild(tmp_path, 0.1)


def test_trainer_follows_the_weights_after_each_step(tmp_path):
    """The averages of the checkpoint are those of the weights of the steps, collected one by one."""
    trace = []

    def collect(step, model):
        trace.append(load_checkpoint(tmp_path).weights()["net.last.bias"])

    train(
        tmp_path, ema=(3.0,), ema_power=(0.2,), checkpoint_every=1, keep=1, steps=10, snapshot_every=5,
        sample_every=1, on_sample=collect,
    )  # fmt: skip
    start = tiny_model().net.last.bias.detach()
    for name, kind in (("half-life-3", HalfLife(3.0)), ("power-0.2", Power(0.2))):
        average = start.double()
        for step, weight in enumerate(trace, start=1):
            average = average + kind.new_weight(step) * (weight.double() - average)
        assert torch.allclose(load_checkpoint(tmp_path).average(name)["net.last.bias"].double(), average, rtol=1e-5)
    assert torch.equal(
        rebuild(tmp_path, 0.2)["net.last.bias"], load_checkpoint(tmp_path).average("power-0.2")["net.last.bias"]
    )


def test_averages_are_fp32_when_the_weights_are_not():
    """In bf16 a new weight of 1e-4 would vanish in the rounding."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    tracked = WeightAverages(model, [HalfLife(math.log(2) / 1e-4, ramp=1e9)])
    before = tracked.values[tracked.kinds[0].name]["weight"].clone()
    with torch.no_grad():
        model.weight += 1.0
    tracked.update(1)
    moved = tracked.values[tracked.kinds[0].name]["weight"] - before
    assert float(moved) == pytest.approx(1e-4, rel=0.02)


def test_averaged_copy_leaves_the_model_alone():
    model = tiny_model()
    tracked = WeightAverages(model, averages(TrainConfig(ema=(2.0,))))
    model.net.calls += 5
    with torch.no_grad():
        model.net.last.bias.fill_(7.0)
    twin = tracked.averaged(model)
    assert torch.equal(twin.net.last.bias, tiny_model().net.last.bias)
    assert int(twin.net.calls) == 5
    assert float(model.net.last.bias.detach()[0]) == 7.0
    assert model.training
    assert model.net.last.bias.requires_grad
    nothing = WeightAverages(model, [])
    assert float(nothing.averaged(model).net.last.bias[0]) == 7.0
