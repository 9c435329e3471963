"""undiffuse: the theory of diffusion models as one algebra of path, field, objective, solver and recipe.

    import undiffuse as ud

Time runs from data (t = 0) to noise. A `Denoiser` returns `E[x_0 | x_t]`; noise, score and velocity follow from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The names a user types, by the room they live in. Rooms are imported at first use, so that `import undiffuse`
# costs little more than `import torch`.
_ROOMS: dict[str, tuple[str, ...]] = {
    "undiffuse.core.errors": ("UndiffuseError",),
    "undiffuse.core.random": ("Streams",),
    "undiffuse.paths": (
        "VE", "VP", "Cosine", "Karras", "Linear", "Path", "SubVP", "Tabulated", "Trig", "change_of_path",
        "geometric_levels", "levels_from_data",
    ),
    "undiffuse.fields": (
        "Denoiser", "DenoiserAt", "DenoisingScore", "Energy", "ForwardSDE", "FunctionEnergy", "MarginalEnergy",
        "MixtureEnergy", "NetworkClassifier", "NetworkDenoiser", "NetworkEnergy", "ProductEnergy", "ReverseSDE",
        "ScoreNetwork", "TemperedEnergy", "euler_maruyama", "fokker_planck_residual", "log_density_ratio", "on_path",
        "posterior_covariance", "posterior_mean",
    ),
    "undiffuse.guidance": ("ClassifierGuidance", "Clipped", "DynamicThreshold"),
    "undiffuse.objectives": (
        "SURE", "ConcreteScoreMatching", "ContrastiveDivergence", "Denoising", "DenoisingScoreMatching",
        "ExplicitScoreMatching", "FiniteDifferenceSliced", "GeneralizedScoreMatching", "ImplicitScoreMatching",
        "NoiseContrastive", "NoisyClassification", "ScoreEntropy", "SlicedScoreMatching",
    ),
    "undiffuse.oracles": (
        "BernoulliRBM", "Empirical", "Funnel", "Gaussian", "GaussianMixture", "GaussianRBM", "LawEnergy", "Ring",
        "Rosenbrock", "exact_flow", "posterior_cumulants",
    ),
    "undiffuse.solvers": (
        "HMC", "MALA", "Adaptive", "AnnealedLangevin", "DPMv3", "Langevin", "LangevinCorrector", "ModelStatistics",
        "Multistep", "ParallelTempering", "Picard", "Singlestep", "Tuned", "Underdamped", "compare", "make_grid",
        "model_statistics", "optimise_grid", "sample", "tune",
    ),
    "undiffuse.inference": (
        "annealed_importance_sampling", "bits_per_dim", "bracket_log_z", "colourise", "decode", "encode", "inpaint",
        "interpolate", "log_likelihood", "super_resolve",
    ),
    "undiffuse.integrations": ("import_weights",),
    "undiffuse.recipes": ("Recipe", "Run", "adopt", "load_recipe", "load_run", "train"),
}  # fmt: skip
_MODULES = {
    "data": "undiffuse.data",
    "guidance": "undiffuse.guidance",
    "inference": "undiffuse.inference",
    "metrics": "undiffuse.metrics",
    "nets": "undiffuse.nets",
    "objectives": "undiffuse.objectives",
    "oracles": "undiffuse.oracles",
    "predictions": "undiffuse.fields.prediction",
    "solvers": "undiffuse.solvers",
}
_HOME = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = [
    "HMC",
    "MALA",
    "SURE",
    "VE",
    "VP",
    "Adaptive",
    "AnnealedLangevin",
    "BernoulliRBM",
    "ClassifierGuidance",
    "Clipped",
    "ConcreteScoreMatching",
    "ContrastiveDivergence",
    "Cosine",
    "DPMv3",
    "Denoiser",
    "DenoiserAt",
    "Denoising",
    "DenoisingScore",
    "DenoisingScoreMatching",
    "DynamicThreshold",
    "Empirical",
    "Energy",
    "ExplicitScoreMatching",
    "FiniteDifferenceSliced",
    "ForwardSDE",
    "FunctionEnergy",
    "Funnel",
    "Gaussian",
    "GaussianMixture",
    "GaussianRBM",
    "GeneralizedScoreMatching",
    "ImplicitScoreMatching",
    "Karras",
    "Langevin",
    "LangevinCorrector",
    "LawEnergy",
    "Linear",
    "MarginalEnergy",
    "MixtureEnergy",
    "ModelStatistics",
    "Multistep",
    "NetworkClassifier",
    "NetworkDenoiser",
    "NetworkEnergy",
    "NoiseContrastive",
    "NoisyClassification",
    "ParallelTempering",
    "Path",
    "Picard",
    "ProductEnergy",
    "Recipe",
    "ReverseSDE",
    "Ring",
    "Rosenbrock",
    "Run",
    "ScoreEntropy",
    "ScoreNetwork",
    "Singlestep",
    "SlicedScoreMatching",
    "Streams",
    "SubVP",
    "Tabulated",
    "TemperedEnergy",
    "Trig",
    "Tuned",
    "Underdamped",
    "UndiffuseError",
    "__version__",
    "adopt",
    "annealed_importance_sampling",
    "bits_per_dim",
    "bracket_log_z",
    "change_of_path",
    "colourise",
    "compare",
    "data",
    "decode",
    "encode",
    "euler_maruyama",
    "exact_flow",
    "fokker_planck_residual",
    "geometric_levels",
    "guidance",
    "import_weights",
    "inference",
    "inpaint",
    "interpolate",
    "levels_from_data",
    "load_recipe",
    "load_run",
    "log_density_ratio",
    "log_likelihood",
    "make_grid",
    "metrics",
    "model_statistics",
    "nets",
    "objectives",
    "on_path",
    "oracles",
    "posterior_covariance",
    "posterior_cumulants",
    "posterior_mean",
    "predictions",
    "sample",
    "solvers",
    "super_resolve",
    "train",
    "tune",
]


def __getattr__(name: str):
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'undiffuse' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from undiffuse import data, guidance, inference, metrics, nets, objectives, oracles, solvers
    from undiffuse.core.errors import UndiffuseError
    from undiffuse.core.random import Streams
    from undiffuse.fields import (
        Denoiser,
        DenoiserAt,
        DenoisingScore,
        Energy,
        ForwardSDE,
        FunctionEnergy,
        MarginalEnergy,
        MixtureEnergy,
        NetworkClassifier,
        NetworkDenoiser,
        NetworkEnergy,
        ProductEnergy,
        ReverseSDE,
        ScoreNetwork,
        TemperedEnergy,
        euler_maruyama,
        fokker_planck_residual,
        log_density_ratio,
        on_path,
        posterior_covariance,
        posterior_mean,
    )
    from undiffuse.fields import prediction as predictions
    from undiffuse.guidance import ClassifierGuidance, Clipped, DynamicThreshold
    from undiffuse.inference import (
        annealed_importance_sampling,
        bits_per_dim,
        bracket_log_z,
        colourise,
        decode,
        encode,
        inpaint,
        interpolate,
        log_likelihood,
        super_resolve,
    )
    from undiffuse.integrations import import_weights
    from undiffuse.objectives import (
        SURE,
        ConcreteScoreMatching,
        ContrastiveDivergence,
        Denoising,
        DenoisingScoreMatching,
        ExplicitScoreMatching,
        FiniteDifferenceSliced,
        GeneralizedScoreMatching,
        ImplicitScoreMatching,
        NoiseContrastive,
        NoisyClassification,
        ScoreEntropy,
        SlicedScoreMatching,
    )
    from undiffuse.oracles import (
        BernoulliRBM,
        Empirical,
        Funnel,
        Gaussian,
        GaussianMixture,
        GaussianRBM,
        LawEnergy,
        Ring,
        Rosenbrock,
        exact_flow,
        posterior_cumulants,
    )
    from undiffuse.paths import (
        VE,
        VP,
        Cosine,
        Karras,
        Linear,
        Path,
        SubVP,
        Tabulated,
        Trig,
        change_of_path,
        geometric_levels,
        levels_from_data,
    )
    from undiffuse.recipes import Recipe, Run, adopt, load_recipe, load_run, train
    from undiffuse.solvers import (
        HMC,
        MALA,
        Adaptive,
        AnnealedLangevin,
        DPMv3,
        Langevin,
        LangevinCorrector,
        ModelStatistics,
        Multistep,
        ParallelTempering,
        Picard,
        Singlestep,
        Tuned,
        Underdamped,
        compare,
        make_grid,
        model_statistics,
        sample,
        tune,
    )
