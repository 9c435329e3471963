"""Weights of EDM (Karras et al. 2022): its DDPM++, NCSN++ and ADM, under EDM's, VP's or VE's preconditioning.

Their files are pickles that carry code, which is never run here. `EXPORT` is a program for an environment that trusts
them: it writes the weights and the arguments of the network, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, nearest
from undiffuse.integrations.imported import Imported, empty, settings, whole_numbers
from undiffuse.integrations.rules import Rule, apply, by_head, cosines_first, layer, mapping, matrix, sines_first
from undiffuse.integrations.walk import Part, parts
from undiffuse.nets import UNet
from undiffuse.nets.blocks import Attention, ResidualBlock
from undiffuse.nets.presets import sinusoids
from undiffuse.nets.progressive import ResidualInput

EXPORT = """import pickle, sys, torch
net = pickle.load(open(sys.argv[1], "rb"))["ema"]  # in EDM's repository, and only if you trust the file
torch.save({"class": type(net).__name__, "arguments": dict(net.init_kwargs), "weights": net.state_dict()}, sys.argv[2])
"""

# Their defaults.
_SONG: dict[str, Any] = {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.1,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_DHARIWAL: dict[str, Any] = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
    "label_dropout": 0,
}
_NETS = {"SongUNet": _SONG, "DhariwalUNet": _DHARIWAL}
_OUTSIDE: dict[str, dict[str, Any]] = {
    "EDMPrecond": {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": math.inf, "model_type": "DhariwalUNet"},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0, "model_type": "SongUNet"},
}
_SHARED = {"img_resolution": None, "img_channels": 3, "label_dim": 0, "augment_dim": 0, "use_fp16": False}
_INPUTS = {"standard": "none", "residual": "residual", "skip": "input-skip"}
_OUTPUTS = {"standard": "none", "skip": "output-skip"}


def edm(exported: Mapping[str, Any]) -> Imported:
    """A network of EDM, exported by the program `EXPORT`.

    Args:
        exported: {"class": "EDMPrecond", "arguments": {...}, "weights": {...}}, as `torch.load(file,
            weights_only=True)` gives it.

    Raises:
        ArgumentError: another preconditioning or argument than theirs; the nearest is offered.
        CheckpointError: weights of another architecture; names what is missing, unknown, or of another shape.
    """
    with settings("EDM's arguments"):
        outside, given = _arguments(exported)
        arguments = _net(outside, given)
        path, prediction = _reading(exported["class"], outside)
    given_state = mapping(exported.get("weights"), "EDM's weights")
    state = {key.removeprefix("model."): tensor for key, tensor in given_state.items()}
    net = empty(arguments)
    # Filters of their resampling, and the embedding of augmentations, which is 0 for an image that is not augmented.
    unused = [key for key in state if key.endswith("resample_filter") or key == "map_augment.weight"]
    song = outside["model_type"] == "SongUNet"
    weights = apply(_rules(net, song), state, net, f"EDM's {outside['model_type']}", unused)
    if prediction == "noise-unscaled":  # theirs is -noise
        answers = ("last.", *[f"outputs.{i}.conv." for i in range(len(net.outputs))])
        weights |= {key: -tensor for key, tensor in weights.items() if key.startswith(answers)}
    notes = ("the embedding of augmentations is left out",) if "map_augment.weight" in state else ()
    return Imported(arguments, path, prediction, weights, outside.get("sigma_data", 0.5), notes)


def _arguments(exported: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the preconditioning and of the network, with their defaults."""
    kind = exported.get("class")
    if kind not in _OUTSIDE:
        raise ArgumentError(
            f"EDM's preconditioning '{kind}': expected {', '.join(_OUTSIDE)}.{nearest(str(kind), _OUTSIDE)}"
        )
    given = dict(mapping(exported.get("arguments", {}), "EDM's arguments"))
    outside = {**_SHARED, **_OUTSIDE[kind], **{k: v for k, v in given.items() if k in {**_SHARED, **_OUTSIDE[kind]}}}
    if outside["model_type"] not in _NETS:
        raise ArgumentError(f"model_type '{outside['model_type']}': expected {', '.join(_NETS)}")
    defaults = _NETS[outside["model_type"]]
    rest = {key: value for key, value in given.items() if key not in outside}
    for key in rest:
        if key not in defaults:
            raise ArgumentError(f"unknown argument '{key}' of {outside['model_type']}.{nearest(key, defaults)}")
    if outside["img_resolution"] is None:
        raise ArgumentError("EDM's arguments have no img_resolution: export them with the program in EXPORT")
    return outside, {**defaults, **rest}


def _net(outside: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet`."""
    size, width = int(outside["img_resolution"]), int(given["model_channels"])
    multipliers = whole_numbers(given["channel_mult"], "channel_mult")
    shared = {
        "shape": [int(outside["img_channels"]), size, size],
        "width": width,
        "multipliers": multipliers,
        "blocks": int(given["num_blocks"]),
        "attention": [r for r in given["attn_resolutions"] if r in [size >> i for i in range(len(multipliers))]],
        "embedding_width": width * int(given["channel_mult_emb"]),
        "num_classes": int(outside["label_dim"]) or None,
        "dropout": float(given["dropout"]),
    }
    # What the network is told: EDM's log(sigma) / 4, VP's 999 t, VE's log(sigma / 2).
    label = {"scale": outside["M"] - 1.0 if "M" in outside else 1.0, "offset": 0.0}
    if "sigma_data" not in outside and "M" not in outside:
        label["offset"] = -math.log(2)
    if outside["model_type"] == "DhariwalUNet":
        return {**shared, **sinusoids(width, endpoint=False, **label), "late_condition": True}
    features = width * int(given["channel_mult_noise"])
    fourier = {"embedding": "fourier", "noise_features": features}
    fourier |= {"noise_scale": label["scale"], "noise_offset": label["offset"]}
    return {
        **shared,
        **(fourier if given["embedding_type"] == "fourier" else sinusoids(features, **label)),
        "up_attention": "last",
        "heads": 1,
        "modulation": "shift",
        "resample": "block-conv",
        "resample_filter": [float(f) for f in given["resample_filter"]],
        "skip_rescale": True,
        "progressive_input": _INPUTS[given["encoder_type"]],
        "progressive_output": _OUTPUTS[given["decoder_type"]],
        "norm_eps": 1e-6,
    }


def _reading(kind: str, outside: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Path and prediction."""
    if kind == "EDMPrecond":
        return {"name": "karras", "sigma_min": 0.002, "sigma_max": 80.0}, "edm"
    if kind == "VPPrecond":
        low = float(outside["beta_min"])
        return {"name": "vp", "beta_min": low, "beta_max": low + float(outside["beta_d"])}, "noise"
    ends = {"sigma_min": float(outside["sigma_min"]), "sigma_max": float(outside["sigma_max"])}
    return {"name": "ve", **ends}, "noise-unscaled"


def _rules(net: UNet, song: bool) -> list[Rule]:
    rules = []
    if "embedding.noise.frequencies" in net.state_dict():
        rules.append(Rule("embedding.noise.frequencies", ("map_noise.freqs",), lambda f: 2 * math.pi * f))
    rules += layer("embedding.first", "map_layer0", sines_first if song else cosines_first)
    rules += layer("embedding.second", "map_layer1")
    if net.embedding.label is not None:
        rules.append(_labels_first() if song else Rule("embedding.label.table.weight", ("map_label.weight",), _columns))
    rules += layer("first", f"enc.{_size(net, 0)}_conv")
    for part in parts(net):
        rules += _part(part, net)
    top = f"dec.{_size(net, 0)}"
    norm, conv = (f"{top}_aux_norm", f"{top}_aux_conv") if song else ("out_norm", "out_conv")
    return rules + layer("norm", norm) + layer("last", conv)


def _columns(weight: Tensor) -> Tensor:
    """A map of one-hot labels as a table, with 0 for no label."""
    return torch.cat([weight.T, torch.zeros_like(weight.T[:1])])


def _labels_first() -> Rule:
    """Labels that join the noise features, before the first layer W: W (sqrt(n) L e_k + b), and W b for no label."""

    def make(first: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        return (_columns(labels * labels.shape[1] ** 0.5) + bias) @ first.T

    return Rule("embedding.label.table.weight", ("map_layer0.weight", "map_label.weight", "map_label.bias"), make)


def _size(net: UNet, level: int) -> str:
    return "x".join([str(net.shape[1] >> level)] * 2)


def _part(part: Part, net: UNet) -> list[Rule]:
    way = "enc" if part.way == "down" else "dec"
    target = part.level + {"down": 1, "up": -1}.get(part.way, 0)  # of a change of resolution
    if part.kind == "join":
        kind = "residual" if isinstance(part.module, ResidualInput) else "skip"
        return layer(f"{part.name}.conv", f"enc.{_size(net, target)}_aux_{kind}")
    here = f"dec.{_size(net, part.level)}"
    if part.kind == "answer":
        return layer(f"{part.name}.norm", f"{here}_aux_norm") + layer(f"{part.name}.conv", f"{here}_aux_conv")
    if part.kind == "resize":
        theirs = f"{way}.{_size(net, target)}_{part.way}"
    elif part.way == "middle":
        theirs = f"{here}_in{part.number}"
    else:
        theirs = f"{way}.{_size(net, part.level)}_block{part.number}"
    if isinstance(part.module, Attention):
        return _attention(part.name, theirs, part.module.heads)
    return _block(part.name, theirs, part.module)


def _block(ours: str, theirs: str, block: Any) -> list[Rule]:
    pairs = {"norm_1": "norm0", "conv_1": "conv0", "modulation": "affine", "norm_2": "norm1", "conv_2": "conv1"}
    if isinstance(block, ResidualBlock) and block.skip is not None:
        pairs["skip"] = "skip"
    return [rule for a, b in pairs.items() for rule in layer(f"{ours}.{a}", f"{theirs}.{b}")]


def _attention(ours: str, theirs: str, heads: int) -> list[Rule]:
    ordered = by_head(heads, "hd3")
    return [
        *layer(f"{ours}.norm", f"{theirs}.norm2"),
        *[Rule(f"{ours}.qkv.{kind}", (f"{theirs}.qkv.{kind}",), ordered) for kind in ("weight", "bias")],
        *layer(f"{ours}.out", f"{theirs}.proj", matrix),
    ]
