"""The stages of a U-Net, made alike: all that its levels have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from undiffuse.core.errors import ArgumentError, choose
from undiffuse.nets.blocks import Attention, Norms, ResidualBlock, Stage
from undiffuse.nets.progressive import ResidualInput, SkipInput, SkipOutput
from undiffuse.nets.resampling import Double, Halve, Resize, Same, taps

MODULATIONS = {"scale-shift": True, "shift": False}
UP_ATTENTION = {"every": False, "last": True}
PROGRESSIVE_OUTPUTS = {"none": False, "output-skip": True}
COMBINE = {"sum": False, "cat": True}


@dataclass(frozen=True)
class Stages:
    """Makes blocks, attention and changes of resolution; arguments as those of `UNet`.

    Raises:
        ArgumentError: an unknown name, or heads that do not divide the channels.
    """

    embedding: int
    modulation: str
    dropout: float
    rescale: float
    norms: Norms
    head_width: int
    heads: int | None
    resample: str
    resample_filter: tuple[float, ...]
    progressive_input: str
    combine: str

    def __post_init__(self):
        choose(self.modulation, MODULATIONS, "modulation")
        choose(self.resample, self._resizers(), "resample")
        choose(self.progressive_input, self._inputs(), "progressive_input")
        choose(self.combine, COMBINE, "combine")
        taps(self.resample_filter)

    def stage(self, width_in: int, width_out: int, attend: bool) -> Stage:
        """A residual block, with attention where asked for."""
        block = self._block(width_in, width_out, Same())
        return Stage(block, self._attention(width_out) if attend else None)

    def halve(self, channels: int) -> nn.Module:
        """The way to the next lower resolution."""
        return self._resizers()[self.resample](channels, Halve(self.resample_filter))

    def double(self, channels: int) -> nn.Module:
        """The way back."""
        return self._resizers()[self.resample](channels, Double(self.resample_filter))

    def image_input(self, image_width: int, width: int) -> ResidualInput | SkipInput | None:
        """How the image joins `width` features at the next level; None: it does not."""
        return self._inputs()[self.progressive_input](image_width, width)

    def image_output(self, width: int, image_width: int) -> SkipOutput:
        """How a level of `width` features says its part of the answer."""
        return SkipOutput(width, image_width, self.resample_filter, self.norms)

    def _block(self, width_in: int, width_out: int, resample: nn.Module, skip_conv: bool = False) -> ResidualBlock:
        return ResidualBlock(
            width_in,
            width_out,
            self.embedding,
            resample=resample,
            modulation=self.modulation,
            dropout=self.dropout,
            rescale=self.rescale,
            norms=self.norms,
            skip_conv=skip_conv,
        )

    def _attention(self, channels: int) -> Attention:
        heads = self.heads
        if heads is not None and (heads < 1 or channels % heads):
            raise ArgumentError(f"heads={heads} over {channels} channels: expected a number that divides them")
        return Attention(channels, self.head_width if heads is None else channels // heads, self.rescale, self.norms)

    def _resizers(self):
        return {
            "block": lambda channels, resample: self._block(channels, channels, resample),
            "block-conv": lambda channels, resample: self._block(channels, channels, resample, True),
            "conv": lambda channels, resample: resample.learned(channels),
            "conv-end": lambda channels, resample: resample.learned_after_end(channels),
            "pool": lambda channels, resample: Resize(resample, None),
        }

    def _inputs(self):
        return {
            "none": lambda image_width, width: None,
            "residual": lambda image_width, width: ResidualInput(
                image_width, width, self.resample_filter, self.rescale
            ),
            "input-skip": lambda image_width, width: SkipInput(
                image_width, width, self.resample_filter, COMBINE[self.combine]
            ),
        }
