"""The U-Net: exactness at the start, independence of samples, types and layouts, and what it refuses."""

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.core.errors import ArgumentError
from undiffuse.nets import NETS, UNet, norm
from undiffuse.nets.blocks import Attention
from unets import batch, small

KNOBS = {
    "plain": {},
    "ddpm++": {"modulation": "shift", "resample": "block", "skip_rescale": True, "attention": [4]},
    "ddpm": {"modulation": "shift", "resample": "conv", "attention": [4], "middle_attention": True},
    "adm": {"resample": "block", "attention": [8, 4], "head_width": 4, "embedding": "fourier"},
    "pool": {"resample": "pool", "middle_attention": False},
    "ncsn++": {
        "modulation": "shift",
        "resample": "block-conv",
        "resample_filter": [1, 3, 3, 1],
        "skip_rescale": True,
        "attention": [8],
        "up_attention": "last",
        "heads": 2,
        "embedding": "fourier",
        "progressive_input": "residual",
        "norm_eps": 1e-6,
    },
    "large ncsn++": {
        "modulation": "shift",
        "resample": "conv",
        "resample_filter": [1, 3, 3, 1],
        "progressive_input": "input-skip",
        "combine": "cat",
        "progressive_output": "output-skip",
    },
    "adm's labels": {
        "resample": "conv-end",
        "late_condition": True,
        "norm_groups": 4,
        "noise_frequencies": [1, 0.1],
        "noise_scale": 2.0,
        "noise_offset": -0.5,
        "progressive_input": "input-skip",
    },
}


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_new_network_returns_exactly_zero(knobs):
    x, c = batch()
    assert UNet([2, 8, 8], 8, [1, 2], 1, **KNOBS[knobs])(x, c).abs().max() == 0


@pytest.mark.parametrize("knobs", KNOBS)
def test_a_sample_does_not_depend_on_its_batch(knobs):
    net = small(num_classes=3, **KNOBS[knobs])
    x, c = batch()
    labels = torch.tensor([0, -1, 2, 1, -1])
    together = net(x, c, labels)
    assert together.std() > 0.05
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(net(x[order], c[order], labels[order]), together[order], rtol=1e-5, atol=1e-5)


def test_conditions_reach_their_row_only():
    net = small(num_classes=3, cond_dim=2)
    x, c = batch(3)
    vector = torch.tensor([[0.5, -1.0], [float("nan")] * 2, [1.0, 1.0]])
    cond = {"label": torch.tensor([0, -1, 2]), "vector": vector}
    y, none = net(x, c, cond), net(x, c)
    torch.testing.assert_close(y[1], none[1])
    for i in (0, 2):
        assert (y[i] - none[i]).abs().max() > 1e-3
    assert net(x, c + 0.3).sub(none).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("knobs", KNOBS)
def test_fused_norm_and_composition_give_the_same_gradients(knobs, monkeypatch):
    net = small(**KNOBS[knobs]).double()
    x, c = batch(dtype=torch.float64)

    def gradients():
        net.zero_grad()
        y = net(x, c)
        y.square().sum().backward()
        return y, [p.grad.clone() for p in net.parameters()]

    y, fused = gradients()
    monkeypatch.setattr(norm, "_plain_autograd_only", lambda x: False)
    y_plain, plain = gradients()
    torch.testing.assert_close(y, y_plain, rtol=1e-9, atol=1e-9)
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("knobs", KNOBS)
def test_every_parameter_has_a_gradient_without_a_condition(knobs):
    net = small(num_classes=3, cond_dim=2, **KNOBS[knobs])
    x, c = batch()
    for cond in (None, {"label": torch.tensor([0, 1, 2, 0, 1])}, {"vector": torch.ones(5, 2)}):
        net.zero_grad(set_to_none=True)
        net(x, c, cond).square().mean().backward()
        missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []


@pytest.mark.parametrize("knobs", KNOBS)
def test_bfloat16_autocast_is_close_and_returns_the_type_of_x(knobs):
    net = small((2, 16, 16), 16, num_classes=3, **{**KNOBS[knobs], "attention": ()})
    x, c = batch(shape=(2, 16, 16))
    labels = torch.tensor([0, -1, 2, 1, -1])
    y = net(x, c, labels)
    y.square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = net(x, c, labels)
    narrow.square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert narrow.dtype == torch.float32
    assert (narrow - y).square().mean().sqrt() < 0.03 * y.square().mean().sqrt()
    assert nn.functional.cosine_similarity(found, exact, dim=0) > 0.998
    cast = net.to(torch.bfloat16)(x, c, labels)
    assert cast.dtype == torch.float32
    assert (cast - y).square().mean().sqrt() < 0.04 * y.square().mean().sqrt()


def test_memory_formats_agree():
    net = small(attention=[4])
    x, c = batch()
    y = net(x, c)
    last = net(x.contiguous(memory_format=torch.channels_last), c)
    assert torch.equal(y, last)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, c), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [[3, 12, 8], [1, 28, 28], [4, 8, 20], [5, 4, 4]])
def test_any_channels_and_divisible_sizes(shape):
    net = small(shape, 8, (1, 1, 2))
    x, c = batch(2, tuple(shape))
    assert net(x, c).shape == x.shape
    # A network built for one size takes others; a constant shift of the noise label still acts.
    wide = torch.cat([x, x], dim=3)
    assert net(wide, c).shape == wide.shape


def test_resolutions_with_attention():
    net = small((2, 32, 32), 8, (1, 1, 1), attention=[16], head_width=8)
    seen = []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda m, inputs, y: seen.append(y.shape[2]))
    net(*batch(1, (2, 32, 32)))
    assert seen == [16, 8, 16, 16]  # on the way down, in the middle, twice on the way up


def test_dropout_is_off_in_eval():
    net = small(dropout=0.5)
    x, c = batch()
    assert not torch.equal(net(x, c), net(x, c))
    net.eval()
    assert torch.equal(net(x, c), net(x, c))


def test_it_is_traced_as_one_graph():
    net = small((2, 4, 4), 4, (1, 2), num_classes=3)
    x, c = batch(shape=(2, 4, 4))
    labels = torch.tensor([0, -1, 2, 1, -1])
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c, labels), net(x, c, labels), rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    """The divergence's gradient, as score matching wants it, against differences."""
    net = small((1, 4, 4), 4, (1, 2), attention=[2]).double()
    x, c = batch(1, (1, 4, 4), torch.float64)
    x.requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def product(v):
        with sdpa_kernel(SDPBackend.MATH):
            return (torch.autograd.grad((net(v, c) * probe).sum(), v, create_graph=True)[0] * probe).sum()

    gradient = torch.autograd.grad(product(x), x)[0]
    step = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    difference = (product(x + step) - product(x - step)).detach() / 2
    torch.testing.assert_close(difference, (gradient * step).sum(), rtol=1e-5, atol=1e-12)


def test_forward_mode():
    net = small((1, 4, 4), 4, (1, 2), attention=[2]).double()
    x, c = batch(2, (1, 4, 4), torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda v: net(v, c), (x,), (direction,))
    h = 1e-5
    difference = (net(x + h * direction, c) - net(x - h * direction, c)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": [3, 28, 30], "multipliers": [1, 2, 2]}, r"28x30 with 3 levels.*28x32, or use 2 levels"),
        ({"shape": [3, 7, 7], "multipliers": [1, 2]}, r"resize or pad them to 8x8, or use 1 level"),
        ({"shape": [3, 8]}, r"takes \[channels, height, width\]"),
        ({"shape": [3, 8, 8], "attention": [5], "multipliers": [1, 2]}, r"resolution 5.*\[8, 4\]"),
        ({"shape": [3, 8, 8], "modulation": "scale_shift"}, "Did you mean 'scale-shift'"),
        ({"shape": [3, 8, 8], "resample": "block2"}, "Did you mean 'block'"),
        ({"shape": [3, 8, 8], "dropout": 1.0}, "dropout=1.0"),
        ({"shape": [3, 8, 8], "multipliers": []}, r"multipliers=\[\]"),
        ({"shape": [3, 8, 8], "blocks": 0}, "blocks=0"),
        ({"shape": [3, 8, 8], "resample_filter": [1, 2, 1]}, "even number of taps"),
        ({"shape": [3, 8, 8], "resample": "conv-end", "resample_filter": [1, 3, 3, 1]}, "conv-end.*has no filter"),
        ({"shape": [3, 8, 8], "progressive_input": "residul"}, "Did you mean 'residual'"),
        ({"shape": [3, 8, 8], "progressive_output": "skip"}, "Did you mean 'output-skip'"),
        ({"shape": [3, 8, 8], "initial": "glorott"}, "Did you mean 'glorot'"),
        ({"shape": [3, 8, 8], "combine": "concat"}, "unknown combine 'concat'"),
        ({"shape": [3, 8, 8], "up_attention": "first"}, "unknown up_attention 'first'"),
        ({"shape": [3, 8, 8], "attention": [8], "heads": 3}, "heads=3 over 64 channels"),
        ({"shape": [3, 8, 8], "norm_groups": 5}, "norm_groups=5 over 64 channels"),
        ({"shape": [3, 8, 8], "noise_frequencies": [1e-4, 1]}, r"noise_frequencies=\[0.0001, 1\]"),
        ({"shape": [3, 8, 8], "embedding": "fourier", "noise_frequencies": [1, 1]}, "spread by noise_scale"),
    ],
)
def test_wrong_construction_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        UNet(**arguments)


def test_wrong_calls_are_refused():
    net = small((2, 8, 8), num_classes=3)
    x, c = batch(2)
    with pytest.raises(ArgumentError, match=r"9x8 with 2 levels.*10x8"):
        net(torch.zeros(2, 2, 9, 8), c)
    with pytest.raises(ArgumentError, match="x has 3 channels: this U-Net was built for 2"):
        net(torch.zeros(2, 3, 8, 8), c)
    with pytest.raises(ArgumentError, match="num_classes=8"):
        net(x, c, torch.tensor([0, 7]))


def test_arguments_survive_json():
    arguments = json.loads(
        json.dumps({"shape": [3, 8, 8], "width": 8, "multipliers": [1, 2], "attention": [4], "num_classes": 2})
    )
    assert isinstance(NETS["unet"](**arguments), UNet)


def test_it_learns_which_class_is_which():
    """Two classes of constant images under heavy noise: the label says which, and no label gives the mean, 0."""
    torch.manual_seed(0)
    net = UNet([1, 4, 4], 8, [1, 2], 1, num_classes=2, middle_attention=False)
    adam = torch.optim.Adam(net.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        labels = torch.randint(2, (32,), generator=generator)
        target = (2.0 * labels - 1).reshape(-1, 1, 1, 1).expand(32, 1, 4, 4)
        dropped = torch.where(torch.rand(32, generator=generator) < 0.3, -1, labels)
        loss = (net(torch.randn(32, 1, 4, 4, generator=generator), torch.ones(32), dropped) - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    x = torch.randn(200, 1, 4, 4, generator=generator)
    with torch.no_grad():
        means = [net(x, torch.ones(200), torch.full((200,), label)).mean().item() for label in (1, 0, -1)]
    assert means == pytest.approx([1, -1, 0], abs=0.3)
