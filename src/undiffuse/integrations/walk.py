"""The parts of a U-Net in the order of its forward pass, with where they stand: what other projects name parts by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from undiffuse.nets import UNet
from undiffuse.nets.blocks import Stage


@dataclass(frozen=True)
class Part:
    """A module of a U-Net.

    Args:
        kind: "block", "attention", "resize" (a change of resolution), "join" (of the image), "answer" (a level's).
        name: its name in the network.
        way: "down", "middle" or "up".
        level: resolution; 0 is that of the image. A change of resolution has the level that it comes from.
        number: of the block within its way and level.
        entry: of the stage or change of resolution within its way.
        module: itself.
    """

    kind: str
    name: str
    way: str
    level: int
    number: int
    entry: int
    module: nn.Module


def parts(net: UNet) -> Iterator[Part]:
    """All parts but the embedding, the first convolution and the last norm and convolution."""
    yield from _down(net)
    for number, stage in enumerate(net.middle):
        assert isinstance(stage, Stage)
        yield from _stage(stage, f"middle.{number}", "middle", net.levels - 1, number, number)
    yield from _up(net)


def _down(net: UNet) -> Iterator[Part]:
    level = number = 0
    for entry, stage in enumerate(net.down):
        name = f"down.{entry}"
        if isinstance(stage, Stage):
            yield from _stage(stage, name, "down", level, number, entry)
            number += 1
            continue
        yield Part("resize", name, "down", level, 0, entry, stage)
        if len(net.inputs):
            yield Part("join", f"inputs.{level}", "down", level, 0, entry, net.inputs[level])
        level, number = level + 1, 0


def _up(net: UNet) -> Iterator[Part]:
    entry = 0
    for index, steps in enumerate(net.up):
        level = net.levels - 1 - index
        for number, stage in enumerate(steps.children()):
            name = f"up.{index}.{number}"
            if isinstance(stage, Stage):
                yield from _stage(stage, name, "up", level, number, entry)
                entry += 1
                continue
            if len(net.outputs):
                yield Part("answer", f"outputs.{index}", "up", level, 0, entry - 1, net.outputs[index])
            yield Part("resize", name, "up", level, number, entry - 1, stage)


def _stage(stage: Stage, name: str, way: str, level: int, number: int, entry: int) -> Iterator[Part]:
    yield Part("block", f"{name}.block", way, level, number, entry, stage.block)
    if stage.attention is not None:
        yield Part("attention", f"{name}.attention", way, level, number, entry, stage.attention)
