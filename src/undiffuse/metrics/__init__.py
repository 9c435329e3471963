"""How good samples are: distances between sets of samples, each number with its protocol."""

from undiffuse.metrics.auroc import auroc
from undiffuse.metrics.chains import effective_sample_size, split_r_hat
from undiffuse.metrics.classifier import ClassAccuracy, class_accuracy
from undiffuse.metrics.divergences import F_DIVERGENCES, Estimate, f_divergence, fisher_divergence
from undiffuse.metrics.energy_distance import EnergyTest, energy_distance, energy_test
from undiffuse.metrics.evaluate import evaluate
from undiffuse.metrics.features import Features, as_bytes_rgb, torchscript_features, weights_hash
from undiffuse.metrics.kernels import KernelDistance, kernel_distance, median_distance, mmd
from undiffuse.metrics.moments import (
    Baselines,
    Moments,
    SmallSampleWarning,
    baselines,
    frechet_between,
    frechet_distance,
)
from undiffuse.metrics.neighbours import (
    DensityCoverage,
    NearestNeighbours,
    PrecisionRecall,
    density_coverage,
    nearest,
    nearest_neighbour,
    precision_recall,
)
from undiffuse.metrics.protocol import Comparison, Protocol, Result, Spread, compare, spread
from undiffuse.metrics.registry import BETTER, METRICS, Metric, Sets, metric
from undiffuse.metrics.sliced import sliced_wasserstein

__all__ = [
    "BETTER",
    "F_DIVERGENCES",
    "METRICS",
    "Baselines",
    "ClassAccuracy",
    "Comparison",
    "DensityCoverage",
    "EnergyTest",
    "Estimate",
    "Features",
    "KernelDistance",
    "Metric",
    "Moments",
    "NearestNeighbours",
    "PrecisionRecall",
    "Protocol",
    "Result",
    "Sets",
    "SmallSampleWarning",
    "Spread",
    "as_bytes_rgb",
    "auroc",
    "baselines",
    "class_accuracy",
    "compare",
    "density_coverage",
    "effective_sample_size",
    "energy_distance",
    "energy_test",
    "evaluate",
    "f_divergence",
    "fisher_divergence",
    "frechet_between",
    "frechet_distance",
    "kernel_distance",
    "median_distance",
    "metric",
    "mmd",
    "nearest",
    "nearest_neighbour",
    "precision_recall",
    "sliced_wasserstein",
    "split_r_hat",
    "spread",
    "torchscript_features",
    "weights_hash",
]
