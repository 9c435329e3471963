"""Bits per dimension of a whole set of images from the exact ones of its first rows.

    undiffuse likelihood RUN --n 512 --tolerance 1e-3
    python benchmarks/whole_set_bits.py RUN              # seconds: no network is asked

How many bits an image takes is told by figures that cost nothing: how much of it is empty, full or between, how much it
changes from pixel to pixel, how short zlib makes it. With y the bits of the n rows of which they are known and f these
figures of all N, the estimate of the mean of y is that of its least-squares fit c . f: the control variate. With e the
residuals, its variance as the mean of these N is var(e) (1 / n - 1 / N), and as that of every image there could be
var(e) / n + (var(y) - var(e)) / N; its bias is of order 1 / n of its error. The rows must be in an order that says
nothing. Both errors are printed, and those of halves: fitted on one, the other's mean is foretold.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch

import undiffuse as ud


def figures(levels: np.ndarray) -> np.ndarray:
    """(N, 7), a 1 among them, of images (N, C, H, W) of bytes."""
    rows = levels.reshape(len(levels), -1)
    empty, full = rows == 0, rows >= 253
    across, down = (np.abs(np.diff(levels.astype(np.int64), axis=axis)) for axis in (2, 3))
    packed = [len(zlib.compress(row.tobytes(), 9)) for row in rows]
    parts = (rows, empty, full, across, down)
    return np.stack([np.ones(len(rows)), *(p.reshape(len(rows), -1).mean(1) for p in parts), packed], 1)


def fit(f: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights of the figures, and the variance that they leave."""
    c, *_ = np.linalg.lstsq(f, y, rcond=None)
    return c, float((y - f @ c).var(ddof=0) * len(y) / (len(y) - f.shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a likelihood.jsonl, whose largest record is taken")
    folder = parser.parse_args().run
    records = [json.loads(line) for line in (folder / "likelihood.jsonl").read_text().splitlines()]
    record = max(records, key=lambda found: (found["n"], -found["tolerance"]))
    files = sorted((folder / "likelihood" / Path(record["rows"]).name).glob("part-*.npz"))
    nats = np.concatenate([np.load(file)["nats"] for file in files])
    data = ud.load_run(folder).recipe.data(record["split"])
    y = np.asarray([ud.bits_per_dim(float(value), int(np.prod(data.shape)), record["levels"]) for value in nats])

    x = torch.cat([data.batch(rows)[0] for rows in torch.arange(len(data)).split(1000)])
    f = figures(((x + 1) * (0.5 * (record["levels"] - 1))).round().to(torch.uint8).numpy())
    n, total = len(y), len(f)
    c, left = fit(f[:n], y)
    own = (left * (1 / n - 1 / total)) ** 0.5
    every = (left / n + (y.var(ddof=1) - left) / total) ** 0.5
    error = y.std(ddof=1) / n**0.5
    print(f"{n} rows: {y.mean():.4f} +- {error:.4f} bits per dimension, tolerance {record['tolerance']}")
    print(f"the figures tell {1 - left / y.var(ddof=1):.3f} of the variance")
    print(f"{total} rows: {(f @ c).mean():.4f} +- {own:.4f} of these, +- {every:.4f} of every one there could be")
    for one, other in ((slice(0, n // 2), slice(n // 2, n)), (slice(n // 2, n), slice(0, n // 2))):
        c, left = fit(f[one], y[one])
        error = (left * 4 / n) ** 0.5
        print(f"half by half: {y[other].mean():.4f}, foretold {(f[other] @ c).mean():.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()
