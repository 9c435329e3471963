"""Statistics of a model along its path, which DPM-Solver-v3 goes by, and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.paths import Path
from undiffuse.solvers.table_file import Kind, unpacked, usable, written
from undiffuse.solvers.tuned import prediction_of, same_path

_KIND = Kind(
    "undiffuse-statistics-1",
    "statistics of a model",
    "make them with ud.model_statistics(...).save(file), or: undiffuse statistics RUN",
)

# Between places a statistic is the polynomial through so many of the nearest.
_REACH = 4


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b of a model, functions of the half log-SNR: cubics between places, constant beyond them.

    With `u = x / alpha` and `f = (sigma eps - l x) / alpha`, a model's flow is `du/dlambda = -l u - f`; l is the share
    of the flow that is linear in x, and `df/dlambda = s f + b` is how the rest changes along it. See
    `model_statistics` for how they are found, and `undiffuse.solvers.dpm_v3` for what they are for.

    Args:
        half_log_snr: places lambda, rising (k,).
        linear, scaling, bias: l, s, b at the places, each (k, *event), or (k, 1, ..., 1) where one number is for all
            coordinates. No unit, no unit, that of the data.
        profile: what the path is, as of `Tuned`.
        path: it in words.
        event: the shape of the data.
        prediction: of the network that they are of; None: any.
        about: how they were made, for people.

    Raises:
        ArgumentError: not such numbers, or one that is not finite.
    """

    half_log_snr: Float[Tensor, " k"]
    linear: Float[Tensor, "k *event"]
    scaling: Float[Tensor, "k *event"]
    bias: Float[Tensor, "k *event"]
    profile: tuple[tuple[float, float], ...]
    path: str
    event: tuple[int, ...]
    prediction: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        places = self.half_log_snr
        if places.ndim != 1 or len(places) < 2 or not bool((places.diff() > 0).all()):
            raise ArgumentError("half_log_snr: expected two places or more, rising from noise to data")
        shapes = ((len(places), *self.event), (len(places), *[1] * len(self.event)))
        for name in ("linear", "scaling", "bias"):
            found: Tensor = getattr(self, name)
            if tuple(found.shape) not in shapes:
                raise ArgumentError(f"{name} has shape {tuple(found.shape)}: expected {shapes[0]} or {shapes[1]}")
            if found.dtype != torch.float64 or not bool(found.isfinite().all()):
                raise ArgumentError(f"{name}: expected finite numbers of float64. Estimate the statistics anew")

    def at(self, half_log_snr: Float[Tensor, " *n"]) -> tuple[Tensor, Tensor, Tensor]:
        """(l, s, b) at any half log-SNR, each (*n, *event)."""
        places = self.half_log_snr
        wanted = half_log_snr.clamp(places[0], places[-1])[..., None]
        reach = min(_REACH, len(places))
        first = (torch.searchsorted(places, wanted) - reach // 2).clamp(0, len(places) - reach)
        near = first + torch.arange(reach)
        gap = wanted - places[near]
        apart = places[near][..., :, None] - places[near][..., None, :]
        same = torch.eye(reach, dtype=torch.bool)
        weights = torch.where(same, 1.0, gap[..., None, :] / torch.where(same, 1.0, apart)).prod(-1)
        found = (torch.einsum("...r,...re->...e", weights, v.flatten(1)[near]) for v in self.values)
        return tuple(v.reshape(*half_log_snr.shape, *w.shape[1:]) for v, w in zip(found, self.values))  # type: ignore

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """(l, s, b) at the places."""
        return self.linear, self.scaling, self.bias

    def check_event(self, event: Sequence[int]) -> None:
        """Refuse data of another shape.

        Raises:
            ArgumentError: says which shape they are of.
        """
        if tuple(event) != self.event:
            raise ArgumentError(
                f"samples of shape {tuple(event)}: these statistics are of {self.event}. Estimate them for that shape"
            )

    def check_model(self, path: Path, denoiser: object) -> None:
        """Refuse another path, or a network of another prediction, than they are of.

        Raises:
            ArgumentError: says which they are of.
        """
        if not same_path(self.profile, path):
            raise ArgumentError(
                f"these statistics are of the path {self.path}, not of {path}: estimate them on that, or sample with "
                "ud.on_path(denoiser, that path)"
            )
        theirs = prediction_of(denoiser)
        if None not in (self.prediction, theirs) and theirs != self.prediction:
            raise ArgumentError(
                f"these statistics are of a network that predicts '{self.prediction}', not '{theirs}': estimate them "
                "for this one"
            )

    def save(self, file: str | File) -> File:
        """Write them as safetensors: under another name first, synced, then renamed."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in ("half_log_snr", "linear", "scaling", "bias")}
        tensors["profile"] = self.profile
        words = {"path": self.path, "event": self.event, "prediction": self.prediction, "about": dict(self.about)}
        return written(file, tensors, words, _KIND)

    @classmethod
    def load(cls, file: str | File) -> ModelStatistics:
        """What `save` wrote.

        Raises:
            CheckpointError: it is not there, or not whole, or no such file.
        """
        tensors, words = unpacked(File(file), _KIND)
        with usable(file, "statistics", "Make them anew"):
            profile = tuple((a, b) for a, b in tensors.pop("profile").tolist())
            words["event"] = tuple(words["event"])
            return cls(**tensors, profile=profile, **words)

    def with_about(self, **more: Any) -> ModelStatistics:
        """With more said of how they were made."""
        return replace(self, about={**self.about, **more})
