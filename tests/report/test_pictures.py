"""Pictures, pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.core.errors import ArgumentError
from undiffuse.report import pictures


def values(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grid_has_each_pixel_in_its_place(channels, mode):
    x = values(5, channels, 2, 3)
    image = pictures.image_grid(x, columns=2, pad=3, scale=2, background=7)
    assert image.mode == mode
    assert image.size == (2 * 6 + 3, 3 * 4 + 2 * 3)
    pixels = np.array(image).reshape(image.height, image.width, channels)
    covered = np.zeros(pixels.shape[:2], bool)
    for i in range(5):
        for row in range(2):
            for column in range(3):
                top, left = (i // 2) * (4 + 3) + 2 * row, (i % 2) * (6 + 3) + 2 * column
                wanted = [round((float(v) + 1) * 127.5) for v in x[i, :, row, column]]
                assert (pixels[top : top + 2, left : left + 2] == wanted).all()
                covered[top : top + 2, left : left + 2] = True
    gap = [7, 7, 7, 255] if channels == 4 else [7] * channels
    assert (pixels[~covered] == gap).all()


def test_grid_ends_of_the_range_and_beyond():
    x = torch.tensor([-1.0, 1.0, -3.0, 3.0, float("nan"), float("inf"), -float("inf"), 0.0]).reshape(1, 1, 2, 4)
    assert np.array(pictures.image_grid(x)).ravel().tolist() == [0, 255, 0, 255, 0, 255, 0, 128]


def test_every_8_bit_level_survives_the_way_to_minus_one_one_and_back():
    levels = torch.arange(256, dtype=torch.float32)
    assert pictures.to_bytes(levels / 127.5 - 1).tolist() == list(range(256))


@pytest.mark.parametrize(("channels", "mode"), [(1, "LA"), (3, "RGBA"), (4, "RGBA")])
def test_transparent_gaps_and_opaque_pixels(channels, mode):
    image = pictures.image_grid(torch.ones(3, channels, 1, 1), columns=2, pad=1, background=None)
    assert image.mode == mode
    alpha = np.array(image)[..., -1]
    assert alpha.tolist() == [[255, 0, 255], [0, 0, 0], [255, 0, 0]]


@pytest.mark.parametrize("shape", [(0, 1, 2, 2), (2, 2, 3, 3), (2, 5, 3, 3)])
def test_grid_refuses_what_is_no_image(shape):
    with pytest.raises(ArgumentError, match="1, 3 or 4"):
        pictures.image_grid(torch.zeros(shape))


@pytest.mark.parametrize("option", [{"columns": 0}, {"scale": 0}, {"pad": -1}])
def test_grid_refuses_sizes_below_their_least(option):
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} = {next(iter(option.values()))}"):
        pictures.image_grid(torch.zeros(1, 1, 2, 2), **option)


def test_film_runs_to_the_right_and_samples_run_down():
    frames = [
        torch.full((2, 1, 1, 1), level) + torch.tensor([0.0, 0.1]).reshape(2, 1, 1, 1) for level in (-0.8, 0.0, 0.8)
    ]
    pixels = np.array(pictures.film_strip(frames, pad=0))
    wanted = [[round((level + shift + 1) * 127.5) for level in (-0.8, 0.0, 0.8)] for shift in (0.0, 0.1)]
    assert pixels.tolist() == wanted


def test_film_scales_noise_into_range_and_leaves_images_alone():
    noise, image = 5 * values(1, 1, 20, 20), values(1, 1, 20, 20)
    assert pictures.fit_range(image) is image or torch.equal(pictures.fit_range(image), image)
    fitted = pictures.fit_range(noise)
    assert 0.005 < float((fitted.abs() > 1).double().mean()) <= 0.01
    assert torch.allclose(fitted / noise, (fitted / noise)[0, 0, 0, 0].expand_as(noise))
    assert torch.isnan(pictures.fit_range(torch.full((1, 2), float("nan")))).all()


def test_film_refuses_frames_that_differ():
    with pytest.raises(ArgumentError, match="all alike"):
        pictures.film_strip([torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2)])
    with pytest.raises(ArgumentError, match="at least one"):
        pictures.film_strip([])


def test_png_is_lossless_and_the_same_every_time():
    image = pictures.image_grid(values(4, 3, 5, 5))
    data = pictures.png_bytes(image)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data == pictures.png_bytes(image)
    assert (np.array(Image.open(io.BytesIO(data))) == np.array(image)).all()


LIMITS = (0.0, 10.0, 0.0, 10.0)


def centre_of(image: Image.Image) -> tuple[float, float]:
    """Centre of opacity, as (x, y) in pixels from the left and the top."""
    alpha = np.array(image)[..., 3].astype(float)
    rows, columns = np.indices(alpha.shape)
    return float((columns * alpha).sum() / alpha.sum() + 0.5), float((rows * alpha).sum() / alpha.sum() + 0.5)


def test_scatter_puts_a_point_where_it_belongs_y_upwards():
    image = pictures.scatter(torch.tensor([[2.5, 8.0]]), limits=LIMITS, size=100)
    x, y = centre_of(image)
    assert x == pytest.approx(25.0, abs=0.6)
    assert y == pytest.approx(100 - 80.0, abs=0.6)


def test_scatter_leaves_out_what_is_outside_or_not_finite():
    inside = torch.tensor([[5.0, 5.0]])
    outside = torch.tensor([[11.0, 5.0], [5.0, -0.1], [float("nan"), 5.0], [5.0, float("inf")]])
    alone = np.array(pictures.scatter(inside, limits=LIMITS, size=40))
    both = np.array(pictures.scatter(torch.cat([outside, inside]), limits=LIMITS, size=40))
    assert (alone == both).all()
    assert alone[..., 3].max() > 0
    assert np.array(pictures.scatter(outside, limits=LIMITS, size=40)).max() == 0


def test_scatter_colours_by_label_whatever_the_order():
    points = torch.tensor([[2.0, 5.0], [8.0, 5.0], [8.0, 5.0]])
    labels = torch.tensor([0, 1, 3])
    image = np.array(pictures.scatter(points, labels, LIMITS, size=100))
    swapped = np.array(pictures.scatter(points.flip(0), labels.flip(0), LIMITS, size=100))
    assert (image == swapped).all()
    assert image[50, 20, :3].tolist() == list(pictures.PALETTE[0])
    mixed = (np.array(pictures.PALETTE[1]) + np.array(pictures.PALETTE[3])) / 2
    assert np.abs(image[50, 80, :3] - mixed).max() <= 1
    # Two dots of opacity 1/2 over each other: 3/4.
    assert image[50, 20, 3] == pytest.approx(255 / 2, abs=1)
    assert image[50, 80, 3] == pytest.approx(255 * 3 / 4, abs=1)


def test_scatter_on_a_background_is_opaque_and_blends():
    image = np.array(pictures.scatter(torch.tensor([[5.0, 5.0]]), limits=LIMITS, size=50, background=(255, 255, 255)))
    assert (image[..., 3] == 255).all()
    assert image[0, 0, :3].tolist() == [255, 255, 255]
    half = (np.array(pictures.PALETTE[0]) + 255) / 2
    assert np.abs(image[25, 25, :3] - half).max() <= 1


def test_scatter_limits_hold_the_points_and_not_a_stray_one():
    points = torch.cat([values(2000, 2), torch.tensor([[1000.0, -1000.0]])])
    x_low, x_high, y_low, y_high = pictures.limits_of(points)
    assert x_high - x_low == pytest.approx(y_high - y_low)
    assert -1.3 < x_low < -1.0 < 1.0 < x_high < 1.3
    assert pictures.limits_of(torch.full((3, 2), float("nan"))) == (-1.0, 1.0, -1.0, 1.0)
    assert pictures.limits_of(torch.zeros(3, 2)) == (-1.0, 1.0, -1.0, 1.0)


def test_scatter_refuses_other_shapes_and_empty_limits():
    with pytest.raises(ArgumentError, match="expected x_low < x_high"):
        pictures.scatter(torch.zeros(1, 2), limits=(1.0, 1.0, 0.0, 1.0))
    with pytest.raises(ArgumentError, match=r"expected \(N, 2\) and \(N,\)"):
        pictures.scatter(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64))
