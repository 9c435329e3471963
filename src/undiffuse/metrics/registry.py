"""Metrics by name: each is a frozen value whose fields are its settings."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.metrics.classifier import class_accuracy
from undiffuse.metrics.kernels import FACTORS, kernel_distance, median_distance, mmd
from undiffuse.metrics.moments import Moments, frechet_between, rank_warning
from undiffuse.metrics.neighbours import density_coverage, nearest_neighbour, precision_recall
from undiffuse.metrics.sliced import sliced_wasserstein

# Which end of a number is the better one. Of "nearest" neither is: below the figure of held-out data it tells copies.
BETTER = {
    "frechet": "least", "kernel": "least", "mmd": "least", "sliced-wasserstein": "least", "nearest": None,
    "precision": "most", "recall": "most", "density": "most", "coverage": "most", "class-accuracy": "most",
}  # fmt: skip
ENOUGH = 10_000  # samples below which published Frechet distances stop being comparable


@dataclass(frozen=True)
class Sets:
    """What metrics look at. `held_out` and the labels are absent where no metric asks for them."""

    samples: Tensor
    reference: Tensor
    held_out: Tensor | None = None
    labels: Tensor | None = None
    reference_labels: Tensor | None = None

    def given(self, need: str, by: str) -> Tensor:
        """An optional set, or the `ArgumentError` that says which metric lacks it."""
        found = getattr(self, need)
        if found is None:
            raise ArgumentError(f"metric '{by}' needs {need.replace('_', ' ')}, and none were given")
        return found

    def through(self, features: Callable[[Tensor], Tensor]) -> Sets:
        """The same sets, as features; labels stay."""
        held_out = None if self.held_out is None else features(self.held_out)
        return replace(self, samples=features(self.samples), reference=features(self.reference), held_out=held_out)


class Value(NamedTuple):
    """A number on its way into a `Result`."""

    name: str
    value: float
    std: float | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012  # never written to
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric(ABC):
    """A metric with its settings. `needs` names the optional sets it cannot do without.

    `grows_with_n` says that the expected value depends on the number of samples, so that few of them mislead.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    grows_with_n: ClassVar[bool] = True

    @abstractmethod
    def measure(self, sets: Sets) -> list[Value]:
        """The numbers, one or more."""

    def check(self, sets: Sets) -> None:
        """Refuse before anything is computed.

        Raises:
            ArgumentError: a set that this metric needs is absent.
        """
        for need in self.needs:
            sets.given(need, self.name)

    def settings(self) -> dict[str, Any]:
        """Its fields as plain JSON values: part of what two results must share to be compared."""
        return json.loads(json.dumps(asdict(self)))

    def advice(self, sets: Sets) -> tuple[str, ...]:
        """Warnings that hold whatever the values are."""
        n = len(sets.samples)
        if not self.grows_with_n or n >= ENOUGH:
            return ()
        return (
            f"n = {n} samples: '{self.name}' depends on n in the mean; below {ENOUGH} compare only equal n, "
            "and not with published values",
        )


@dataclass(frozen=True)
class Frechet(Metric):
    """Frechet distance of the Gaussians with the same moments; FID when the features are Inception's."""

    name: ClassVar[str] = "frechet"

    def measure(self, sets: Sets) -> list[Value]:
        a, b = Moments.of(sets.samples), Moments.of(sets.reference, "reference images")
        singular = rank_warning(a.n, b.n, len(a.mean))
        return [Value("frechet", frechet_between(a, b), warnings=() if singular is None else (singular,))]


@dataclass(frozen=True)
class Kernel(Metric):
    """Kernel distance (KID); std is over subsets."""

    name: ClassVar[str] = "kernel"
    grows_with_n: ClassVar[bool] = False
    subsets: int = 100
    subset_size: int | None = None
    seed: int = 0

    def measure(self, sets: Sets) -> list[Value]:
        found = kernel_distance(sets.samples, sets.reference, **asdict(self))
        return [Value("kernel", found.mean, found.std, {"subset_size": found.subset_size})]


@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """Improved precision and recall."""

    name: ClassVar[str] = "precision-recall"
    k: int = 3

    def measure(self, sets: Sets) -> list[Value]:
        found = precision_recall(sets.samples, sets.reference, k=self.k)
        return [Value("precision", found.precision), Value("recall", found.recall)]


@dataclass(frozen=True)
class DensityCoverage(Metric):
    """Density and coverage."""

    name: ClassVar[str] = "density-coverage"
    k: int = 5

    def measure(self, sets: Sets) -> list[Value]:
        found = density_coverage(sets.samples, sets.reference, k=self.k)
        return [Value("density", found.density), Value("coverage", found.coverage)]


@dataclass(frozen=True)
class MMD(Metric):
    """Unbiased squared maximum mean discrepancy; bandwidths: factors times the reference's median distance."""

    name: ClassVar[str] = "mmd"
    grows_with_n: ClassVar[bool] = False
    factors: tuple[float, ...] = FACTORS

    def measure(self, sets: Sets) -> list[Value]:
        median = median_distance(sets.reference)
        bandwidths = [factor * median for factor in self.factors]
        value = mmd(sets.samples, sets.reference, bandwidths=bandwidths)
        return [Value("mmd", value, extra={"bandwidths": bandwidths})]


@dataclass(frozen=True)
class SlicedWasserstein(Metric):
    """Sliced Wasserstein distance."""

    name: ClassVar[str] = "sliced-wasserstein"
    projections: int = 512
    p: float = 2.0
    seed: int = 0

    def measure(self, sets: Sets) -> list[Value]:
        return [Value("sliced-wasserstein", sliced_wasserstein(sets.samples, sets.reference, **asdict(self)))]


@dataclass(frozen=True)
class Nearest(Metric):
    """Memorisation: median distance to the nearest training image, over that of held-out images.

    `extra` holds both medians, the number of exact copies, and the samples nearest to a training image with
    that image's index and their distance, for a picture. The reference must be the training images.
    """

    name: ClassVar[str] = "nearest"
    needs: ClassVar[tuple[str, ...]] = ("held_out",)
    grows_with_n: ClassVar[bool] = False
    shown: int = 16

    def measure(self, sets: Sets) -> list[Value]:
        held_out = sets.given("held_out", self.name)
        found = nearest_neighbour(sets.samples, sets.reference, held_out)
        closest = found.closest(self.shown)
        extra = {
            "median": found.median,
            "held_out_median": found.held_out_median,
            "duplicates": found.duplicates,
            "closest_samples": closest.tolist(),
            "closest_training": found.index[closest].tolist(),
            "closest_distances": found.distance[closest].tolist(),
        }
        copies = found.duplicates
        warnings = () if copies == 0 else (f"{copies} samples are exact copies of training images",)
        return [Value("nearest", found.ratio, extra=extra, warnings=warnings)]


@dataclass(frozen=True)
class ReadClass(Metric):
    """Share of samples whose intended class an SVM trained on the reference images reads."""

    name: ClassVar[str] = "class-accuracy"
    needs: ClassVar[tuple[str, ...]] = ("labels", "reference_labels")
    grows_with_n: ClassVar[bool] = False
    c: float = 10.0

    def measure(self, sets: Sets) -> list[Value]:
        wanted, known = (sets.given(need, self.name) for need in self.needs)
        found = class_accuracy(sets.samples, wanted, sets.reference, known, c=self.c)
        per_class = {str(k): share for k, share in found.per_class.items()}
        return [Value("class-accuracy", found.accuracy, extra={"per_class": per_class})]


METRICS: dict[str, type[Metric]] = {
    kind.name: kind
    for kind in (
        Frechet,
        Kernel,
        PrecisionRecall,
        DensityCoverage,
        MMD,
        SlicedWasserstein,
        Nearest,
        ReadClass,
    )
}


def metric(name: str | Metric) -> Metric:
    """The metric of that name with its default settings; a metric object is returned as it is.

    Raises:
        ArgumentError: unknown name; offers the nearest.
    """
    return name if isinstance(name, Metric) else choose(name, METRICS, "metric")()
