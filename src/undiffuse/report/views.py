"""How items of each kind are shown: images as grids, points as scatter plots, anything else as figures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from undiffuse.report.content import Neighbours, ReportData
from undiffuse.report.pictures import (
    NEUTRAL,
    PALETTE,
    fit_range,
    image_grid,
    limits_of,
    png_bytes,
    scatter,
)
from undiffuse.report.text import escape, significant

if TYPE_CHECKING:
    from PIL import Image

MOST_CLASSES = 20
PER_CLASS = 10
PER_CLASS_LARGE = 6
# The gap between images is this part of their side, and at least a pixel.
GAP = 24
MOST_UNLABELLED = 100
# Up to this side images are shown as crisp squares; larger ones the browser smooths better.
PIXELATED_UP_TO = 64
MOST_COORDINATES = 16
# Class names beyond this many letters get a column, or on a phone a line, of their own.
LONG_NAME = 3
MOST_POINTS = 20_000


class View(Protocol):
    """What the page asks of a kind of data; each answer is HTML, "" where the kind has none."""

    def samples(self, data: ReportData) -> str: ...

    def film(self, frames: Sequence[tuple[str, Tensor]]) -> str: ...

    def neighbours(self, neighbours: Neighbours) -> str: ...


def view_of(event: Sequence[int]) -> View:
    """The view for an event shape: (C, H, W) with 1, 3 or 4 channels; vectors of two or more; all else."""
    if len(event) == 3 and event[0] in (1, 3, 4):
        return ImageView(max(event[1:]))
    if len(event) == 1 and event[0] >= 2:
        return PointView(event[0])
    return NumberView()


def img(picture: Image.Image, alt: str, style: str = "") -> str:
    """An `<img>` that holds its own data."""
    data = base64.b64encode(png_bytes(picture)).decode("ascii")
    return (
        f'<img class="{style}" width="{picture.width}" height="{picture.height}" alt="{escape(alt)}" '
        f'src="data:image/png;base64,{data}">'
    )


def groups(data: ReportData) -> list[tuple[str, Tensor]]:
    """Samples by class, in order of the class, as (name, samples); a page shows the first `MOST_CLASSES`."""
    if data.samples is None or data.labels is None:
        return []
    present = sorted(int(label) for label in data.labels.unique())
    present = [label for label in present if label >= 0] + [label for label in present if label < 0]
    return [(data.class_name(label), data.samples[data.labels == label]) for label in present[:MOST_CLASSES]]


def film_frames(pictures: Sequence[tuple[str, str]]) -> str:
    """Frames side by side in a box that scrolls on its own where they do not fit."""
    frames = "".join(
        f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>" for caption, image in pictures
    )
    return f'<div class="film scroll" role="group" aria-label="denoising film" tabindex="0">{frames}</div>'


def missing_note(x: Tensor) -> str:
    """A sentence about values that are not finite, which a picture would hide."""
    broken = int((~x.isfinite()).sum())
    return f'<p class="warn">{broken:,} of {x.numel():,} values are not finite.</p>' if broken else ""


class ImageView:
    """Images of side `side` or less: a row of each class, or one grid."""

    def __init__(self, side: int):
        small = side <= PIXELATED_UP_TO
        self.pad = max(1, side // GAP)
        self.style = "pixels" if small else "smooth"
        self.columns = PER_CLASS if small else PER_CLASS_LARGE

    def samples(self, data: ReportData) -> str:
        if data.samples is None:
            return ""
        shown = data.samples[: min(MOST_UNLABELLED, self.columns**2)]
        grid = img(self._grid(shown), f"{len(shown)} samples", self.style) if data.labels is None else self._rows(data)
        return f"{missing_note(data.samples)}{grid}{self._reference(data)}"

    def _rows(self, data: ReportData) -> str:
        rows = []
        for name, x in groups(data):
            shown = x[: self.columns]
            picture = img(self._grid(shown), f"{len(shown)} samples of class {name}", self.style)
            width = ' class="long"' if len(name) > LONG_NAME else ""
            rows.append(f'<div class="row"><dt{width}>{escape(name)}</dt><dd>{picture}</dd></div>')
        classes = 0 if data.labels is None else len(data.labels.unique())
        more = f'<p class="note">The first {MOST_CLASSES} of {classes:,} classes.</p>' if classes > MOST_CLASSES else ""
        return f'<dl class="rows">{"".join(rows)}</dl>{more}'

    def film(self, frames: Sequence[tuple[str, Tensor]]) -> str:
        pictures = []
        for i, (caption, x) in enumerate(frames):
            grid = image_grid(fit_range(x), 1, self.pad, background=None)
            alt = f"frame {i + 1} of {len(frames)}: {len(x)} samples at {caption}"
            pictures.append((caption, img(grid, alt, self.style)))
        note = "One sample per row. Noise beyond the range of an image is scaled down to fit it."
        return f'{film_frames(pictures)}<p class="note">{note}</p>'

    def neighbours(self, neighbours: Neighbours) -> str:
        figures = []
        for sample, nearest, distance in zip(neighbours.samples, neighbours.nearest, neighbours.distances.tolist()):
            grid = image_grid(torch.stack([sample, nearest]), 1, self.pad, background=None)
            alt = f"sample above its nearest training image, distance {significant(distance)}"
            caption = f"<figcaption>{significant(distance)}</figcaption>"
            figures.append(f"<figure>{img(grid, alt, self.style)}{caption}</figure>")
        return f'<div class="pairs">{"".join(figures)}</div>'

    def _grid(self, x: Tensor) -> Image.Image:
        """A grid whose rows all have the same number of places, so that classes line up."""
        grid = image_grid(x, self.columns, self.pad, background=None)
        if len(x) >= self.columns:
            return grid
        return grid.convert("RGBA").crop((0, 0, (x.shape[3] + self.pad) * self.columns - self.pad, grid.height))

    def _reference(self, data: ReportData) -> str:
        if data.reference is None or len(data.reference) == 0:
            return ""
        shown = data.reference[: 3 * self.columns]
        picture = img(self._grid(shown), f"{len(shown)} real images", self.style)
        return f"<details><summary>Real images to compare</summary>{picture}</details>"


class PointView:
    """Points: scatter plots of the first two coordinates."""

    def __init__(self, size: int):
        self.note = "" if size == 2 else f'<p class="note">Coordinates 1 and 2 of {size}.</p>'

    def samples(self, data: ReportData) -> str:
        if data.samples is None:
            return ""
        x = data.samples[:MOST_POINTS, :2]
        labels = None if data.labels is None else data.labels[:MOST_POINTS]
        real = None if data.reference is None else data.reference[:MOST_POINTS, :2]
        limits = limits_of(x if real is None else real)
        figures = [self._figure(scatter(x, labels, limits), f"Generated, {len(x):,} points", limits)]
        if real is not None:
            figures.append(
                self._figure(scatter(real, None, limits, colour=NEUTRAL), f"Real, {len(real):,} points", limits)
            )
        outside = len(x) - int(((x[:, 0] - limits[0]) * (limits[1] - x[:, 0]) >= 0)
                               .logical_and((x[:, 1] - limits[2]) * (limits[3] - x[:, 1]) >= 0).sum())  # fmt: skip
        note = f'<p class="note">{outside:,} of {len(x):,} points lie outside the frame.</p>' if outside else ""
        return (
            f'{missing_note(data.samples)}<div class="scatters">{"".join(figures)}</div>'
            f"{self._legend(data)}{note}{self.note}"
        )

    def film(self, frames: Sequence[tuple[str, Tensor]]) -> str:
        last = limits_of(frames[-1][1][:, :2])
        pictures = []
        for i, (caption, x) in enumerate(frames):
            limits = widest(last, limits_of(x[:, :2]))
            dots = scatter(x[:MOST_POINTS, :2], None, limits, size=160, radius=1.0)
            pictures.append((caption, img(dots, f"frame {i + 1} of {len(frames)}: {caption}", "frame")))
        note = "Each frame is as wide as its points need, and no narrower than the last."
        return f'{film_frames(pictures)}<p class="note">{note}</p>'

    def neighbours(self, neighbours: Neighbours) -> str:
        return ""

    @staticmethod
    def _figure(picture: Image.Image, caption: str, limits: tuple[float, float, float, float]) -> str:
        across, up = (f"{significant(a)} to {significant(b)}" for a, b in (limits[:2], limits[2:]))
        alt = f"scatter plot: {caption}, x from {across}, y from {up}"
        return (
            f"<figure>{img(picture, alt, 'frame')}<figcaption>{escape(caption)}"
            f' <span class="quiet">x {across}, y {up}</span></figcaption></figure>'
        )

    @staticmethod
    def _legend(data: ReportData) -> str:
        if data.labels is None:
            return ""
        swatches = []
        for label in sorted(int(label) for label in data.labels.unique())[:MOST_CLASSES]:
            colour = NEUTRAL if label < 0 else PALETTE[label % len(PALETTE)]
            swatch = f'<i style="background:rgb{colour}"></i>'.replace(" ", "").replace("<istyle", "<i style")
            swatches.append(f"<li>{swatch}{escape(data.class_name(label))}</li>")
        return f'<ul class="legend" aria-label="classes">{"".join(swatches)}</ul>'


def widest(a: tuple[float, float, float, float], b: tuple[float, float, float, float]):
    """The square around the centre of `a` that is no narrower than `a` and reaches as far as `b`."""
    x, y = (a[0] + a[1]) / 2, (a[2] + a[3]) / 2
    half = max((a[1] - a[0]) / 2, abs(b[0] - x), abs(b[1] - x), abs(b[2] - y), abs(b[3] - y))
    return x - half, x + half, y - half, y + half


class NumberView:
    """Anything else: mean, spread and range of each coordinate."""

    def samples(self, data: ReportData) -> str:
        if data.samples is None:
            return ""
        flat = data.samples.detach().cpu().to(torch.float64).flatten(1)
        columns: Mapping[str, Tensor] = {
            "Mean": flat.mean(0),
            "Standard deviation": flat.std(0, correction=0),
            "Least": flat.amin(0),
            "Greatest": flat.amax(0),
        }
        head = "".join(f'<th scope="col">{name}</th>' for name in ("Coordinate", *columns))
        rows = "".join(
            f'<tr><th scope="row">{i + 1}</th>'
            + "".join(f"<td>{significant(float(c[i]))}</td>" for c in columns.values())
            + "</tr>"
            for i in range(min(MOST_COORDINATES, flat.shape[1]))
        )
        note = f'<p class="note">{len(flat):,} samples of shape {tuple(data.samples.shape[1:])}.</p>'
        return (
            f'{missing_note(data.samples)}<div class="scroll" tabindex="0" role="group" aria-label="sample statistics">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
        )

    def film(self, frames: Sequence[tuple[str, Tensor]]) -> str:
        return ""

    def neighbours(self, neighbours: Neighbours) -> str:
        return ""
