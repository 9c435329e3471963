"""Floor 2: what a model says about x at time t."""

from undiffuse.fields import prediction
from undiffuse.fields.classifier import NetworkClassifier
from undiffuse.fields.denoiser import Answer, Denoiser, NetworkDenoiser, OnPath, on_path
from undiffuse.fields.energy import (
    DenoiserAt,
    DenoisingScore,
    Energy,
    FunctionEnergy,
    HasScore,
    MarginalEnergy,
    MixtureEnergy,
    NetworkEnergy,
    ProductEnergy,
    ScoreNetwork,
    TemperedEnergy,
    log_density_ratio,
)
from undiffuse.fields.prediction import PREDICTIONS, Coefficients, Prediction
from undiffuse.fields.sde import SDE, ForwardSDE, ReverseSDE, euler_maruyama, fokker_planck_residual
from undiffuse.fields.tweedie import covariance_product, posterior_covariance, posterior_mean

__all__ = [
    "PREDICTIONS",
    "SDE",
    "Answer",
    "Coefficients",
    "Denoiser",
    "DenoiserAt",
    "DenoisingScore",
    "Energy",
    "ForwardSDE",
    "FunctionEnergy",
    "HasScore",
    "MarginalEnergy",
    "MixtureEnergy",
    "NetworkClassifier",
    "NetworkDenoiser",
    "NetworkEnergy",
    "OnPath",
    "Prediction",
    "ProductEnergy",
    "ReverseSDE",
    "ScoreNetwork",
    "TemperedEnergy",
    "covariance_product",
    "euler_maruyama",
    "fokker_planck_residual",
    "log_density_ratio",
    "on_path",
    "posterior_covariance",
    "posterior_mean",
    "prediction",
]
