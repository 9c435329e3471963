"""The transformer: exact at the start, an explicit computation, independence of samples, and what it refuses.

Beside facebookresearch/DiT at random weights: 4e-7 relative in float32 at steps 1 and 4. (At step 900 both are 2e-5 to
4e-5 from a computation in float64: the rounding of the phases.)
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.core.errors import ArgumentError
from undiffuse.nets import NETS, DiT
from undiffuse.nets.dit import Block, positions
from unets import batch

F64 = torch.float64


def small(shape=(2, 8, 8), seed=0, **options) -> DiT:
    """A small transformer whose zero layers have been given values."""
    torch.manual_seed(seed)
    net = DiT(shape, width=16, depth=2, heads=4, noise_features=8, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return net


def test_a_new_network_returns_exactly_zero_and_its_blocks_nothing():
    x, c = batch()
    torch.manual_seed(0)
    net = DiT([2, 8, 8], width=16, depth=2, heads=4)
    assert net(x, c).abs().max() == 0
    tokens, e = torch.randn(2, 3, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[0](tokens, e), tokens)


def test_positions_are_sines_of_columns_then_of_rows():
    table = positions(3, 5, 8)
    for y, x in ((0, 0), (2, 4), (1, 3)):
        rates = (1.0, 10000**-0.5)
        expected = [f(r * place) for place in (x, y) for f in (math.sin, math.cos) for r in rates]
        torch.testing.assert_close(table[y * 5 + x], torch.tensor(expected, dtype=F64))


def test_a_block_is_what_its_formula_says():
    torch.manual_seed(0)
    block = Block(8, 2, 3).double()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
    x, e = torch.randn(2, 5, 8, dtype=F64), torch.randn(2, 8, dtype=F64)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.modulation(e)[:, None].split(8, dim=2)

    def hat(h):
        centred = h - h.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()

    tokens = (1 + scale_1) * hat(x) + shift_1
    q, k, v = (tokens @ block.qkv.weight.T + block.qkv.bias).split(8, dim=2)
    mixed = torch.zeros_like(x)
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(q[..., head] @ k[..., head].mT / 2, dim=2)
        mixed[..., head] = weights @ v[..., head]
    y = x + gate_1 * (mixed @ block.out.weight.T + block.out.bias)
    h = ((1 + scale_2) * hat(y) + shift_2) @ block.first.weight.T + block.first.bias
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    y = y + gate_2 * (gelu @ block.second.weight.T + block.second.bias)
    torch.testing.assert_close(block(x, e), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_return_to_their_places(patch):
    """Without blocks, and with constant modulation, output patch (i, j) is one affine map of input patch (i, j)."""
    net = small(patch=patch).double()
    with torch.no_grad():
        net.positions.zero_()
    net.blocks = torch.nn.ModuleList()
    x, c = batch(1, dtype=F64)
    base, moved = net(x, c), x.clone()
    moved[0, 1, 5, 2] += 1  # in the patch of rows 5 // patch and columns 2 // patch
    change = (net(moved, c) - base).abs()[0].amax(0) > 1e-9
    rows, columns = torch.where(change)
    assert set((rows // patch).tolist()) == {5 // patch}
    assert set((columns // patch).tolist()) == {2 // patch}
    # The same patch elsewhere says the same.
    rolled = net(x.roll((4, 4), (2, 3)), c)
    torch.testing.assert_close(rolled, base.roll((4, 4), (2, 3)))


def test_a_sample_does_not_depend_on_its_batch():
    net = small(num_classes=3)
    x, c = batch()
    labels = torch.tensor([0, -1, 2, 1, -1])
    together = net(x, c, labels)
    assert together.std() > 0.05
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_conditions_reach_their_row_only():
    net = small(num_classes=3, cond_dim=2)
    x, c = batch(3)
    vector = torch.tensor([[0.5, -1.0], [float("nan")] * 2, [1.0, 1.0]])
    y, none = net(x, c, {"label": torch.tensor([0, -1, 2]), "vector": vector}), net(x, c)
    torch.testing.assert_close(y[1], none[1])
    assert min((y[i] - none[i]).abs().max() for i in (0, 2)) > 1e-3
    assert net(x, c + 0.3).sub(none).abs().amax((1, 2, 3)).min() > 1e-3


def test_other_sizes_have_positions_of_their_own():
    net = small()
    x, c = batch(2, (2, 12, 4))
    larger = small((2, 12, 4))
    larger.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x, c), larger(x, c))


def test_every_parameter_has_a_gradient_without_a_condition():
    net = small(num_classes=3, cond_dim=2)
    x, c = batch()
    net(x, c).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_bfloat16_is_close_and_returns_the_type_of_x():
    net = small(num_classes=3)
    x, c = batch()
    y = net(x, c)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = net(x, c)
    cast = small(num_classes=3).to(torch.bfloat16)(x, c)
    for other in (narrow, cast):
        assert other.dtype == torch.float32
        assert (other - y).square().mean().sqrt() < 0.04 * y.square().mean().sqrt()


def test_it_is_traced_as_one_graph():
    net = small(num_classes=3)
    x, c = batch()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c), net(x, c), rtol=1e-4, atol=1e-5)


def test_forward_mode_and_second_derivatives():
    net = small((1, 4, 4)).double()
    x, c = batch(1, (1, 4, 4), F64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    _, tangent = torch.func.jvp(lambda u: net(u, c), (x,), (v,))
    difference = (net(x + 1e-5 * v, c) - net(x - 1e-5 * v, c)) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    x.requires_grad_()

    def product(u):
        with sdpa_kernel(SDPBackend.MATH):
            return (torch.autograd.grad((net(u, c) * v).sum(), u, create_graph=True)[0] * v).sum()

    gradient = torch.autograd.grad(product(x), x)[0]
    difference = (product(x + 1e-5 * v) - product(x - 1e-5 * v)).detach() / 2e-5
    torch.testing.assert_close(difference, (gradient * v).sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": [3, 8]}, r"takes \[channels, height, width\]"),
        ({"shape": [3, 9, 8]}, "9x8 in patches of 2x2.*10x8"),
        ({"shape": [3, 8, 8], "width": 18, "heads": 6}, "width that 4 and heads divide"),
        ({"shape": [3, 8, 8], "width": 16, "heads": 5}, "width that 4 and heads divide"),
        ({"shape": [3, 8, 8], "depth": 0}, "depth=0"),
        ({"shape": [3, 8, 8], "embedding": "fourrier"}, "Did you mean 'fourier'"),
    ],
)
def test_wrong_construction_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        NETS["dit"](**arguments)


def test_wrong_calls_are_refused():
    net = small()
    with pytest.raises(ArgumentError, match="x has 3 channels: this DiT was built for 2"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ArgumentError, match="8x7 in patches"):
        net(torch.zeros(1, 2, 8, 7), torch.zeros(1))
