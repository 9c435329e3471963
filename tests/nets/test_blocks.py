"""Parts of the U-Net against explicit computations and identities."""

import math

import pytest
import torch
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.blocks import Attention, ResidualBlock, groups_of
from undiffuse.nets.resampling import Double, Halve, Same


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


@pytest.mark.parametrize("head_width", [4, 8, 64])
def test_attention_is_softmax_of_scaled_products(head_width):
    module = randomise(Attention(8, head_width, 1.0).double())
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    heads = max(1, 8 // head_width)
    hat = F.group_norm(x, groups_of(8), module.norm.weight, module.norm.bias, module.norm.eps)
    total = torch.zeros(2, 15, 8, dtype=torch.float64)
    for sample in range(2):
        tokens = hat[sample].flatten(1).T
        q, k, v = (tokens @ module.qkv.weight.T + module.qkv.bias).split(8, dim=1)
        for head in range(heads):
            own = slice(head * 8 // heads, (head + 1) * 8 // heads)
            scores = q[:, own] @ k[:, own].T / math.sqrt(8 / heads)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            total[sample, :, own] = weights @ v[:, own]
    expected = x + module.out(total).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pixels", [(4, 4), (12, 12)])  # of which one takes the plain kernel, one the fused
def test_attention_in_bfloat16_is_as_good_as_its_eight_bits(pixels):
    module = randomise(Attention(16, 8, 1.0))
    x = torch.randn(2, 16, *pixels, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    exact = module.double()(x.double())
    torch.testing.assert_close(low.double(), exact, rtol=0.03, atol=0.03)
    gradients = [torch.autograd.grad(y.double().square().sum(), x)[0] for y in (low, exact)]
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.1)


def test_attention_does_not_know_where_pixels_are():
    module = randomise(Attention(8, 4, 1.0).double())
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    mixed = module(x.flatten(2)[:, :, order].reshape(x.shape))
    torch.testing.assert_close(mixed, module(x).flatten(2)[:, :, order].reshape(x.shape))


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ArgumentError, match="head_width=3"):
        Attention(10, 3, 1.0)


def test_halving_undoes_doubling_and_keeps_the_mean():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Halve()(Double()(x)), x)
    torch.testing.assert_close(Halve()(x).mean((2, 3)), x.mean((2, 3)))
    assert Double()(x)[0, 0, 5, 7] == x[0, 0, 2, 3]


@pytest.mark.parametrize("resample", [Same(), Halve(), Double()])
@pytest.mark.parametrize("rescale", [1.0, math.sqrt(0.5)])
def test_a_new_block_is_its_skip_branch(resample, rescale):
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, 16, resample=resample, modulation="scale-shift", dropout=0.0, rescale=rescale).double()
    x, e = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x, e), resample(x) * rescale)


@pytest.mark.parametrize("modulation", ["scale-shift", "shift"])
def test_the_embedding_of_a_sample_changes_that_sample_only(modulation):
    block = randomise(
        ResidualBlock(8, 12, 16, resample=Same(), modulation=modulation, dropout=0.0, rescale=1.0).double()
    )
    generator = torch.Generator().manual_seed(1)
    x, e = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 8, 4, 4), (3, 16)))
    other = e.clone()
    other[1] += 1
    change = (block(x, other) - block(x, e)).abs().amax((1, 2, 3))
    assert change[0] == change[2] == 0
    assert change[1] > 0.1


def test_scale_of_minus_one_silences_the_features():
    """With 1 + s = 0 the second convolution sees silu(d), whatever x is."""
    block = randomise(
        ResidualBlock(8, 8, 4, resample=Same(), modulation="scale-shift", dropout=0.0, rescale=1.0).double()
    )
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias[:8], block.modulation.bias[8:] = -1.0, 0.7
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    constant = F.silu(torch.full_like(x, 0.7))
    torch.testing.assert_close(block(x, torch.zeros(2, 4, dtype=torch.float64)) - x, block.conv_2(constant))


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    block = randomise(ResidualBlock(8, 8, 4, resample=Same(), modulation="shift", dropout=0.5, rescale=1.0).double())
    x, e = torch.randn(1, 8, 4, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    block.eval()
    quiet = block(x, e)
    assert torch.equal(quiet, block(x, e))
    block.train()
    torch.manual_seed(0)
    draws = torch.stack([block(x, e) for _ in range(3000)])
    error = (draws.mean(0) - quiet).abs() / (draws.std(0) / math.sqrt(3000))
    assert error.max() < 5.5  # 128 normal deviates: false alarm below 1e-5
    assert draws.std(0).min() > 0.1


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (4, 1), (32, 8), (128, 32), (192, 32), (96, 24), (1024, 32)])
def test_groups_divide_and_hold_at_least_four_channels(channels, groups):
    assert groups_of(channels) == groups
