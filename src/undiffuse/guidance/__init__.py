"""Floor 4: outside information that changes a field. Each is a denoiser that wraps a denoiser."""

from undiffuse.guidance.classifier import ClassifierGuidance

__all__ = ["ClassifierGuidance"]
