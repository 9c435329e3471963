"""Pictures from tensors: image grids, scatter plots, film strips. PIL is imported when a picture is made."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image

# Mid-tones, told apart by lightness as well as hue, that hold on white and on near-black alike.
PALETTE = (
    (59, 116, 222), (222, 122, 34), (38, 148, 106), (196, 68, 96), (142, 100, 214),
    (150, 118, 60), (20, 150, 180), (214, 96, 180), (128, 146, 40), (120, 128, 140),
)  # fmt: skip
NEUTRAL = (140, 146, 156)
OPAQUE = 255
# A dot at half strength lets the eye tell one point from many.
DOT_ALPHA = 0.5


def image_grid(
    x: Float[Tensor, "n c h w"],
    columns: int | None = None,
    pad: int = 1,
    scale: int = 1,
    background: int | None = OPAQUE,
) -> Image.Image:
    """Images side by side, row by row.

    Args:
        x: images in [-1, 1], 1, 3 or 4 channels; values beyond are clamped, NaN is drawn as -1.
        columns: images per row; None makes the grid about square.
        pad: gap between images, in pixels of the result; there is no outer margin.
        scale: each pixel becomes a square of `scale` x `scale`.
        background: grey level of the gaps and of absent images; None leaves them transparent.

    Raises:
        ArgumentError: not a batch of such images, no image, or `columns`, `scale` < 1, `pad` < 0.
    """
    from PIL import Image

    if x.ndim != 4 or 0 in x.shape or x.shape[1] not in (1, 3, 4):
        raise ArgumentError(f"x has shape {tuple(x.shape)}: expected (N, C, H, W) with N >= 1 and C of 1, 3 or 4")
    n, channels, height, width = x.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or scale < 1 or pad < 0:
        raise ArgumentError(f"columns = {columns}, scale = {scale}, pad = {pad}: expected >= 1, >= 1 and >= 0")
    tiles = to_bytes(x).repeat(scale, axis=2).repeat(scale, axis=3)
    if background is None and channels != 4:
        tiles = np.concatenate([tiles, np.full_like(tiles[:, :1], OPAQUE)], axis=1)
    rows, columns = math.ceil(n / columns), min(columns, n)
    cell_h, cell_w = height * scale + pad, width * scale + pad
    fill = np.full((rows * cell_h - pad, columns * cell_w - pad, tiles.shape[1]), background or 0, np.uint8)
    if channels == 4 and background is not None:
        fill[..., 3] = OPAQUE
    for i, tile in enumerate(tiles):
        top, left = i // columns * cell_h, i % columns * cell_w
        fill[top : top + height * scale, left : left + width * scale] = tile.transpose(1, 2, 0)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[fill.shape[2]]
    return Image.fromarray(fill[..., 0] if mode == "L" else fill, mode)


def to_bytes(x: Float[Tensor, "*shape"]) -> np.ndarray:
    """[-1, 1] to 0 ... 255, rounded to nearest; beyond is clamped, NaN becomes 0."""
    finite = torch.nan_to_num(x.detach().cpu().to(torch.float64), nan=-1.0).clamp(-1, 1)
    return ((finite + 1) * (OPAQUE / 2)).round().to(torch.uint8).numpy()


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file, compressed as far as PIL goes; the same bytes for the same picture."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def film_strip(
    frames: Sequence[Float[Tensor, "k c h w"]], pad: int = 1, scale: int = 1, background: int | None = OPAQUE
) -> Image.Image:
    """One row per sample, one column per frame, in the order given (noise at the left).

    Raises:
        ArgumentError: no frame, or frames of unlike shapes.
    """
    if not frames or any(f.shape != frames[0].shape for f in frames):
        raise ArgumentError(f"frames have shapes {[tuple(f.shape) for f in frames]}: expected at least one, all alike")
    by_sample = torch.stack([fit_range(f) for f in frames], dim=1).flatten(0, 1)
    return image_grid(by_sample, columns=len(frames), pad=pad, scale=scale, background=background)


def fit_range(x: Float[Tensor, "k *event"]) -> Float[Tensor, "k *event"]:
    """x over its own 99th percentile of |x| where that exceeds 1, so that noise is grey rather than clipped."""
    size = x.detach().to(torch.float32).abs().flatten()
    size = size[size.isfinite()]
    if len(size) == 0:
        return x
    percentile = float(size.kthvalue(math.ceil(0.99 * len(size))).values)
    return x / max(1.0, percentile)


def limits_of(points: Float[Tensor, "n 2"]) -> tuple[float, float, float, float]:
    """A square (x_low, x_high, y_low, y_high) with a tenth of margin around all but the outermost 0.5 % of points."""
    finite = points[points.isfinite().all(dim=1)].detach().cpu().to(torch.float64)
    if len(finite) == 0:
        return -1.0, 1.0, -1.0, 1.0
    low, high = finite.quantile(0.0025, dim=0), finite.quantile(0.9975, dim=0)
    centre, half = (low + high) / 2, float((high - low).max()) * 0.55
    half = half if half > 0 else 1.0
    (x, y) = centre.tolist()
    return x - half, x + half, y - half, y + half


def scatter(
    points: Float[Tensor, "n 2"],
    labels: Int[Tensor, " n"] | None = None,
    limits: tuple[float, float, float, float] | None = None,
    size: int = 480,
    radius: float = 2.0,
    background: tuple[int, int, int] | None = None,
    colour: tuple[int, int, int] = PALETTE[0],
) -> Image.Image:
    """A square scatter plot, y upwards, RGBA; points outside the limits, or not finite, are not drawn.

    Dots are translucent and coloured by label; where they overlap, opacity and colour do not depend on their order.

    Args:
        limits: (x_low, x_high, y_low, y_high); None fits the points.
        size: side in pixels.  radius: of a dot, in pixels.
        background: RGB, or None for transparent.

    Raises:
        ArgumentError: points are not (N, 2), labels not (N,), or the limits do not increase.
    """
    from PIL import Image

    if points.ndim != 2 or points.shape[1] != 2 or (labels is not None and labels.shape != points.shape[:1]):
        shape = None if labels is None else tuple(labels.shape)
        raise ArgumentError(f"points {tuple(points.shape)} and labels {shape}: expected (N, 2) and (N,)")
    limits = limits_of(points) if limits is None else limits
    if not (limits[0] < limits[1] and limits[2] < limits[3]):
        raise ArgumentError(f"limits {limits}: expected x_low < x_high and y_low < y_high")
    cells, inside = _cells(points, limits, 2 * size)
    classes = (np.zeros(len(points), int) if labels is None else labels.cpu().numpy())[inside]
    red_green_blue = np.zeros((2 * size, 2 * size, 3))
    total = np.zeros((2 * size, 2 * size))
    for label in np.unique(classes):
        hits = _spread(cells[classes == label], 2 * size, 2 * radius)
        paint = colour if labels is None else NEUTRAL if label < 0 else PALETTE[label % len(PALETTE)]
        red_green_blue += hits[..., None] * np.array(paint)
        total += hits
    alpha = 1 - (1 - DOT_ALPHA) ** total
    mixed = red_green_blue / np.maximum(total, 1)[..., None] * alpha[..., None]
    mixed, alpha = (a.reshape(size, 2, size, 2, *a.shape[2:]).mean(axis=(1, 3)) for a in (mixed, alpha))
    if background is not None:
        mixed, alpha = mixed + (1 - alpha)[..., None] * np.array(background), np.ones_like(alpha)
    straight = mixed / np.where(alpha > 0, alpha, 1)[..., None]
    pixels = np.concatenate([straight, alpha[..., None] * OPAQUE], axis=2)
    return Image.fromarray(pixels.round().clip(0, OPAQUE).astype(np.uint8), "RGBA")


def _cells(points: Tensor, limits: tuple[float, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every point to be drawn, and which of the points those are."""
    xy = points.detach().cpu().to(torch.float64).numpy()
    low, span = np.array(limits)[[0, 2]], np.array([limits[1] - limits[0], limits[3] - limits[2]])
    unit = (xy - low) / span
    inside = np.all(np.isfinite(unit) & (unit >= 0) & (unit <= 1), axis=1)
    row_column = np.stack([1 - unit[inside, 1], unit[inside, 0]], axis=1)
    return np.minimum((row_column * size).astype(int), size - 1), inside


def _spread(cells: np.ndarray, size: int, radius: float) -> np.ndarray:
    """How many discs of `radius` cover each pixel."""
    reach = math.ceil(radius)
    padded = np.zeros((size + 2 * reach, size + 2 * reach))
    counts = np.zeros((size, size))
    np.add.at(counts, (cells[:, 0], cells[:, 1]), 1)
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            if row * row + column * column <= radius * radius:
                padded[reach + row : reach + row + size, reach + column : reach + column + size] += counts
    return padded[reach : reach + size, reach : reach + size]
