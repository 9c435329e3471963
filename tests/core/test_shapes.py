"""A time lines up with the batch, never with another dimension."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time, pad_to


def test_times_scale_samples_and_not_pixels():
    """B equals every other size here, so that a time padded on the wrong side would go unnoticed by shapes."""
    t = torch.tensor([1.0, 10.0, 100.0])
    x = torch.arange(27.0).reshape(3, 3, 3)
    padded = pad_to(t, x) * x
    for i in range(3):
        assert torch.equal(padded[i], t[i] * x[i])


@pytest.mark.parametrize("event", [(), (5,), (2, 3), (1, 4, 4)])
def test_padded_times_have_one_size_for_each_dimension(event):
    x = torch.zeros(6, *event)
    assert pad_to(torch.arange(6.0), x).shape == (6, *[1] * len(event))
    assert pad_to(torch.ones(1), x).shape == (1, *[1] * len(event))
    scalar = torch.tensor(0.5)
    assert pad_to(scalar, x) is scalar


@pytest.mark.parametrize(
    ("t", "x", "wanted"),
    [
        (torch.zeros(3), torch.zeros(6, 3), r"\(3,\) and x \(6, 3\): expected \(\) or \(6,\)"),
        (torch.zeros(6, 1), torch.zeros(6, 3), r"\(6, 1\) and x \(6, 3\)"),
        (torch.zeros(2), torch.tensor(1.0), r"expected \(\) or \(B,\)"),
    ],
)
def test_a_time_of_another_shape_is_refused(t, x, wanted):
    with pytest.raises(ArgumentError, match=wanted):
        pad_to(t, x)


@pytest.mark.parametrize(
    ("like", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_a_time_is_at_least_float32_beside_any_data(like, dtype):
    x = torch.zeros(2, 3, dtype=like)
    assert as_time(0.1, x).dtype is dtype
    assert as_time(0.1, x).shape == ()
    assert float(as_time(0.1, x)) == pytest.approx(0.1, abs=float(torch.finfo(dtype).eps))
    assert as_time(torch.tensor([0.25, 0.5], dtype=torch.float64), x).dtype is dtype
    assert as_time(torch.tensor([0.25, 0.5]), x).tolist() == [0.25, 0.5]
