"""What single options of the U-Net do, each against its own definition."""

import pytest
import torch
from torch import nn

from undiffuse.nets import UNet
from undiffuse.nets.blocks import Attention
from undiffuse.nets.embedding import ImageFourier
from unets import batch, small


def test_attention_behind_the_last_block_only():
    net = small((2, 16, 16), 8, (1, 1), blocks=2, attention=[16], up_attention="last", middle_attention=False)
    seen = [name for name, module in net.named_modules() if isinstance(module, Attention)]
    assert seen == ["down.0.attention", "down.1.attention", "up.1.2.attention"]


def test_heads_are_a_number_or_a_width():
    for options, heads in (({"heads": 4}, [4, 4]), ({"heads": 1}, [1, 1]), ({"head_width": 4}, [2, 4])):
        net = UNet([1, 8, 8], 8, [1, 2], 1, [8, 4], middle_attention=False, **options)
        assert [m.heads for m in net.down.modules() if isinstance(m, Attention)] == heads


def test_the_image_reaches_every_level():
    """With the first convolution silenced, a progressive input still sees the image, from level 1 on."""
    x, c = batch()
    for kind, combine in (("none", "sum"), ("residual", "sum"), ("input-skip", "sum"), ("input-skip", "cat")):
        net = small(progressive_input=kind, combine=combine)
        with torch.no_grad():
            net.first.weight.zero_()
        change = (net(x, c) - net(torch.zeros_like(x), c)).abs().max()
        assert (change > 1e-2) == (kind != "none")


def test_the_answer_is_a_sum_over_levels():
    """The two heads of an output pyramid, alone: the first level's, and the doubled one of the level below."""
    net = small((2, 8, 8), progressive_output="output-skip", resample_filter=[1, 3, 3, 1]).double()
    x, c = batch(2, dtype=torch.float64)
    seen = {}
    net.norm.register_forward_hook(lambda m, inputs, y: seen.update(top=y))
    net.outputs[0].norm.register_forward_hook(lambda m, inputs, y: seen.update(low=y))
    y = net(x, c)
    low = net.outputs[0].conv(seen["low"])
    line = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 4
    kernel = torch.outer(line, line).expand(2, 1, 4, 4)
    doubled = nn.functional.conv_transpose2d(low, kernel, stride=2, padding=1, groups=2)
    assert low.shape[2] == 4
    torch.testing.assert_close(y, net.last(seen["top"]) + doubled)


def test_the_noise_label_is_shifted_then_scaled():
    net = small(noise_offset=-0.25, noise_scale=3.0)
    plain = small()
    x, c = batch()
    torch.testing.assert_close(net(x, c), plain(x, 3 * (c - 0.25)))


def test_glorots_start():
    """Uniform with variance 2 / (fan in + fan out), a tenth for attention, 0 for offsets and for what starts at 0."""
    torch.manual_seed(0)
    net = UNet([3, 8, 8], 64, [1, 2], 1, [4], initial="glorot", progressive_input="residual")
    block, attention = net.down[2].block, net.down[2].attention
    for layer, fans, share in (
        (block.conv_1, 9 * (64 + 128), 1.0),
        (block.skip, 64 + 128, 1.0),
        (net.embedding.first, 64 + 256, 1.0),
        (net.inputs[0].conv, 9 * (3 + 64), 1.0),
        (attention.qkv, 2 * 128, 0.1),
    ):
        expected = 2 * share / fans
        # The variance of n uniform numbers has a relative standard error of sqrt(0.8 / n): 5 of them.
        error = 5 * (0.8 / layer.weight.numel()) ** 0.5
        assert layer.weight.var().item() == pytest.approx(expected, rel=error)
        assert layer.weight.abs().max().item() <= (3 * expected) ** 0.5 * (1 + 1e-6)
        assert not layer.bias.any()
    assert not any(p.any() for layer in (block.conv_2, attention.out, net.last) for p in layer.parameters())


def test_the_place_within_a_pixels_value_is_seen_in_bf16():
    """Value k of 256 dequantised by u is `(k + u) / 128 - 1`: sin and cos of 2^7 pi x tell u, whatever k is."""
    k = torch.tensor([0.0, 1.0, 77.0, 255.0])[:, None, None, None]
    u = torch.tensor([0.1, 0.25, 0.6])
    features = ImageFourier([7, 8])(((k + u) / 128 - 1).double(), torch.full((4,), -torch.inf))
    assert features.shape == (4, 5, 1, 3)
    sign = 1 - 2 * (k.double()[:, :, 0] % 2)
    torch.testing.assert_close(features[:, 1], (sign * (torch.pi * u).sin()).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[:, 4], (2 * torch.pi * u).cos().expand(4, 1, 3).double(), atol=1e-4, rtol=0)

    x, c = torch.full((2, 1, 8, 8), 0.1 / 128 - 1), torch.full((2,), -6.0)
    x[1] = 0.24 / 128 - 1
    for powers in ((), (6, 7)):
        net = small((1, 8, 8), input_fourier=powers)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one, other = net(x, c)
        assert bool((one != other).any()) == bool(powers)


def test_a_wave_fades_as_its_mean_over_the_noise_does():
    """E sin(w (x + s z)) and E cos(w (x + s z)) by quadrature, with noise of a tenth to twice the wave's radian."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) * (z[1] - z[0]) / (2 * torch.pi) ** 0.5
    x, w = torch.tensor(0.1234, dtype=torch.float64), 2.0**5 * torch.pi
    for share in (0.1, 1.0, 2.0):
        s = share / w
        means = [(density * wave(w * (x + s * z))).sum() for wave in (torch.sin, torch.cos)]
        seen = ImageFourier([5])(x.reshape(1, 1, 1, 1), torch.tensor([s], dtype=torch.float64).log())
        torch.testing.assert_close(seen.flatten()[1:], torch.stack(means), atol=1e-9, rtol=0)
