"""Decoding: known pixels in, known bytes out."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import encode
from undiffuse.data import images
from undiffuse.data.dataset import to_float
from undiffuse.data.images import Decoder, Unreadable

RED, CLEAR_RED = (255, 0, 0, 255), (255, 0, 0, 0)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def one(mode: str, colour, **options) -> bytes:
    """A PNG of 2 x 2 equal pixels."""
    return saved(Image.new(mode, (2, 2), colour), **options)


def test_bytes_become_exactly_minus_one_to_one():
    scaled = to_float(torch.arange(256, dtype=torch.uint8))
    assert scaled[0] == -1.0
    assert scaled[255] == 1.0
    assert ((scaled.double() - (torch.arange(256).double() / 127.5 - 1.0)).abs() < 2.0**-22).all()
    assert torch.equal(((scaled + 1.0) * 127.5).round().to(torch.uint8), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("encoded", "channels", "expected"),
    [
        (one("L", 77), None, [77]),
        (one("L", 77), 3, [77, 77, 77]),
        (one("L", 77), 4, [77, 77, 77, 255]),
        (one("RGB", (10, 20, 30)), None, [10, 20, 30]),
        (one("RGB", (10, 20, 30)), 4, [10, 20, 30, 255]),
        # ITU-R 601: 0.299 * 100 + 0.587 * 200 + 0.114 * 50 = 153
        (one("RGB", (100, 200, 50)), 1, [153]),
        (one("RGBA", (10, 20, 30, 40)), None, [10, 20, 30, 40]),
        # Transparency over white: 0.2 of red, 0.8 of white.
        (one("RGBA", (255, 0, 0, 51)), 3, [255, 204, 204]),
        (one("RGBA", CLEAR_RED), 1, [255]),
        (one("LA", (0, 51)), 1, [204]),
        (one("LA", (9, 51)), None, [9, 9, 9, 51]),
        (one("1", 1), None, [255]),
        # 16 bits: 128 * 257 is the middle byte; Pillow's own conversion would clip it to 255.
        (one("I;16", 128 * 257), None, [128]),
        (one("I;16", 65535), 3, [255, 255, 255]),
        (saved(Image.new("RGB", (2, 2), (3, 2, 1)).quantize(4)), None, [3, 2, 1]),
        (saved(Image.new("L", (2, 2), 5), transparency=5), 1, [255]),
        (saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), None, [255, 0, 0]),
    ],
)
def test_channels_come_from_the_file_or_are_converted(encoded, channels, expected):
    pixels = Decoder(channels=channels)(encoded)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (len(expected), 2, 2)
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(expected, np.uint8)[:, None, None]).all()


def test_every_pixel_keeps_its_place():
    known = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert (Decoder()(encode(known)) == known.transpose(2, 0, 1)).all()
    assert (Decoder(size=(5, 7))(encode(known)) == known.transpose(2, 0, 1)).all()


def test_resizing_crops_about_the_centre_and_averages():
    # Three bands, left to right: the centre square is the middle one.
    bands = np.repeat(np.array([0, 100, 200], np.uint8), 8)[None].repeat(8, axis=0)
    pixels = Decoder(size=(4, 4))(encode(bands))
    # Lanczos' lobes reach the neighbouring bands, 100 below and 100 above: exactly opposite errors about the centre.
    assert (pixels.astype(int) + pixels[..., ::-1] == 200).all()
    assert abs(pixels.astype(int) - 100).max() <= 5
    # Alternate columns 0 and 200, each pixel of the result over many of them: near their mean, not one of them.
    stripes = np.tile(np.array([0, 200], np.uint8), (64, 32))
    assert abs(Decoder(size=(8, 8))(encode(stripes)).astype(float) - 100.0).max() < 6.0
    assert Decoder(size=(3, 5))(encode(bands)).shape == (1, 3, 5)


def test_orientation_follows_the_camera():
    known = np.array([[0, 64], [128, 255]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    turned = Decoder()(saved(Image.fromarray(known), exif=exif))
    assert (turned[0] == np.rot90(known, -1)).all()


def _huge() -> bytes:
    """A PNG whose header claims 40,000 x 40,000 pixels."""
    ordinary = bytearray(one("L", 0))
    ordinary[16:24] = (40_000).to_bytes(4, "big") * 2
    ordinary[29:33] = zlib.crc32(bytes(ordinary[12:29])).to_bytes(4, "big")
    return bytes(ordinary)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n(/tmp/pwned) (w) file closefile\n"
PNG = encode(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
JPEG = encode(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8), "JPEG")


@pytest.mark.parametrize(
    "encoded",
    [b"", b"not an image", PNG[: len(PNG) // 2], JPEG[: len(JPEG) // 2], PNG[:30], _huge(), EPS,
     PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:], saved(Image.new("F", (2, 2), 0.5), "TIFF")],
    ids=["empty", "text", "half a PNG", "half a JPEG", "header", "bomb", "postscript", "flipped byte", "float"],
)  # fmt: skip
def test_what_cannot_be_read_has_a_reason_and_raises_nothing(encoded):
    result = Decoder()(encoded)
    assert isinstance(result, Unreadable)
    assert len(result.reason) > 5
    assert "0x" not in result.reason  # no memory addresses


def test_formats_that_run_another_program_are_not_even_opened():
    # Pillow would hand EPS to Ghostscript; PCX it could decode itself, and is asked not to.
    for encoded in (EPS, saved(Image.new("L", (2, 2)), "PCX")):
        assert Decoder()(encoded) == Unreadable("UnidentifiedImageError: cannot identify image file")


def test_the_limit_on_pixels_names_itself(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1599)
    assert "40 x 40 pixels, more than the limit of 1,599" in Decoder()(PNG).reason
    monkeypatch.setattr(images, "MAX_PIXELS", 1600)
    assert isinstance(Decoder()(PNG), np.ndarray)
