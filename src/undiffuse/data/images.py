"""From an encoded image to bytes (C, H, W). Pillow is imported here and nowhere else in this wing."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# Raster formats with a decoder inside Pillow. Left out on purpose: EPS and PDF, which hand the file to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
# Pillow's own limit against decompression bombs (a quarter of a gigabyte in RGB), here an error and not a warning.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
MODE_OF_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# What each mode of Pillow becomes; P (a palette) is settled by whether it has transparency.
CHANNELS_OF_MODE = {"1": 1, "L": 1, "LA": 4, "RGB": 3, "RGBA": 4, "CMYK": 3, "YCbCr": 3}
WORD_PER_BYTE = 257  # 65535 / 255


@dataclass(frozen=True)
class Unreadable:
    """Why an image could not be read."""

    reason: str


@dataclass(frozen=True)
class Decoder:
    """Settings of the decoding: `size` (height, width) or None, `channels` 1, 3, 4 or None (as in the file)."""

    size: tuple[int, int] | None = None
    channels: int | None = None

    def __call__(self, encoded: bytes) -> np.ndarray | Unreadable:
        """Bytes (C, H, W), or the reason there are none. Orientation follows the EXIF tag.

        A smaller or larger image is scaled to cover `size` with Lanczos' kernel (widened when shrinking, so
        without aliasing) and cropped about its centre; one that has the size already is untouched.
        """
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return Unreadable(
                        f"{image.width} x {image.height} pixels, more than the limit of {MAX_PIXELS:,}: "
                        "shrink it first if it is meant"
                    )
                image.load()
                return self._convert(image)
        except Exception as error:  # a hostile file may raise anything in a decoder
            return Unreadable(f"{type(error).__name__}: {error}".removesuffix(": ").split(" <_io")[0])

    def _convert(self, image: Image.Image) -> np.ndarray:
        if "exif" in image.info:
            ImageOps.exif_transpose(image, in_place=True)
        image = self._to_channels(_eight_bits(image))
        if self.size is not None and image.size != (self.size[1], self.size[0]):
            image = ImageOps.fit(image, (self.size[1], self.size[0]), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _to_channels(self, image: Image.Image) -> Image.Image:
        """The same picture as L, RGB or RGBA. Transparency that is given up is laid over white."""
        transparent = "transparency" in image.info or CHANNELS_OF_MODE.get(image.mode) == 4
        has = 4 if transparent else CHANNELS_OF_MODE.get(image.mode, 3)
        wants = self.channels or has
        if has == 4 and wants < 4:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
        mode = MODE_OF_CHANNELS[wants]
        return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits rescaled to 8: Pillow's own conversion would clip at 255.

    Raises:
        ValueError: floating-point pixels, or integers past 16 bits, which have no agreed white.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} have no agreed range; save them as an .npy array")
    return Image.fromarray(((values.astype(np.uint32) + WORD_PER_BYTE // 2) // WORD_PER_BYTE).astype(np.uint8))
