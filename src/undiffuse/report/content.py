"""What a report is made of: plain values, checked at the border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError


@dataclass(frozen=True)
class Neighbours:
    """Samples beside their nearest training items: the eye's check for memorisation.

    Args:
        samples, nearest: shape (m, *event), row i of one belongs to row i of the other.
        distances: Euclidean distance of each pair, in the units of the data, shape (m,).
        references: what a reader compares with, for instance `{"median, samples": 2.11, "median, held-out": 2.10}`.

    Raises:
        ArgumentError: the three differ in length, or the two in shape.
    """

    samples: Float[Tensor, "m *event"]
    nearest: Float[Tensor, "m *event"]
    distances: Float[Tensor, " m"]
    references: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = tuple(self.samples.shape), tuple(self.nearest.shape), tuple(self.distances.shape)
        if shapes[0] != shapes[1] or shapes[2] != shapes[0][:1]:
            raise ArgumentError(f"neighbours have shapes {shapes}: expected (m, *event), the same again, and (m,)")


@dataclass(frozen=True)
class ReportData:
    """Everything on the page. Only `title` must be given; a part that is absent is left out, or said to be absent.

    Args:
        title: name of the run.
        subtitle: one line below it (the recipe's description).
        recipe_yaml: the resolved recipe as text.
        commands: the exact commands that make this run and this page again, in order.
        samples: generated items, shape (n, *event); images in [-1, 1]. As many as are useful: each class shows at
            most ten, an unlabelled run at most a hundred.
        labels: class of each sample, shape (n,); -1 is "no label".
        class_names: name of each class, else its number.
        reference: real items beside the samples, shape (r, *event).
        film: the denoising of a few samples, noise first: (caption, x of shape (k, *event)) for each frame.
        metrics_log: lines of `metrics.jsonl`: "step", "loss", "grad_norm", "lr", "images_per_second", "seconds",
            "loss_by_noise" = {"edges": (bins + 1), "mean": (bins, null where empty), "count": (bins)} by half log-SNR.
        results: one mapping per metric, as `undiffuse.metrics.Result.to_dict` makes it: "name", "value", and where
            known "std", "protocol", "settings", "warnings"; besides these "references" ({what: value} under the same
            protocol, the yardsticks), "label" and "better" ("lower" or "higher"). The first is the headline.
        facts: shown as tiles in the order given; "parameters", "steps", "seconds", "device", "dataset", "n",
            "images_per_second" are formatted with their units, other keys and values as they are.
        neighbours: samples beside their nearest training items.

    Raises:
        ArgumentError: labels do not match the samples, a reference or a frame has another event shape, or a result
            lacks its name or value.
    """

    title: str
    subtitle: str = ""
    recipe_yaml: str = ""
    commands: Sequence[str] = ()
    samples: Float[Tensor, "n *event"] | None = None
    labels: Int[Tensor, " n"] | None = None
    class_names: Sequence[str] | None = None
    reference: Float[Tensor, "r *event"] | None = None
    film: Sequence[tuple[str, Tensor]] = ()
    metrics_log: Sequence[Mapping[str, Any]] = ()
    results: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    neighbours: Neighbours | None = None

    def __post_init__(self) -> None:
        n = 0 if self.samples is None else len(self.samples)
        if self.labels is not None and tuple(self.labels.shape) != (n,):
            raise ArgumentError(f"labels have shape {tuple(self.labels.shape)}: expected ({n},), one per sample")
        pictures = {f"film frame {i}": x for i, (_, x) in enumerate(self.film)}
        pictures |= {"reference": self.reference} if self.reference is not None else {}
        for what, x in pictures.items():
            if self.samples is not None and x.shape[1:] != self.samples.shape[1:]:
                raise ArgumentError(
                    f"{what} has event shape {tuple(x.shape[1:])}: the samples have {tuple(self.samples.shape[1:])}"
                )
        for i, result in enumerate(self.results):
            if missing := {"name", "value"} - set(result):
                raise ArgumentError(f"result {i} lacks {' and '.join(sorted(missing))}: it has {', '.join(result)}")

    def class_name(self, label: int) -> str:
        """The name of a class, its number where it has none; -1 is "no label"."""
        if label < 0:
            return "no label"
        named = self.class_names is not None and label < len(self.class_names)
        return str(self.class_names[label]) if named and self.class_names is not None else str(label)
