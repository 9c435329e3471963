"""Weights of score_sde_pytorch (Song et al. 2021): NCSN++, DDPM++ and DDPM.

Theirs is a list of modules in the order of the forward pass. Images in [0, 1] with noise sigma are ours in [-1, 1]
with noise 2 sigma: their network doubles and centres its input itself, so that it sees what ours is given. Its output
is -noise (VE, before the division by sigma) or noise (VP, sub-VP).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from undiffuse.core.errors import CheckpointError, choose
from undiffuse.integrations.imported import Imported, empty
from undiffuse.integrations.rules import Rule, apply, dense, layer, mapping, sines_first, stacked
from undiffuse.integrations.walk import Part, parts
from undiffuse.nets import UNet
from undiffuse.nets.blocks import ResidualBlock
from undiffuse.nets.presets import preset, sinusoids
from undiffuse.nets.progressive import ResidualInput

_BETAS = {"beta_min": 0.1, "beta_max": 20.0}
_CHAIN = {"noise_scale": 1000.0, "noise_offset": -0.001}  # step i of 1 ... 1000 was called i - 1
_VE = {"name": "ve", "sigma_min": 0.02, "sigma_max": 100.0}
_VP, _SUB_VP = {"name": "vp", **_BETAS}, {"name": "sub-vp", **_BETAS}
_DDPM = {"name": "tabulated-betas", "levels": 1000, "first": 1e-4, "last": 0.02}
_CELEBA = {"shape": [3, 256, 256], "multipliers": [1, 1, 2, 2, 4, 4], "dropout": 0.0}
_NCSNPP = {"resample_filter": [1.0, 3.0, 3.0, 1.0], "progressive_input": "residual"}
_LEVELS = sinusoids(128, scale=-999 / math.log(5000), offset=-math.log(100))
_IN_UNIT_RANGE = -math.log(2)  # log sigma of their images is ours less log 2

# Their configuration -> (preset, what differs from it, path).
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ve/cifar10_ncsnpp": ("ncsnpp", {}, _VE),
    "ve/cifar10_ncsnpp_continuous": ("ncsnpp-continuous", {}, _VE),
    "ve/cifar10_ncsnpp_deep_continuous": ("ncsnpp-continuous-deep", {}, _VE),
    "ve/cifar10_ddpm": ("ddpm", _LEVELS, _VE),
    "ve/celebahq_256_ncsnpp_continuous": ("ncsnpp-256", {}, {**_VE, "sigma_max": 696.0}),
    "ve/ffhq_256_ncsnpp_continuous": ("ncsnpp-256", {}, {**_VE, "sigma_max": 696.0}),
    "ve/bedroom_ncsnpp_continuous": ("ncsnpp-256", {}, {**_VE, "sigma_max": 756.0}),
    "ve/church_ncsnpp_continuous": ("ncsnpp-256", {}, {**_VE, "sigma_max": 760.0}),
    "ve/celebahq_ncsnpp_continuous": ("ncsnpp-1024", {}, {**_VE, "sigma_max": 2696.0}),
    "ve/ffhq_ncsnpp_continuous": ("ncsnpp-1024", {}, {**_VE, "sigma_max": 2696.0}),
    "vp/cifar10_ncsnpp": ("ddpmpp", {**_NCSNPP, **_CHAIN}, _DDPM),
    "vp/cifar10_ddpmpp": ("ddpmpp", _CHAIN, _DDPM),
    "vp/ddpm/cifar10": ("ddpm", _CHAIN, _DDPM),
    "vp/ddpm/celebahq": ("ddpm", {**_CHAIN, **_CELEBA}, _DDPM),
    "vp/ddpm/bedroom": ("ddpm", {**_CHAIN, **_CELEBA}, _DDPM),
    "vp/ddpm/church": ("ddpm", {**_CHAIN, **_CELEBA}, _DDPM),
    "vp/ddpm/cifar10_continuous": ("ddpm", {}, _VP),
    "subvp/cifar10_ddpm_continuous": ("ddpm", {}, _SUB_VP),
    **{
        f"{name}/cifar10_{net}_continuous": (choice, changes, path)
        for name, path in (("vp", _VP), ("subvp", _SUB_VP))
        for net, choice, changes in (
            ("ncsnpp", "ddpmpp", _NCSNPP),
            ("ncsnpp_deep", "ddpmpp-deep", _NCSNPP),
            ("ddpmpp", "ddpmpp", {}),
            ("ddpmpp_deep", "ddpmpp-deep", {}),
        )
    },
}


def score_sde(checkpoint: Mapping[str, Any], config: str, **changes: Any) -> Imported:
    """A checkpoint of score_sde_pytorch; its moving average where it has one.

    Args:
        checkpoint: what `torch.load(file, weights_only=True)` gives: their dict with "model" and "ema", or a state
            dict.
        config: the name of their configuration, "ve/cifar10_ncsnpp_continuous"; `CONFIGS` has those that are known.
        changes: arguments of `UNet` that differ from it.

    Raises:
        ArgumentError: an unknown configuration; the nearest is offered.
        CheckpointError: weights of another architecture; names what is missing, unknown, or of another shape.
    """
    name, own, path = choose(config.removesuffix(".py"), CONFIGS, "configuration of score_sde")
    arguments = {**preset(name), **own, **changes}
    exploding = path["name"] == "ve"
    if arguments["embedding"] == "fourier":
        arguments["noise_offset"] = _IN_UNIT_RANGE
    net = empty(arguments)
    given, average = _state(checkpoint)
    names = _Names(net, plain=arguments["resample"] == "conv-end")
    weights = apply(names.rules(), given, net, f"score_sde's {config}", unused=("sigmas",))
    if exploding:  # theirs is -noise
        weights |= {key: -tensor for key, tensor in weights.items() if key in _answers(net)}
    return Imported(
        arguments,
        path,
        "noise-unscaled" if exploding else "noise",
        weights,
        notes=(f"weights: {average}",),
    )


def _state(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Their state dict, and which weights it has."""
    what = "score_sde's checkpoint"
    model = mapping(mapping(checkpoint, what).get("model", checkpoint), f"{what}, 'model'")
    state = {key.removeprefix("module."): tensor for key, tensor in model.items()}
    ema = mapping(checkpoint.get("ema", {}), f"{what}, 'ema'")
    shadow = ema.get("shadow_params")
    if shadow is None or (isinstance(shadow, list) and not shadow):
        return state, "the last ones (there is no moving average)"
    # The average is a list of the trainable parameters, in the order of the state dict.
    trained = [key for key in state if key not in ("sigmas", "all_modules.0.W")]
    if not isinstance(shadow, (list, tuple)):
        raise CheckpointError(f"{what}, 'ema': shadow_params is a {type(shadow).__name__}, where a list was expected")
    for name, tensors in (("shadow_params", dict(enumerate(shadow))), ("model", {key: state[key] for key in trained})):
        for key, tensor in tensors.items():
            dense(tensor, f"{name}.{key}", what)
    if [state[key].shape for key in trained] != [tensor.shape for tensor in shadow]:
        raise CheckpointError(
            f"score_sde's moving average has {len(shadow)} tensors, which are not those of its {len(trained)} trained "
            'parameters: import the last weights, checkpoint["model"], instead'
        )
    return state | dict(zip(trained, shadow)), f"the moving average of rate {ema.get('decay', 'unknown')}"


def _answers(net: UNet) -> set[str]:
    """Names of the parameters on which the output depends linearly."""
    layers = ["last", *[f"outputs.{i}.conv" for i in range(len(net.outputs))]]
    return {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}


class _Names:
    """Rules for the parts of a network, whose names in theirs are counted in the order of the forward pass."""

    def __init__(self, net: UNet, plain: bool):
        self.net, self.plain, self._number = net, plain, count()

    def following(self) -> str:
        return f"all_modules.{next(self._number)}"

    def rules(self) -> list[Rule]:
        """Every tensor of ours from theirs."""
        rules: list[Rule] = []
        if "embedding.noise.frequencies" in self.net.state_dict():
            scale = 2 * math.pi / self.net.embedding.noise_scale
            rules.append(Rule("embedding.noise.frequencies", (f"{self.following()}.W",), lambda w: w * scale))
        rules += layer("embedding.first", self.following(), sines_first)
        rules += layer("embedding.second", self.following())
        rules += layer("first", self.following())
        kinds = {
            "block": self._block,
            "attention": self._attention,
            "resize": self._resize,
            "join": self._join,
            "answer": self._answer,
        }
        for part in parts(self.net):
            rules += kinds[part.kind](part)
        return rules + layer("norm", self.following()) + layer("last", self.following())

    def _block(self, part: Part) -> list[Rule]:
        ours, theirs, skip = part.name, self.following(), part.module.skip
        rules = [
            *layer(f"{ours}.norm_1", f"{theirs}.GroupNorm_0"),
            *layer(f"{ours}.conv_1", f"{theirs}.Conv_0"),
            *layer(f"{ours}.modulation", f"{theirs}.Dense_0"),
            *layer(f"{ours}.norm_2", f"{theirs}.GroupNorm_1"),
            *layer(f"{ours}.conv_2", f"{theirs}.Conv_1"),
        ]
        if skip is None:
            return rules
        if self.plain:
            return rules + _matrix(f"{ours}.skip", f"{theirs}.NIN_0", lambda w: w.T[:, :, None, None])
        return rules + layer(f"{ours}.skip", f"{theirs}.Conv_2")

    def _attention(self, part: Part) -> list[Rule]:
        ours, theirs = part.name, self.following()
        three = [f"{theirs}.NIN_{i}" for i in range(3)]
        return [
            *layer(f"{ours}.norm", f"{theirs}.GroupNorm_0"),
            Rule(f"{ours}.qkv.weight", tuple(f"{name}.W" for name in three), lambda *w: stacked(*[m.T for m in w])),
            Rule(f"{ours}.qkv.bias", tuple(f"{name}.b" for name in three), stacked),
            *_matrix(f"{ours}.out", f"{theirs}.NIN_3", lambda w: w.T),
        ]

    def _resize(self, part: Part) -> list[Rule]:
        if isinstance(part.module, ResidualBlock):
            return self._block(part)
        return layer(f"{part.name}.conv", f"{self.following()}.Conv_0")

    def _join(self, part: Part) -> list[Rule]:
        inner = "Conv2d_0" if isinstance(part.module, ResidualInput) else "Conv_0"
        return layer(f"{part.name}.conv", f"{self.following()}.{inner}")

    def _answer(self, part: Part) -> list[Rule]:
        return layer(f"{part.name}.norm", self.following()) + layer(f"{part.name}.conv", self.following())


def _matrix(ours: str, theirs: str, make: Callable[[Tensor], Tensor]) -> list[Rule]:
    """Their "network in network", a matrix (in, out)."""
    return [Rule(f"{ours}.weight", (f"{theirs}.W",), make), Rule(f"{ours}.bias", (f"{theirs}.b",))]
