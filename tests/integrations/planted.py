"""Weights, images and labels that are functions of their names, and the tiny networks whose answers are stored.

`references.npz` holds, for every case, the names and shapes of the original's tensors and its answer to the planted
image. It was written by tests/integrations/record.py, which runs the originals.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

STORED = Path(__file__).with_name("references.npz")
SIZE = 8
LABELS = torch.tensor([1, 4])

# score_sde: configuration, and what is changed in it.
SONG = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
SCORE_SDE = {
    "ncsnpp": ("ve/cifar10_ncsnpp_continuous", SONG),
    "ncsnpp-discrete": ("ve/cifar10_ncsnpp", SONG),
    "ncsnpp-large": ("ve/celebahq_256_ncsnpp_continuous", {**SONG, "ch_mult": (1, 1, 2)}),
    "ddpmpp": ("vp/cifar10_ddpmpp_continuous", SONG),
    "ddpm": ("vp/ddpm/cifar10", {**SONG, "nf": 32}),
}
# guided-diffusion: flags.
_ADM = {
    "image_size": SIZE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
    "class_cond": True,
    "learn_sigma": True,
}
GUIDED = {
    "adm": {**_ADM, "num_head_channels": 16, "resblock_updown": True, "use_new_attention_order": True},
    "improved": {**_ADM, "num_heads": 4, "use_scale_shift_norm": False},
}
# EDM: preconditioning and arguments.
_EDM = {"img_resolution": SIZE, "img_channels": 3, "num_blocks": 1, "channel_mult": [1, 2], "attn_resolutions": [8]}
_SONG_UNET = {**_EDM, "model_type": "SongUNet", "model_channels": 8}
_NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
EDM = {
    "edm-ddpmpp": ("EDMPrecond", {**_SONG_UNET, "label_dim": 6, "augment_dim": 9}),
    "edm-ncsnpp": ("VEPrecond", {**_SONG_UNET, **_NCSNPP}),
    "edm-vp": ("VPPrecond", _SONG_UNET),
    "edm-adm": ("EDMPrecond", {**_EDM, "model_type": "DhariwalUNet", "model_channels": 64, "label_dim": 6}),
}
# diffusers: arguments of UNet2DModel.
_DIFFUSERS = {
    "sample_size": SIZE,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
}
DIFFUSERS = {
    "diffusers": {**_DIFFUSERS, "num_class_embeds": 6},
    "diffusers-ddpm": {
        **_DIFFUSERS,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
}


def planted(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of variance 1 that look random: equidistributed squares, begun where the name says."""
    k = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64)
    u = (0.6180339887498949 * k * k + zlib.crc32(name.encode()) / 2**32) % 1.0 - 0.5
    return (12**0.5 * u).float().reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a network: matrices keep variances, gains are near 1, offsets near 0."""
    value = planted(name, shape)
    if len(shape) > 1:
        return 0.7 * value * value[0].numel() ** -0.5
    if name.endswith((".W", "freqs")):
        return value
    return 0.1 * value + (1.0 if name.endswith("weight") else 0.0)


def image() -> torch.Tensor:
    return planted("image", (2, 3, SIZE, SIZE))


def weights(case: str) -> dict[str, torch.Tensor]:
    """The original's state."""
    with np.load(STORED) as stored:
        shapes = json.loads(bytes(stored[f"{case}/names"]))
    return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}


def answer(case: str) -> torch.Tensor:
    """What the original said."""
    with np.load(STORED) as stored:
        return torch.from_numpy(stored[f"{case}/answer"])
