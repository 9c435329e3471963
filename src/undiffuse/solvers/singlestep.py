"""Exponential Runge-Kutta methods: evaluations inside the step, nothing remembered (sections 9.4, 9.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.sums import weighted_sum
from undiffuse.solvers.base import Event, Field, Noise, Scalar, Solver, ask, scales
from undiffuse.solvers.exponential import DDIM
from undiffuse.solvers.polynomials import COORDINATES, flow_weights


@dataclass(frozen=True)
class Singlestep(Solver):
    """DPM-Solver (Lu et al. 2022, algorithms 1 and 2), and its ++ form: stages at shares of the step in half log-SNR.

    The first stage is DDIM to the first share; each later one, and the step itself, integrates the line through the
    evaluations at the step's start and at the last stage, exactly or by its value in the middle of the step. With the
    noise and a stage at 1/2 that is DPM-Solver-2, with stages at 1/3 and 2/3 DPM-Solver-3; with the data
    DPM-Solver++(2S). Steps out of alpha = 0 and to sigma = 0 are DDIM's, of one evaluation.

    Args:
        shares: of the stages, rising, in (0, 1).
        data: integrate E[x_0 | x], not E[eps | x].
        rule: "exact" or "midpoint".

    Raises:
        ArgumentError: shares that are none, an unknown rule.
    """

    shares: tuple[float, ...] = (0.5,)
    data: bool = False
    rule: str = "midpoint"

    def __post_init__(self):
        places = (0.0, *self.shares, 1.0)
        if len(places) < 3 or not all(a < b for a, b in pairwise(places)):
            raise ArgumentError(f"shares is {self.shares}: expected rising numbers between 0 and 1, one at least")
        choose(self.rule, {"exact": None, "midpoint": None}, "rule")

    @property
    def order(self) -> float:  # type: ignore[override]
        return 1 + len(self.shares)

    @property
    def evals_per_step(self) -> int:  # type: ignore[override]
        return 1 + len(self.shares)

    def step(self, field: Field, x: Event, t: Scalar, s: Scalar, state: Any, noise: Noise) -> tuple[Event, Any]:
        (alpha, sigma), (alpha_s, sigma_s) = scales(field, t), scales(field, s)
        if alpha == 0 or sigma_s == 0:
            return DDIM().step(field, x, t, s, state, noise)
        start, end = math.log(alpha / sigma), math.log(alpha_s / sigma_s)
        first = self._value(field, x, t)
        nodes, values = (math.atan2(sigma, alpha),), (first,)
        for share in self.shares:
            u = field.path.time_of(torch.tensor(start + share * (end - start), dtype=torch.float64))
            stage = self._moved(field, x, (t, u), nodes, values, "exact")
            place = scales(field, u)
            nodes, values = (nodes[0], math.atan2(place[1], place[0])), (first, self._value(field, stage, u))
        return self._moved(field, x, (t, s), nodes, values, self.rule), state

    def _value(self, field: Field, x: Event, t: Tensor) -> Event:
        """E[x_0 | x], or E[eps | x]."""
        answer = ask(field, x, t)
        if self.data:
            return answer.data(x)
        alpha, sigma = scales(field, t)
        return answer.plus(x, 1 / sigma, -alpha / sigma)

    def _moved(
        self,
        field: Field,
        x: Event,
        span: tuple[Tensor, Tensor],
        nodes: tuple[float, ...],
        values: tuple[Tensor, ...],
        rule: str,
    ) -> Event:
        (alpha, sigma), (alpha_s, sigma_s) = scales(field, span[0]), scales(field, span[1])
        phi, size, on_x = (0.5 * math.pi, -sigma_s, sigma_s / sigma) if self.data else (0.0, alpha_s, alpha_s / alpha)
        angles = (math.atan2(sigma, alpha), math.atan2(sigma_s, alpha_s))
        weights = flow_weights(phi, rule, nodes, angles, COORDINATES["half-log-snr"])
        used = [(value, size * w) for value, w in zip(values, weights) if w != 0]
        return weighted_sum((x, *(value for value, _ in used)), (on_x, *(w for _, w in used)))


SINGLESTEP: dict[str, Callable[[], Solver]] = {
    "dpm-1": DDIM,
    "dpm-2": Singlestep,
    "dpm-3": lambda: Singlestep((1 / 3, 2 / 3), rule="exact"),
    "dpmpp-2s": lambda: Singlestep(data=True),
}
