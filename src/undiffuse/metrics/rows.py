"""Sets of points seen as rows of float64, a block at a time: 50,000 images of 3,072 values fit in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Num
from torch import Tensor

from undiffuse.core.errors import ArgumentError

Points = Num[Tensor, "n *event"]
Others = Num[Tensor, "m *other"]  # its shape is compared with that of Points by `pair`, which says what is wrong
Thirds = Num[Tensor, "h *third"]

BLOCK = 512  # rows: a tile of 512 x 512 float64 distances takes 2 MiB, and stays in a cache


class Rows:
    """`x` of shape (n, *event) as rows of length d in float64, converted block by block, less a centre.

    Work happens on the device of `x`; where that device has no float64 (MPS), on the CPU.

    Args:
        x: floating point, finite, (n, *event).
        name: what to call it in an error.
        least: the smallest n that the caller can use.
        centre: (d,), subtracted from every row; keeps distances from losing digits to a large common offset.

    Raises:
        ArgumentError: not floating point, too few rows, no values in a row, or a value that is not finite.
    """

    def __init__(self, x: Tensor, name: str, *, least: int = 1, centre: Tensor | None = None):
        if not x.is_floating_point():
            raise ArgumentError(
                f"{name} have dtype {x.dtype}: expected floating point values on the scale of what they are "
                "compared with (images in [-1, 1], so bytes become value / 127.5 - 1)"
            )
        if x.ndim == 0 or x.shape[0] < least:
            raise ArgumentError(f"{name} have shape {tuple(x.shape)}: expected at least {least} rows")
        if x.numel() == 0:
            raise ArgumentError(f"{name} have shape {tuple(x.shape)}: expected at least one value in a row")
        self.x, self.name, self.centre = x.detach(), name, centre
        self.n, self.d = x.shape[0], x[0].numel()
        self.device = torch.device("cpu") if x.device.type == "mps" else x.device
        self._check_finite()

    def _check_finite(self) -> None:
        for part in self.parts():
            bad = (~torch.isfinite(self.x[part])).reshape(part.stop - part.start, -1).any(dim=1)
            if bad.any():
                row = part.start + int(bad.nonzero()[0])
                raise ArgumentError(
                    f"{self.name} hold a value that is not finite, first in row {row}: no distance is "
                    "defined; find out which step made it, or leave these rows out"
                )

    def parts(self, size: int = BLOCK) -> Iterator[slice]:
        """Consecutive slices that cover the rows."""
        for start in range(0, self.n, size):
            yield slice(start, min(start + size, self.n))

    def block(self, part: slice) -> Float[Tensor, "rows d"]:
        """Some rows, float64, less the centre."""
        rows = self.x[part].to(self.device, torch.float64).reshape(part.stop - part.start, -1)
        return rows if self.centre is None else rows - self.centre

    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the rows (the centre, if any, already taken off)."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for part in self.parts():
            total += self.block(part).sum(dim=0)
        return total / self.n

    def largest_square(self) -> float:
        """Largest squared length of a row."""
        return max(float(self.block(part).square().sum(dim=1).max()) for part in self.parts())


def pair(
    a: Points,
    b: Others,
    names: tuple[str, str] = ("samples", "reference images"),
    *,
    least: int = 1,
) -> tuple[Rows, Rows]:
    """Both sets as rows, centred at the mean of the second.

    Raises:
        ArgumentError: as `Rows`; event shapes that differ (a flat (n, d) is let through beside an image of d
            values; channels first beside channels last is not); different devices.
    """
    if a.device != b.device:
        raise ArgumentError(f"{names[0]} are on {a.device}, {names[1]} on {b.device}: move one of them")
    first, second = Rows(a, names[0], least=least), Rows(b, names[1], least=least)
    if not _alike(a, b):
        raise ArgumentError(
            f"{names[0]} have event shape {tuple(a.shape[1:])}, {names[1]} {tuple(b.shape[1:])}: expected equal ones"
        )
    first.centre = second.centre = second.mean()
    return first, second


def _alike(a: Tensor, b: Tensor) -> bool:
    one_is_flat = a.ndim == 2 or b.ndim == 2
    return a.shape[1:] == b.shape[1:] or (one_is_flat and a.shape[1:].numel() == b.shape[1:].numel())


def squared_distances(x: Float[Tensor, "rows d"], y: Float[Tensor, "columns d"]) -> Float[Tensor, "rows columns"]:
    """`|x_i - y_j|^2` by the Gram matrix, rounding below `gram_rounding`, clipped at 0."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(squares, x, y.T, alpha=-2.0).clamp_(min=0.0)


def gram_rounding(*sets: Rows) -> float:
    """A bound on the error in comparing two `squared_distances`.

    Each is made of `|x|^2`, `|y|^2` and `2 <x, y>`: sums of d products, together at most 4 times the largest
    square, each sum off by at most d + 2 roundings. A point at exactly the radius of a ball counts as inside,
    so the caller adds this bound to the radius.
    """
    largest = max(rows.largest_square() for rows in sets)
    return 8.0 * (sets[0].d + 2) * torch.finfo(torch.float64).eps * largest
