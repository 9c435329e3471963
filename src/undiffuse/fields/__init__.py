"""Floor 2: what a model says about x at time t."""

from undiffuse.fields import prediction
from undiffuse.fields.denoiser import Denoiser, NetworkDenoiser, OnPath, on_path
from undiffuse.fields.prediction import PREDICTIONS, Coefficients, Prediction

__all__ = [
    "PREDICTIONS",
    "Coefficients",
    "Denoiser",
    "NetworkDenoiser",
    "OnPath",
    "Prediction",
    "on_path",
    "prediction",
]
