"""A trained network in place of a world of `solver_truth.py`: its own probability flow, from noise to data.

The network answers in single precision, whoever asks, and beyond the ends of its own path as it does there. Curves are
those of 500 steps of the classical Runge-Kutta method in the angle `atan2(sigma, alpha)`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from solver_truth import Setting, check_noisy
from torch import Tensor

import undiffuse as ud

# Of the Runge-Kutta method from pure noise to data, and to where a run starts.
_STEPS, _TO_START = 500, 32


class _Single(ud.Denoiser):
    """A network in single precision, asked in double."""

    def __init__(self, source: ud.Denoiser):
        super().__init__(source.path)
        self.source = source

    def forward(self, x_t: Tensor, t: float | Tensor, cond: Tensor | None = None) -> Tensor:
        return self.source(x_t.float(), t, cond).to(x_t)


class NetworkCase(Setting):
    """The network of a run folder; row k is of class k modulo their number."""

    def __init__(self, folder: Path, count: int, seed: int):
        run = ud.load_run(folder)
        self.name, self.classes = folder.name, run.facts.num_classes
        self.cond = self.labels(count)
        self.source = _Single(run.denoiser())
        self.path = self.source.path
        self.noise = ud.Streams.of(seed, count).normal((count, *run.facts.shape), dtype=torch.float64)
        self.starts: dict[float, Tensor] = {1.0: self.noise}
        self.end = self.along(ud.make_grid(ud.Trig(), _STEPS, "angle"))

    def labels(self, count: int) -> Tensor | None:
        return None if self.classes is None else torch.arange(count) % self.classes

    def field(self, path: ud.Path) -> ud.Denoiser:
        return ud.on_path(self.source, path)

    def both(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        alpha, sigma = float(alpha), float(sigma)
        time = torch.tensor(math.atan2(sigma, alpha) / (0.5 * math.pi), dtype=torch.float64)
        with torch.no_grad():
            x_0 = self.field(ud.Trig())(x.double() / math.hypot(alpha, sigma), time, self.cond)
        return x_0, (x - alpha * x_0) / sigma

    def start(self, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        alpha, sigma = float(alpha), float(sigma)
        check_noisy(alpha, sigma)
        time = math.atan2(sigma, alpha) / (0.5 * math.pi)
        if time not in self.starts:
            self.starts[time] = self.along(torch.linspace(1, time, _TO_START + 1, dtype=torch.float64))
        return self.starts[time] * math.hypot(alpha, sigma)

    def along(self, times: Tensor) -> Tensor:
        """Where the flow on `ud.Trig`, on which hypot(alpha, sigma) is 1, goes from the noise."""
        found = ud.sample(self.field(ud.Trig()), noise=self.noise, cond=self.cond, solver="rk4", grid=times)
        assert isinstance(found, Tensor)
        return found
