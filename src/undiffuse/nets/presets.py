"""Published networks by name, as arguments of `UNet` (`DiT` where so named): plain numbers, strings and lists.

`UNet(**preset("ncsnpp"))` builds one; in a recipe write the same values under `model.net`. Counts are of trainable
parameters, and equal those of the authors' code, whose ADM and DiT also predict variances (tests/nets/test_presets.py).

| name | network | reference | trainable parameters |
|---|---|---|---|
| `ncsnpp` | NCSN++ of discrete levels, CIFAR-10 | Song et al. 2021, table 3 | 62,693,251 |
| `ncsnpp-continuous`, `-deep` | NCSN++ cont., CIFAR-10 | the same | 62,758,787; 107,586,947 |
| `ddpmpp`, `ddpmpp-deep` | DDPM++ (cont.), CIFAR-10 | the same | 61,804,419; 106,632,579 |
| `ddpm` | DDPM as in score_sde, CIFAR-10 | Ho et al. 2020 | 35,218,947 |
| `ncsnpp-256`, `ncsnpp-1024` | NCSN++ cont., CelebA-HQ | Song et al. 2021, appendix H | 65,574,421; 105,785,880 |
| `adm-64`, `-128`, `-256`, `-512` | ADM, ImageNet by class | Dhariwal and Nichol 2021, table 4 | 296, 422, 554, 559 M |
| `dit-s-2`, `-b-2`, `-l-2`, `-xl-2` | DiT, latents of ImageNet 256 | Peebles and Xie 2023, table 4 | 33 to 675 M |

The labels that they expect: `ncsnpp*` log sigma (prediction "noise-unscaled"; `ncsnpp` counts 1000 levels of images in
[-1, 1] from the noisiest, sigma = 100, to the cleanest, sigma = 0.02), `ddpmpp*` and `ddpm` t in [0, 1], `adm-*` the
t = i / 1000 of a discrete chain of 1000 levels, whose step i they were told as i - 1.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from undiffuse.core.errors import choose


def sinusoids(features: int, *, endpoint: bool = True, scale: float = 999.0, offset: float = 0.0) -> dict[str, Any]:
    """Features of a step counter: frequencies from 1 down to 1e-4, that last one included or not.

    Args:
        features: their number.
        endpoint: f_k = 1e-4^(k / (n - 1)), k < n = features / 2 (Ho et al. 2020); else 1e-4^(k / n) (OpenAI's code).
        scale, offset: the step is `scale (label + offset)`.
    """
    half = features // 2
    lowest = 1e-4 if endpoint else 1e-4 ** ((half - 1) / half)
    return {
        "embedding": "sinusoidal",
        "noise_features": features,
        "noise_frequencies": [1.0, lowest],
        "noise_scale": scale,
        "noise_offset": offset,
    }


_SONG: dict[str, Any] = {
    "width": 128,
    "multipliers": [1, 2, 2, 2],
    "blocks": 4,
    "attention": [16],
    "up_attention": "last",
    "heads": 1,
    "modulation": "shift",
    "resample": "block-conv",
    "skip_rescale": True,
    "norm_eps": 1e-6,
    "initial": "glorot",
}
_CIFAR = {"shape": [3, 32, 32], **_SONG, "dropout": 0.1}
_FIR = {"resample_filter": [1.0, 3.0, 3.0, 1.0]}
_NCSNPP = {**_CIFAR, **_FIR, "progressive_input": "residual"}
_FOURIER = {"embedding": "fourier", "noise_features": 256, "noise_scale": 16.0}
_DDPMPP = {**_CIFAR, **sinusoids(128)}
_LARGE = {**_SONG, **_FIR, "progressive_input": "input-skip", "progressive_output": "output-skip"}
_ADM: dict[str, Any] = {
    "width": 256,
    "blocks": 2,
    "attention": [32, 16, 8],
    "head_width": 64,
    "num_classes": 1000,
    "late_condition": True,
    **sinusoids(256, endpoint=False, scale=1000.0, offset=-0.001),
    "resample": "block",
}

_DIT: dict[str, Any] = {
    "shape": [4, 32, 32],
    "patch": 2,
    "num_classes": 1000,
    **sinusoids(256, endpoint=False, scale=1000.0, offset=-0.001),
}

_DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}

PRESETS: dict[str, dict[str, Any]] = {
    "ncsnpp": {**_NCSNPP, **sinusoids(128, scale=-999 / math.log(5000), offset=-math.log(100))},
    "ncsnpp-continuous": {**_NCSNPP, **_FOURIER},
    "ncsnpp-continuous-deep": {**_NCSNPP, **_FOURIER, "blocks": 8},
    "ddpmpp": _DDPMPP,
    "ddpmpp-deep": {**_DDPMPP, "blocks": 8},
    "ddpm": {
        **_DDPMPP,
        "blocks": 2,
        "resample": "conv-end",
        "skip_rescale": False,
    },
    "ncsnpp-256": {
        "shape": [3, 256, 256],
        **_LARGE,
        **_FOURIER,
        "multipliers": [1, 1, 2, 2, 2, 2, 2],
        "blocks": 2,
    },
    "ncsnpp-1024": {
        "shape": [3, 1024, 1024],
        **_LARGE,
        **_FOURIER,
        "width": 16,
        "noise_features": 32,
        "multipliers": [1, 2, 4, 8, 16, 32, 32, 32],
        "blocks": 1,
    },
    "adm-64": {
        "shape": [3, 64, 64],
        **_ADM,
        **sinusoids(192, endpoint=False, scale=1000.0, offset=-0.001),
        "width": 192,
        "multipliers": [1, 2, 3, 4],
        "blocks": 3,
        "dropout": 0.1,
    },
    "adm-128": {"shape": [3, 128, 128], **_ADM, "multipliers": [1, 1, 2, 3, 4], "heads": 4},
    "adm-256": {"shape": [3, 256, 256], **_ADM, "multipliers": [1, 1, 2, 2, 4, 4]},
    "adm-512": {
        "shape": [3, 512, 512],
        **_ADM,
        "width": 128,
        "multipliers": [1, 2, 2, 4, 4, 8, 8],
        "embedding_width": 1024,
    },
    **{
        f"dit-{size}-2": {"width": width, "depth": depth, "heads": heads, **_DIT}
        for size, (width, depth, heads) in _DIT_SIZES.items()
    },
}


def preset(name: str) -> dict[str, Any]:
    """Arguments of a published network; change what you like before building it.

    Raises:
        ArgumentError: an unknown name; the nearest is offered.
    """
    return copy.deepcopy(choose(name, PRESETS, "preset"))
