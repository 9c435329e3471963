"""Networks: plain modules called as `net(x, c_noise, cond=None)`, built from numbers, strings and lists only.

Import torch and `undiffuse.core`, nothing else of the library. `NETS` is what a recipe's `net.name` chooses from,
`preset` has the arguments of published networks.
"""

from __future__ import annotations

from torch import nn

from undiffuse.nets.classifier import ClassifierConv, ClassifierMLP
from undiffuse.nets.dit import DiT
from undiffuse.nets.energy import EnergyConv, EnergyMLP
from undiffuse.nets.memory import keep_freed_memory
from undiffuse.nets.mlp import MLP
from undiffuse.nets.presets import PRESETS, preset
from undiffuse.nets.unet import UNet

# What answers with an event, with one number per sample, and with one per class.
DENOISING_NETS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}
ENERGY_NETS: dict[str, type[nn.Module]] = {"energy-mlp": EnergyMLP, "energy-conv": EnergyConv}
CLASSIFIER_NETS: dict[str, type[nn.Module]] = {"classifier-mlp": ClassifierMLP, "classifier-conv": ClassifierConv}
NETS: dict[str, type[nn.Module]] = {**DENOISING_NETS, **ENERGY_NETS, **CLASSIFIER_NETS}

__all__ = [
    "CLASSIFIER_NETS",
    "DENOISING_NETS",
    "ENERGY_NETS",
    "MLP",
    "NETS",
    "PRESETS",
    "ClassifierConv",
    "ClassifierMLP",
    "DiT",
    "EnergyConv",
    "EnergyMLP",
    "UNet",
    "keep_freed_memory",
    "preset",
]
