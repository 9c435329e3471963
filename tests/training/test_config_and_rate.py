"""The numbers of a run, and the rate of each step."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.training import TrainConfig
from undiffuse.training.optim import clip_gradients, learning_rate, make_optimizers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"training\.steps is 0: expected an integer >= 1"),
        ({"batch": -4}, r"training\.batch is -4"),
        ({"micro_batch": 0}, r"training\.micro_batch is 0: expected an integer >= 1, or null"),
        ({"lr": 0.0}, r"training\.lr is 0\.0: expected a number > 0"),
        ({"lr": math.nan}, r"training\.lr is nan"),
        ({"lr": math.inf}, r"training\.lr is inf"),
        ({"optimizer": "adamww"}, r"'adamww': expected adam or adamw or muon\. Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"precision": "fp16"}, "'fp16': expected fp32 or bf16"),
        ({"betas": (0.9, 1.0)}, r"training\.betas is 1\.0: expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "has 1 values: expected two"),
        ({"ema": (0.0,)}, "expected half-lives > 0"),
        ({"ema": (5.0, 5)}, "expected values that differ"),
        ({"ema_power": (0.29,)}, "relative widths in"),
        ({"cond_dropout": 1.5}, "expected a chance"),
        ({"clip": 0.0}, "expected a number > 0, or null"),
        ({"warmup": -1}, "expected an integer >= 0"),
        ({"trackers": ("tensorbord",)}, "Did you mean 'tensorboard'"),
        ({"snapshot_every": 10}, "ema_power is empty: there is nothing to snapshot"),
        ({"keep": 0}, r"training\.keep is 0"),
        ({"timeout": 0}, r"training\.timeout is 0"),
    ],
)
def test_out_of_range(values, message):
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**values)


def test_is_a_frozen_value():
    config = TrainConfig(ema=[1, 2.5], clip=None, ema_power=[12**-0.5])
    assert config.ema == (1, 2.5)
    assert hash(config) == hash(TrainConfig(ema=[1, 2.5], clip=None, ema_power=[12**-0.5]))
    with pytest.raises(AttributeError):
        config.steps = 3  # pyright: ignore
    assert TrainConfig(**config.as_dict()) == config


def test_warm_up_and_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=2.0, schedule="cosine")
    rates = [learning_rate(config, k) for k in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == 2.0
    # A quarter, half and three quarters of the way: cos(pi/4) = 1 / sqrt 2, 0, -1 / sqrt 2.
    assert rates[35] == pytest.approx(1 + 0.5**0.5)
    assert rates[60] == pytest.approx(1.0)
    assert rates[85] == pytest.approx(1 - 0.5**0.5)
    assert 0 < rates[109] == pytest.approx(1 - math.cos(math.pi / 100))
    assert learning_rate(config, 110) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(TrainConfig(steps=5, warmup=5, schedule="cosine", lr=1.0), 4) == 1.0


def test_constant_rate():
    config = TrainConfig(steps=50, warmup=4, lr=3.0)
    assert [learning_rate(config, k) for k in (0, 1, 3, 4, 49)] == [0.75, 1.5, 3.0, 3.0, 3.0]


def test_norm_is_of_all_gradients_together():
    """|(3, 4, 12)| = 13, spread over two parameters, one more without a gradient."""
    a, b, c = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert float(clip_gradients([a, b, c], None)) == 13.0
    assert a.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([a, b, c], 6.5)) == 13.0
    assert torch.cat([a.grad, b.grad]).tolist() == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)


def test_decoupled_weight_decay():
    """With a zero gradient AdamW multiplies by 1 - lr wd; Adam's L2 term moves by lr whatever the weight."""
    for name, expected in (("adamw", 2.0 * (1 - 0.1 * 0.5)), ("adam", 2.0 - 0.1)):
        p = torch.nn.Parameter(torch.tensor([2.0]))
        frozen = torch.nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        module = torch.nn.ParameterList([p, frozen])
        (optimizer,) = make_optimizers(module, TrainConfig(optimizer=name, lr=0.1, weight_decay=0.5))
        p.grad = torch.zeros(1)
        optimizer.step()
        assert float(p.detach()) == pytest.approx(expected, rel=1e-6)
        assert float(frozen) == 2.0
