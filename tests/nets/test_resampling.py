"""Changes of resolution against closed forms: constants, a point, the adjoint, and what the fused form leaves out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.resampling import ConvAfterEnd, Double, FilteredConv, Halve

F64 = torch.float64
FIR = [1, 3, 3, 1]
FILTERS = [[1, 1], FIR, [1, 5, 10, 10, 5, 1], [-1, 3, 3, -1]]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("taps", FILTERS)
def test_constants_stay_constant_inside(taps):
    x = torch.full((1, 2, 16, 16), 0.7, dtype=F64)
    border = len(taps) // 2
    for y in (Halve(taps)(x), Double(taps)(x)):
        inside = y[:, :, border:-border, border:-border]
        torch.testing.assert_close(inside, torch.full_like(inside, 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("taps", FILTERS)
def test_halving_a_row_is_a_sum_of_its_neighbours(taps):
    """Against numpy's convolution of rows, then columns, in its own words."""
    x = noise(1, 1, 8, 12)
    h = np.asarray(taps) / sum(taps)
    border = len(taps) // 2 - 1

    def halved(row):
        padded = np.pad(row, (border, border))
        return np.convolve(padded, h, mode="valid")[::2]

    rows = np.apply_along_axis(halved, 1, x[0, 0].numpy())
    expected = np.apply_along_axis(halved, 0, rows)
    torch.testing.assert_close(Halve(taps)(x)[0, 0], torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


def test_a_point_becomes_the_filter():
    x = torch.zeros(1, 1, 5, 5, dtype=F64)
    x[0, 0, 2, 2] = 1.0
    line = torch.tensor([0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0, 0, 0], dtype=F64)
    torch.testing.assert_close(Double(FIR)(x)[0, 0], torch.outer(line, line))
    # Up, then down: [1, 3, 3, 1] with itself at even distances, (1, 3, 3, 1) . (1, 3, 3, 1) = 20, and 6, and 0.
    again = torch.tensor([0, 6, 20, 6, 0], dtype=F64) / 32
    torch.testing.assert_close(Halve(FIR)(Double(FIR)(x))[0, 0], torch.outer(again, again))


@pytest.mark.parametrize("taps", FILTERS)
def test_doubling_is_four_times_the_adjoint_of_halving(taps):
    fine, coarse = noise(2, 3, 8, 8), noise(2, 3, 4, 4, seed=1)
    torch.testing.assert_close((Double(taps)(coarse) * fine).sum(), 4 * (coarse * Halve(taps)(fine)).sum())


def test_the_box_is_the_same_filter_by_another_way():
    x = noise(1, 2, 6, 6)
    for box, name in ((Halve([1, 1]), "halve"), (Double([1, 1]), "double")):
        general = type(box)([1, 1])
        general.box = False
        torch.testing.assert_close(general(x), box(x), msg=name)


def test_a_filtered_convolution_is_a_convolution_then_a_halving_inside():
    """They differ by the padding between them, so at the border only."""
    torch.manual_seed(0)
    conv = FilteredConv(3, 4, FIR).double()
    x = noise(2, 3, 12, 12)
    apart = Halve(FIR)(F.conv2d(x, conv.weight, padding=1)) + conv.bias[:, None, None]
    y = conv(x)
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], apart[:, :, 1:-1, 1:-1])
    assert (y - apart)[:, :, 0].abs().min() > 0
    # With enough zeros around the image there is no border, and all of it agrees.
    wide = F.pad(x, (4, 4, 4, 4))
    torch.testing.assert_close(
        conv(wide)[:, :, 2:-2, 2:-2], Halve(FIR)(F.conv2d(wide, conv.weight, conv.bias, padding=1))[:, :, 2:-2, 2:-2]
    )
    torch.testing.assert_close(y, conv(wide)[:, :, 2:-2, 2:-2])


def test_padding_at_the_end_looks_at_other_pixels():
    torch.manual_seed(0)
    conv = ConvAfterEnd(2).double()
    x = noise(1, 2, 6, 6)
    full = F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight, conv.bias)  # centred at every pixel
    torch.testing.assert_close(conv(x), full[:, :, 1::2, 1::2])


@pytest.mark.parametrize("taps", [[1], [1, 2, 1], [1, 2], [1, -1], [], [0, 0]])
def test_filters_that_shift_or_vanish_are_refused(taps):
    with pytest.raises(ArgumentError, match="even number of taps"):
        Halve(taps)


def test_second_derivatives_and_forward_mode():
    x, v = noise(1, 2, 8, 8), noise(1, 2, 8, 8, seed=1)
    for module in (Halve(FIR), Double(FIR), FilteredConv(2, 2, FIR).double()):
        _, tangent = torch.func.jvp(lambda u, m=module: m(u).square(), (x,), (v,))
        torch.testing.assert_close(tangent, 2 * module(x) * (module(v) - module(torch.zeros_like(v))))
