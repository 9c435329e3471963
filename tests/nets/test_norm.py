"""The fused norm against torch's composition, its derivatives, and what a group norm must be invariant to."""

import pytest
import torch
from torch.nn import functional as F

from undiffuse.nets import norm
from undiffuse.nets.norm import compose, norm_act


def draw(shape=(3, 8, 6, 4), dtype=torch.float64, last=True, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    gain, bias = torch.randn(2, *shape[:2], generator=generator, dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return [v.requires_grad_() for v in (x, gain, bias)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize(("last", "shape"), [(True, (3, 8, 6, 4)), (False, (2, 8, 3, 5)), (True, (1, 8, 2, 1))])
def test_fused_equals_composition(silu, group, last, shape):
    inputs = draw(shape, last=last)
    fused, plain = norm_act(*inputs, group, 1e-5, silu), compose(*inputs, group, 1e-5, silu)
    assert fused.grad_fn.name().startswith("_Fused")
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(fused, inputs, weight), torch.autograd.grad(plain, inputs, weight)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("silu", [True, False])
def test_first_and_second_derivatives_by_differences(silu):
    inputs = draw((2, 4, 2, 2))
    assert torch.autograd.gradcheck(lambda *v: norm_act(*v, 2, 1e-3, silu), inputs)
    assert torch.autograd.gradgradcheck(lambda *v: norm_act(*v, 2, 1e-3, silu), inputs)


def test_forward_mode_and_vmap():
    x, gain, bias = (v.detach() for v in draw((2, 4, 4, 4)))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    f = lambda v: norm_act(v, gain, bias, 2, 1e-5)  # noqa: E731
    _, tangent = torch.func.jvp(f, (x,), (direction,))
    h = 1e-5
    torch.testing.assert_close(tangent, (f(x + h * direction) - f(x - h * direction)) / (2 * h), rtol=1e-7, atol=1e-8)
    rows = torch.func.vmap(lambda v: norm_act(v[None], gain[:1], bias[:1], 2, 1e-5)[0])(x)
    torch.testing.assert_close(rows, norm_act(x, gain[:1], bias[:1], 2, 1e-5), rtol=1e-10, atol=1e-10)


def test_one_gain_for_the_batch_gets_the_sum_of_gradients():
    x, gain, bias = draw()
    one = gain.detach()[:1].requires_grad_()
    norm_act(x, one, bias, 2, 1e-5).square().sum().backward()
    each = one.detach().repeat(3, 1).requires_grad_()
    norm_act(x.detach(), each, bias.detach(), 2, 1e-5).square().sum().backward()
    torch.testing.assert_close(one.grad, each.grad.sum(0, keepdim=True))


def test_invariances():
    x, gain, bias = (v.detach() for v in draw())
    y = norm_act(x, gain, bias, 4, 0.0)
    # Each group of each sample may be scaled and shifted.
    scale, shift = torch.rand(2, 3, 2, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=x.dtype) + 0.5
    moved = (x.unflatten(1, (2, 4)) * scale + shift).flatten(1, 2)
    torch.testing.assert_close(norm_act(moved, gain, bias, 4, 0.0), y, rtol=1e-9, atol=1e-9)
    # Pixels may trade places.
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    mixed = norm_act(x.flatten(2)[:, :, order].reshape(x.shape), gain, bias, 4, 0.0)
    torch.testing.assert_close(mixed, y.flatten(2)[:, :, order].reshape(x.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pixels", [(16, 16), (7, 7)])
def test_bfloat16_is_as_good_as_its_eight_bits(pixels):
    x, gain, bias = draw((4, 32, *pixels), torch.bfloat16, offset=3.0)
    exact_inputs = [v.detach().double().requires_grad_() for v in (x, gain, bias)]
    y, exact = norm_act(x, gain.float(), bias.float(), 4, 1e-5), compose(*exact_inputs, 4, 1e-5, True)
    assert y.dtype == torch.bfloat16

    def error(a, b):
        return ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()

    assert error(y, exact) < 0.012
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).bfloat16()
    derivatives = torch.autograd.grad(y, (x, gain, bias), weight)
    exact_derivatives = torch.autograd.grad(exact, exact_inputs, weight.double())
    for a, b in zip(derivatives, exact_derivatives):
        assert error(a, b) < 0.02


def test_a_constant_group_gives_the_bias():
    x = torch.full((2, 4, 5, 5), 7.3)
    gain, bias = torch.ones(1, 4), torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        y = norm_act(x.to(dtype), gain, bias, 2, 1e-5).float()
        torch.testing.assert_close(y, F.silu(bias)[:, :, None, None].expand(2, 4, 5, 5), rtol=0.01, atol=0.01)


def test_autocast_does_not_change_what_is_computed_inside():
    x, gain, bias = draw((2, 8, 8, 8), torch.float32)
    gain, bias = gain.float(), bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_act(x, gain, bias, 2, 1e-5)
    assert torch.equal(y, norm_act(x, gain, bias, 2, 1e-5))


def test_the_sum_over_pixels_of_bfloat16_is_accumulated_beyond_its_bits():
    # 4096 ones and a small excess: naive accumulation in 8 bits would stop at 256.
    x = torch.ones(1, 4096, 3, dtype=torch.bfloat16)
    x[:, ::4] = 1.25
    assert torch.equal(norm._pixel_sum(x, torch.float32), torch.full((1, 3), 4096 * 1.0625))


def test_the_sum_over_pixels_of_float16_does_not_overflow():
    x = torch.full((1, 4096, 3), 100.0, dtype=torch.float16)
    assert torch.equal(norm._pixel_sum(x, torch.float32), torch.full((1, 3), 409600.0))
