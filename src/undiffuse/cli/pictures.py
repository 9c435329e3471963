"""Pictures that a command is given, as a model sees them; and what `undiffuse edit` knows of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, DataError
from undiffuse.data.dataset import to_float
from undiffuse.data.images import Decoder, Unreadable
from undiffuse.inference import BlockMeans, ChannelMix, colourise, inpaint, super_resolve

_BISECTIONS = 50
WHITE = 0.0  # in [-1, 1]: a mask's pixel above it counts as white


def read_picture(file: Path, channels: int) -> Tensor:
    """A picture (C, H, W) in [-1, 1], as the data rooms decode one.

    Raises:
        DataError: it is missing or unreadable.
    """
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}; expected a picture, such as a PNG file") from error
    pixels = Decoder(channels=channels)(encoded)
    if isinstance(pixels, Unreadable):
        raise DataError(f"{file} cannot be read as a picture: {pixels.reason}")
    return to_float(torch.from_numpy(pixels.copy()))


def read_all(files: Sequence[Path], channels: int, wanted: Callable[[int, int], str | None]) -> Tensor:
    """Pictures of one size (B, C, H, W); `wanted(height, width)` says what is wrong with a size, or None.

    Raises:
        DataError: a picture that is missing, unreadable, or of a wrong or another size.
    """
    pictures = [read_picture(file, channels) for file in files]
    for file, picture in zip(files, pictures):
        height, width = picture.shape[1:]
        wrong = wanted(height, width)
        if wrong is None and picture.shape != pictures[0].shape:
            wrong = f"and {files[0]} another size: edit them one by one"
        if wrong is not None:
            raise DataError(f"{file} has {height} x {width} pixels: {wrong}")
    return torch.stack(pictures)


@dataclass(frozen=True)
class Task:
    """What `edit` does to each picture.

    Attributes:
        edit: `ud.inpaint`, `ud.colourise` or `ud.super_resolve`.
        known: the tensor with a row for each picture that is its second argument.
        more: the arguments after it.
        given: what is known, as pictures (B, C, H, W) of the model's shape.
        means: of a picture, where they are what is known, and
        lifted: each of them on all of its pixels.
    """

    edit: Callable[..., Tensor]
    known: Tensor
    more: tuple[Any, ...]
    given: Tensor
    means: Callable[[Tensor], Tensor] | None = None
    lifted: Callable[[Tensor], Tensor] | None = None

    def __call__(self, denoiser: Any, rows: Tensor, **options: Any) -> Tensor:
        x = self.edit(denoiser, self.known[rows], *self.more, **options)
        if self.means is None or self.lifted is None:
            return x
        return nearest_within(x, self.known[rows], self.means, self.lifted)


def nearest_within(x: Tensor, wanted: Tensor, means: Callable[..., Tensor], lifted: Callable[..., Tensor]) -> Tensor:
    """The nearest pictures in [-1, 1] with those means: `clamp(x + c)`, c of each group by bisection.

    A file clamps what is beyond [-1, 1], and means would not survive that.
    """
    wide = x.detach().to("cpu", torch.float64)
    wanted = wanted.to(wide)
    low, high = torch.full_like(wanted, -1 - float(wide.max())), torch.full_like(wanted, 1 - float(wide.min()))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = means((wide + lifted(middle)).clamp(-1, 1)) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (wide + lifted(0.5 * (low + high))).clamp(-1, 1)


def inpainting(files: Sequence[Path], shape: Sequence[int], mask: Path | None, box: str | None) -> Task:
    """Pictures of the model's size, a part of which is to be found anew."""
    channels, height, width = shape
    if (mask is None) == (box is None):
        raise ArgumentError("inpaint needs either --mask FILE (white is kept) or --box x0,y0,x1,y1 (what is filled in)")
    images = read_all(files, channels, _exactly(height, width))
    if box is not None:
        kept = _outside(box, height, width)
    else:
        kept = _mask(mask, height, width)  # type: ignore[arg-type]
    return Task(inpaint, images, (kept,), torch.where(kept, images, torch.zeros_like(images)))


def colourisation(files: Sequence[Path], shape: Sequence[int]) -> Task:
    """Pictures whose mean over the channels is kept."""
    channels, height, width = shape
    if channels != 3:
        raise ArgumentError(f"colourise needs a model of colour pictures; this one has {channels} channels")
    grey = read_all(files, 3, _exactly(height, width)).mean(1, keepdim=True)
    mix = ChannelMix((1 / 3, 1 / 3, 1 / 3))
    return Task(colourise, grey, (), grey.expand(-1, 3, -1, -1), mix.mixed, mix.lifted)


def super_resolution(files: Sequence[Path], shape: Sequence[int]) -> Task:
    """Small pictures, whose pixels are means over blocks of the result."""
    channels, height, width = shape

    def wanted(h: int, w: int) -> str | None:
        if height % h == 0 and width % w == 0 and height // h == width // w > 1:
            return None
        return f"the model's {height} x {width} must be a whole number of times, at least 2, as high and wide"

    small = read_all(files, channels, wanted)
    factor = height // small.shape[2]
    blocks = BlockMeans(factor)
    return Task(super_resolve, small, (factor,), blocks.lifted(small), blocks.means, blocks.lifted)


def _mask(file: Path, height: int, width: int) -> Tensor:
    """True where the picture is white, (1, H, W); what is transparent counts as black."""
    colours = read_all([file], 4, _exactly(height, width))[0]
    white = read_all([file], 1, _exactly(height, width))[0]  # its transparency laid over white
    return (white > WHITE) & (colours[3:] > WHITE)


def _exactly(height: int, width: int) -> Callable[[int, int], str | None]:
    def wanted(h: int, w: int) -> str | None:
        return None if (h, w) == (height, width) else f"the model makes {height} x {width}; scale or crop it to that"

    return wanted


def _outside(box: str, height: int, width: int) -> Tensor:
    """True outside the box, (1, H, W).

    Raises:
        ArgumentError: not four whole numbers, or a box that is empty or leaves the picture.
    """
    parts = [part.strip() for part in box.split(",")]
    if len(parts) != 4 or not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
        raise ArgumentError(f"--box {box}: expected x0,y0,x1,y1 in pixels, such as 2,2,6,6")
    x0, y0, x1, y1 = (int(part) for part in parts)
    if not (x0 < x1 <= width and y0 < y1 <= height):
        raise ArgumentError(f"--box {box}: expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}")
    kept = torch.ones(1, height, width, dtype=torch.bool)
    kept[:, y0:y1, x0:x1] = False
    return kept
