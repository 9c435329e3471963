"""Pictures with known pixels."""

import io

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """Bytes of an image file with these uint8 pixels (H, W) or (H, W, C)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def picture(k: int, size: int = 6, channels: int = 1) -> np.ndarray:
    """Picture number k: its first pixel is k, the others are random."""
    pixels = np.random.default_rng(k).integers(0, 256, (size, size, channels), dtype=np.uint8)
    pixels[0, 0] = k
    return pixels[..., 0] if channels == 1 else pixels


def numbers(x) -> list[int]:
    """Which pictures a batch holds, read off their first pixels."""
    return ((x[:, 0, 0, 0] + 1.0) * 127.5).round().int().tolist()
