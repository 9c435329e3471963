"""Networks: plain modules called as `net(x, c_noise, cond=None)`, built from numbers, strings and lists only.

Import torch and `undiffuse.core`, nothing else of the library. `NETS` is what a recipe's `net.name` chooses from.
"""

from __future__ import annotations

from torch import nn

from undiffuse.nets.memory import keep_freed_memory
from undiffuse.nets.mlp import MLP
from undiffuse.nets.unet import UNet

NETS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet}

__all__ = ["MLP", "NETS", "UNet", "keep_freed_memory"]
