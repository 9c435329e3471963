"""What solvers are measured against: two worlds with exact fields, and the true ends of their probability flow.

Used by `solvers.py`. On every path the flow is one curve after division by `hypot(alpha, sigma)`, a function of the
angle `theta = atan2(sigma, alpha)` alone (Prop. 6.3.3). So one integration from pure noise, theta = pi / 2, to data,
theta = 0, serves every path, ours and the peers', wherever it starts.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import undiffuse as ud

# Starts are known where sigma / alpha is at least this: there the curve is a polynomial of the angle to rounding.
NOISIEST = 20.0
_NODES = 12
# Trajectories that are integrated together: the steps are shared, and scipy takes the error's root mean square.
_TOGETHER = 64
_RTOL, _ATOL = 1e-11, 1e-12

Law = ud.GaussianMixture | ud.Empirical


def ring() -> ud.GaussianMixture:
    """8 modes of std 0.2 on a circle of radius 3, divided by `sqrt(3^2 / 2 + 0.2^2)`: coordinates of variance 1."""
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    scale = math.sqrt(3.0**2 / 2 + 0.2**2)
    means = 3 / scale * torch.stack([angle.cos(), angle.sin()], 1)
    return ud.GaussianMixture(means, torch.full((8,), 0.2 / scale, dtype=torch.float64))


def digits() -> ud.Empirical:
    """scikit-learn's first 1,000 digits, pixels 0 ... 16 to [-1, 1], each with Gaussian noise of std 0.1: (64,)."""
    from sklearn.datasets import load_digits

    pixels = load_digits(return_X_y=True)[0][:1000]
    return ud.Empirical(torch.as_tensor(pixels, dtype=torch.float64) / 8 - 1, std=0.1)


# Name -> the law, and how many noises the table took.
WORLDS: dict[str, tuple[Callable[[], Law], int]] = {"ring": (ring, 1024), "digits": (digits, 512)}


def nodes() -> np.ndarray:
    """The angles at which trajectories are kept, decreasing from pi / 2: Chebyshev's, both ends included."""
    low = math.atan(NOISIEST)
    return low + (math.pi / 2 - low) * 0.5 * (1 + np.cos(np.pi * np.arange(_NODES) / (_NODES - 1)))


def trajectories(law: Law, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`y = x / hypot(alpha, sigma)` at the nodes (nodes, B, D), and at theta = 0 (B, D); y = noise at pi / 2."""
    field = law.denoiser(ud.Trig())

    def slope(theta: float, y: np.ndarray) -> np.ndarray:
        time = torch.tensor(min(max(theta / (0.5 * math.pi), 0.0), 1.0), dtype=torch.float64)
        x_0, eps = field.estimate(torch.from_numpy(y).reshape(-1, *law.event), time)
        return (math.cos(theta) * eps - math.sin(theta) * x_0).flatten().numpy()

    kept = []
    stops = [*nodes(), 0.0]
    for rows in noise.split(_TOGETHER):
        states = [rows.flatten().numpy()]
        for start, end in itertools.pairwise(stops):
            found = solve_ivp(slope, (start, end), states[-1], method="DOP853", rtol=_RTOL, atol=_ATOL)
            if not found.success:
                raise RuntimeError(f"the reference failed between angles {start:.6g} and {end:.6g}: {found.message}")
            states.append(found.y[:, -1])
        kept.append(np.stack(states).reshape(len(states), len(rows), -1))
    whole = np.concatenate(kept, 1)
    return whole[:-1], whole[-1]


def cached(file: Path, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """What `make` gives, from the file where it is there; written under another name first, then renamed."""
    if file.exists():
        with np.load(file) as known:
            return known["states"], known["end"]
    states, end = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as stream:
        np.savez(stream, states=states, end=end)
    os.replace(name, file)
    return states, end


def check_noisy(alpha: float, sigma: float) -> None:
    """Refuse a start from much signal.

    Raises:
        ValueError: sigma / alpha below `NOISIEST`.
    """
    if math.atan2(sigma, alpha) < math.atan(NOISIEST) - 1e-12:
        raise ValueError(f"the run starts at sigma / alpha = {sigma / alpha:.3g}, below {NOISIEST:g}: too easy")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undiffuse" / "benchmarks"


class Setting(ABC):
    """What a run starts from, asks of the field, and is compared with.

    Attributes:
        name: in words.
        end: the true ends.
        cond: of every row, or none.
        calls: how often `both` was asked since it was last set to 0.
    """

    name: str
    end: Tensor
    cond: Tensor | None = None
    calls: int = 0

    @abstractmethod
    def field(self, path: ud.Path) -> ud.Denoiser:
        """What `ud.sample` is given."""

    @abstractmethod
    def both(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """`E[x_0 | x]` and `E[eps | x]` for `x = alpha x_0 + sigma eps`, one call; for scales of any schedule."""

    @abstractmethod
    def start(self, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """The true x at these scales.

        Raises:
            ValueError: sigma / alpha below `NOISIEST`.
        """

    def mean(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """The first of `both`."""
        return self.both(x, alpha, sigma)[0]

    def errors(self, x: Tensor) -> tuple[float, float]:
        return errors(x, self.end)


@dataclass
class Case(Setting):
    """A world with its true trajectories.

    Attributes:
        law: whose exact field is asked.
        states, end: as of `trajectories`.
    """

    name: str
    law: Law
    states: Tensor
    end: Tensor

    @classmethod
    def load(cls, name: str, count: int | None, seed: int, folder: Path) -> Case:
        """The world `name` with `count` noises of a seed, its truth read from the folder or computed once."""
        make, usual = WORLDS[name]
        law, count = make(), count or usual
        noise = ud.Streams.of(seed, count).normal((count, *law.event), dtype=torch.float64)
        file = folder / f"flow-{name}-seed{seed}-{count}-rtol{_RTOL:g}.npz"
        states, end = cached(file, lambda: trajectories(law, noise))
        return cls(name, law, torch.from_numpy(states), torch.from_numpy(end))

    def field(self, path: ud.Path) -> ud.Denoiser:
        return self.law.denoiser(path)

    def both(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        signal, noise = (torch.as_tensor(float(v), dtype=torch.float64) for v in (alpha, sigma))
        x_0, pull = self.law.posterior_means(x.to(torch.float64), signal, noise, None)
        return x_0, noise * pull

    def start(self, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """By the polynomial through the nodes."""
        alpha, sigma = float(alpha), float(sigma)
        check_noisy(alpha, sigma)
        theta, known = math.atan2(sigma, alpha), nodes()
        # Barycentric weights of Chebyshev's points (Berrut and Trefethen 2004, eq. 5.4).
        weights = (-1.0) ** np.arange(len(known))
        weights[[0, -1]] *= 0.5
        gaps = theta - known
        if np.abs(gaps).min() < 1e-14:
            y = self.states[int(np.abs(gaps).argmin())]
        else:
            shares = torch.from_numpy(weights / gaps / (weights / gaps).sum())
            y = torch.einsum("k,kbd->bd", shares, self.states)
        return y * math.hypot(alpha, sigma)


def errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """`RMS(x - truth) / RMS(truth)`, and the median of a trajectory's `|x - truth|` over the RMS length of truth."""
    length = truth.flatten(1).square().sum(1).mean().sqrt()
    gap = (x.to(truth) - truth).flatten(1).norm(dim=1)
    return float(gap.square().mean().sqrt() / length), float(gap.quantile(0.5) / length)
