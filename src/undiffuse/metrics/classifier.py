"""Does a class-conditional sample show the class it was asked for? A classifier of real images reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.rows import Others, Points, pair


@dataclass(frozen=True)
class ClassAccuracy:
    """Share of samples read as intended, over all and for each class asked for; and what was read."""

    accuracy: float
    per_class: dict[int, float]
    read: Int[Tensor, " n"]


def class_accuracy(
    samples: Points,
    labels: Int[Tensor, " labels"],
    train: Others,
    train_labels: Int[Tensor, " train_labels"],
    *,
    c: float = 10.0,
) -> ClassAccuracy:
    """Share of samples whose intended class a support vector machine, trained on real images, reads.

    Kernel `exp(-gamma |x - y|^2)`, gamma = 1 / (d variance), penalty `c`. Its time grows between m^2 and m^3:
    meant for at most some ten thousand images, of pixels or features. It is a reader with errors of its own:
    its accuracy on held-out real images is the ceiling.

    Raises:
        ArgumentError: a missing label or one of -1, a class that the training images lack, fewer than two
            classes, or as `Rows`.
    """
    from sklearn.svm import SVC

    points, real = pair(samples, train, ("samples", "training images"))
    known = set(train_labels.tolist())
    for given, rows in ((labels, points), (train_labels, real)):
        if len(given) != rows.n or (given < 0).any():
            raise ArgumentError(f"{len(given)} labels for {rows.n} {rows.name}: expected one label >= 0 for each")
    if len(known) < 2 or not set(labels.tolist()) <= known:
        raise ArgumentError(
            f"training images have classes {sorted(known)}, samples were asked for "
            f"{sorted(set(labels.tolist()))}: expected at least two classes, and samples of those only"
        )
    reader = SVC(C=c, kernel="rbf", gamma="scale")
    reader.fit(real.block(slice(0, real.n)).cpu().numpy(), train_labels.cpu().numpy())
    answers = [torch.from_numpy(reader.predict(points.block(part).cpu().numpy())) for part in points.parts()]
    read = torch.cat(answers).to(labels.device)
    right = read == labels
    per_class = {int(k): float(right[labels == k].double().mean()) for k in labels.unique()}
    return ClassAccuracy(float(right.double().mean()), per_class, read)
