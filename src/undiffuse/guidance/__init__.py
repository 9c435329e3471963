"""Floor 4: outside information that changes a field. Each is a denoiser that wraps a denoiser."""

from undiffuse.guidance.classifier import ClassifierGuidance
from undiffuse.guidance.thresholding import Clipped, DynamicThreshold

__all__ = ["ClassifierGuidance", "Clipped", "DynamicThreshold"]
