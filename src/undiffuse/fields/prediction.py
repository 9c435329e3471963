"""What a network's output means: six quantities, one change of basis (Prop. 6.3.1).

A prediction is a line `F = a x_0 + b eps`. With `x_t = alpha x_0 + sigma eps` that is two equations in (x_0, eps):

    x_0 = ( b x_t - sigma F) / d,    eps = (alpha F - a x_t) / d,    d = alpha b - sigma a.

The regression target of training is the same line read from right to left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.shapes import pad_to
from undiffuse.core.sums import combine
from undiffuse.paths import Path, for_values

Time = Float[Tensor, " *b"]
Event = Float[Tensor, "b *event"]
Number = TypeVar("Number", Tensor, float)


@dataclass(frozen=True)
class Coefficients(Generic[Number]):
    """A prediction at a time; every entry has the shape of that time, or is a number where the time is one.

    `x_0 = c_skip x_t + c_out F`, `eps = e_skip x_t + e_out F`, `F = a x_0 + b eps`; the network sees
    `c_in x_t` and the noise label `c_noise`.
    """

    a: Number
    b: Number
    c_skip: Number
    c_out: Number
    e_skip: Number
    e_out: Number
    c_in: Number
    c_noise: Number

    def scaled(self, x_t: Event) -> Event:
        """`c_in x_t`."""
        return (pad_to(self.c_in, x_t) if isinstance(self.c_in, Tensor) else self.c_in) * x_t

    def labels(self, x_t: Event) -> Float[Tensor, " b"]:
        """`c_noise` of each sample."""
        if isinstance(self.c_noise, Tensor):
            return self.c_noise.expand(len(x_t))
        dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
        return torch.full(x_t.shape[:1], self.c_noise, dtype=dtype, device=x_t.device)

    def data(self, output: Event, x_t: Event) -> Event:
        """`x_0` from the network's output."""
        return _line(self.c_skip, x_t, self.c_out, output)

    def noise(self, output: Event, x_t: Event) -> Event:
        """`eps` from the network's output."""
        return _line(self.e_skip, x_t, self.e_out, output)

    def target(self, x_0: Event, noise: Event) -> Event:
        """What the network should have said: `a x_0 + b eps`."""
        return _line(self.a, x_0, self.b, noise)


def _line(a: Tensor | float, x: Event, b: Tensor | float, y: Event) -> Event:
    """`a x + b y`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.addcmul(pad_to(a, x) * x, pad_to(b, x), y)
    return combine(x, float(a), y, float(b))


@dataclass(frozen=True)
class Prediction:
    """A named line `F = a x_0 + b eps`, with the input scale and the noise label that go with it.

    Args:
        name: what the field calls it.
        line: (path, t, sigma_data) -> (a, b).
        scale_in: (path, t, sigma_data) -> c_in.
        label: (path, t) -> c_noise.
        needs_signal: F says nothing of x_0 where alpha = 0.
        value: the three functions are those of the time alone, entry by entry, for good: what they say may be computed
            once for a run. Not where they learn, or choose by single times.
    """

    name: str
    line: Callable[[Path, Tensor, float], tuple[Tensor, Tensor]]
    scale_in: Callable[[Path, Tensor, float], Tensor] = lambda path, t, sigma_data: path.input_scale(t)
    label: Callable[[Path, Tensor], Tensor] = lambda path, t: path.noise_label(t)
    needs_signal: bool = False
    value: bool = False

    def coefficients(self, path: Path, t: Time, sigma_data: float = 0.5) -> Coefficients[Tensor]:
        """All coefficients at `t`. Where sigma is 0 the clean estimate is x_t / alpha, whatever the prediction."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        a, b = self.line(path, t, sigma_data)
        d = alpha * b - sigma * a
        clean = sigma == 0
        return Coefficients(
            a=a,
            b=b,
            c_skip=torch.where(clean, 1 / alpha, b / d),
            c_out=torch.where(clean, torch.zeros_like(sigma), -sigma / d),
            e_skip=-a / d,
            e_out=alpha / d,
            c_in=self.scale_in(path, t, sigma_data),
            c_noise=self.label(path, t),
        )

    def reach(self, path: Path, t: Time) -> Time:
        """The time at which it is asked instead of t: not past `path.t_high`, where it would say nothing of x_0."""
        return t.clamp(max=path.t_high) if self.needs_signal else t


@for_values
def numbers(
    path: Path, prediction: Prediction, times: tuple[float, ...], sigma_data: float
) -> dict[float, Coefficients[float]]:
    """The coefficients by time, computed in float64."""
    t = prediction.reach(path, torch.tensor(times, dtype=torch.float64, device="cpu"))
    found = prediction.coefficients(path, t, sigma_data)
    rows = torch.stack([getattr(found, entry.name) for entry in fields(Coefficients)], dim=1)
    return {time: Coefficients(*row) for time, row in zip(times, rows.tolist())}


def _norm(path: Path, t: Tensor, sigma_data: float) -> Tensor:
    """Standard deviation of x_t for data of standard deviation `sigma_data`."""
    return torch.hypot(path.sigma(t), sigma_data * path.alpha(t))


def _edm_line(path: Path, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    norm = _norm(path, t, sigma_data)
    return path.sigma(t) / (sigma_data * norm), -sigma_data * path.alpha(t) / norm


def _log_level(path: Path, t: Tensor) -> Tensor:
    # Kept finite where alpha or sigma is 0: e^20 is beyond any noise level in use.
    ratio = path.sigma(t) / path.alpha(t)
    return torch.log(ratio.clamp(min=2e-9, max=5e8))


def _edm_label(path: Path, t: Tensor) -> Tensor:
    return 0.25 * _log_level(path, t)


PREDICTIONS: dict[str, Prediction] = {
    p.name: replace(p, value=True)
    for p in (
        Prediction("data", lambda path, t, _: (torch.ones_like(t), torch.zeros_like(t))),
        Prediction("noise", lambda path, t, _: (torch.zeros_like(t), torch.ones_like(t)), needs_signal=True),
        # NCSN++ (Song et al. 2021, appendix H): the network sees x_t as large as it is, and log(sigma / alpha). What it
        # says is divided by sigma where a score is asked for, as their `scale_by_sigma` does.
        Prediction(
            "noise-unscaled",
            lambda path, t, _: (torch.zeros_like(t), torch.ones_like(t)),
            lambda path, t, _: torch.ones_like(t),
            _log_level,
            needs_signal=True,
        ),
        Prediction("score", lambda path, t, _: (torch.zeros_like(t), -1 / path.sigma(t)), needs_signal=True),
        Prediction("velocity", lambda path, t, _: (path.alpha_dot(t), path.sigma_dot(t))),
        Prediction("v", lambda path, t, _: (-path.sigma(t), path.alpha(t))),
        # Karras et al. 2022, table 1, on any path: c_skip, c_out, c_in of x_t / alpha at the noise level sigma / alpha.
        Prediction("edm", _edm_line, lambda path, t, sd: 1 / _norm(path, t, sd), _edm_label),
    )
}


def get(prediction: str | Prediction) -> Prediction:
    """A prediction by name; an object passes through.

    Raises:
        ArgumentError: an unknown name; the nearest is offered.
    """
    return prediction if isinstance(prediction, Prediction) else choose(prediction, PREDICTIONS, "prediction")


def convert(
    value: Event,
    x_t: Event,
    t: Time,
    path: Path,
    *,
    source: str | Prediction,
    target: str | Prediction,
    sigma_data: float = 0.5,
) -> Event:
    """Turn one quantity into another: for example a predicted noise into a score.

    Args:
        value: the quantity named by `source`, shape (B, *event).
        x_t: the noisy state it was predicted at.
        t: time, () or (B,), inside the path: where alpha or sigma is 0 some quantities determine no others.
        source, target: "data", "noise", "score", "velocity", "v" or "edm".
        sigma_data: standard deviation of the data, for "edm" only.

    Raises:
        ArgumentError: unknown names, or unlike shapes.
    """
    if value.shape != x_t.shape:
        raise ArgumentError(f"value has shape {tuple(value.shape)} and x_t {tuple(x_t.shape)}: expected the same")
    given = get(source).coefficients(path, t, sigma_data)
    wanted = get(target).coefficients(path, t, sigma_data)
    return wanted.target(given.data(value, x_t), given.noise(value, x_t))
