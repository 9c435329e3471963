"""Weights of OpenAI's guided-diffusion and improved-diffusion (Dhariwal and Nichol 2021; Nichol and Dhariwal 2021).

Their files are bare state dicts: the architecture is in the flags of their command lines. Learned variances, the upper
half of the output channels, are dropped: the mean, and with it every quantity of ours, does not depend on them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from undiffuse.core.errors import ArgumentError, CheckpointError, nearest
from undiffuse.integrations.imported import Imported, empty, flag
from undiffuse.integrations.rules import Rule, apply, by_head, cosines_first, dense, layer, mapping, matrix
from undiffuse.integrations.walk import Part, parts
from undiffuse.nets import UNet
from undiffuse.nets.blocks import Attention, ResidualBlock
from undiffuse.nets.presets import sinusoids

# Their flags with their defaults (script_util.py, model_and_diffusion_defaults).
FLAGS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
# Flags of training and sampling, which a copied command line may hold.
_OF_NO_MATTER = {"sigma_small", "timestep_respacing", "use_kl", "rescale_learned_sigmas"}
_MULTIPLIERS = {
    512: [0.5, 1, 1, 2, 2, 4, 4],
    256: [1, 1, 2, 2, 4, 4],
    128: [1, 1, 2, 3, 4],
    64: [1, 2, 3, 4],
    32: [1, 2, 2, 2],
}


def read_flags(line: str) -> dict[str, Any]:
    """`"--image_size 64 --class_cond True"` as a mapping of flags.

    Raises:
        ArgumentError: not of that form.
    """
    try:
        words = [part for word in shlex.split(line) for part in word.split("=", 1)]
    except ValueError as error:  # a quote that is not closed
        raise ArgumentError(f"flags '{line}': {error}; expected pairs such as '--image_size 64'") from error
    names, values = words[::2], words[1::2]
    if len(words) % 2 or not all(name.startswith("--") for name in names):
        raise ArgumentError(f"flags '{line}': expected pairs such as '--image_size 64 --class_cond True'")
    return {name.removeprefix("--"): value for name, value in zip(names, values)}


def guided_diffusion(state: Mapping[str, Tensor], flags: Mapping[str, Any] | None = None) -> Imported:
    """A model file of guided-diffusion or improved-diffusion (`64x64_diffusion.pt`), not an upsampler or classifier.

    Args:
        state: what `torch.load(file, weights_only=True)` gives.
        flags: their MODEL_FLAGS by name; those left out have their defaults.

    Raises:
        ArgumentError: an unknown flag (the nearest is offered), or a setting that `UNet` has not.
        CheckpointError: weights of another architecture; names what is missing, unknown, or of another shape.
    """
    what = "guided-diffusion's weights"
    mapping(state, what)
    for name in ("label_emb.weight", "input_blocks.0.0.weight"):  # their shapes are arguments
        if name in state and dense(state[name], name, what).ndim < 2:
            raise CheckpointError(
                f"{what}: '{name}' has the shape {tuple(state[name].shape)}: expected two axes or more"
            )
    options = _options(flags or {})
    arguments, path = _arguments(options, state), _path(options)
    net = empty(arguments)
    channels = arguments["shape"][0]
    weights = apply(_rules(net, channels, options), state, net, what)
    learned = options["learn_sigma"]
    notes = ["the learned variances are left out"] if learned else []
    if options["class_cond"]:
        notes.append("it was trained with labels only: label -1 (no label) gives samples of no meaning")
    return Imported(
        arguments,
        path,
        "data" if options["predict_xstart"] else "noise",
        weights,
        notes=tuple(notes),
    )


def _options(flags: Mapping[str, Any]) -> dict[str, Any]:
    for name in flags:
        if name not in FLAGS and name not in _OF_NO_MATTER:
            raise ArgumentError(f"unknown flag '{name}'.{nearest(name, FLAGS)} Known: {', '.join(FLAGS)}.")
    options = {name: _typed(name, flags.get(name, default)) for name, default in FLAGS.items()}
    if "rescale_timesteps" not in flags and options["diffusion_steps"] != 1000:
        raise ArgumentError(
            f"diffusion_steps={options['diffusion_steps']} without rescale_timesteps, whose default is True in "
            "improved-diffusion and False in guided-diffusion: add --rescale_timesteps True or False"
        )
    return options


def _typed(name: str, given: Any) -> Any:
    """A flag's value, of its default's type."""
    kind = type(FLAGS[name])
    if kind is bool:
        return flag(given, name)
    if kind is str:
        return str(given)
    [value] = _numbers(name, str(given), kind)
    if kind is int and value < 1 and FLAGS[name] != -1:
        raise ArgumentError(f"{name}={given}: expected 1 or more")
    return value


def _numbers(name: str, given: str, kind: type) -> list[Any]:
    """Numbers with commas between them."""
    try:
        return [kind(number) for number in (given.split(",") if isinstance(FLAGS[name], str) else [given])]
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        some = ", or several with commas between them" if isinstance(FLAGS[name], str) else ""
        raise ArgumentError(f"{name}={given}: expected {expected}{some}") from error


def _arguments(options: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `UNet`."""
    size, width, steps = options["image_size"], options["num_channels"], options["diffusion_steps"]
    given = options["channel_mult"]
    multipliers = _numbers("channel_mult", given, float) if given else _MULTIPLIERS.get(size)
    if multipliers is None:
        raise ArgumentError(f"image_size={size} has no multipliers of its own: give channel_mult, such as 1,2,2,2")
    first = round(width * multipliers[0]) if 0 < multipliers[0] < math.inf else 0
    relative = [width * m / max(first, 1) for m in multipliers]
    if not first or any(m < 1 or m % 1 for m in relative):
        raise ArgumentError(f"channel_mult={multipliers}: expected multiples of the first")
    if options["num_heads_upsample"] not in (-1, options["num_heads"]):
        raise ArgumentError("num_heads_upsample: expected as many heads on the way up as on the way down")
    heads, head_width = options["num_heads"], options["num_head_channels"]
    resolutions = _numbers("attention_resolutions", options["attention_resolutions"], int)
    if options["class_cond"] and "label_emb.weight" not in state:
        raise CheckpointError("class_cond is True, but the weights have no label_emb.weight: expected class_cond False")
    labels = state["label_emb.weight"].shape[0] if options["class_cond"] else None
    counted = 1000.0 if options["rescale_timesteps"] else float(steps)
    return {
        "shape": [state["input_blocks.0.0.weight"].shape[1] if "input_blocks.0.0.weight" in state else 3, size, size],
        "width": first,
        "multipliers": [int(m) for m in relative],
        "blocks": options["num_res_blocks"],
        "attention": [r for r in resolutions if r in [size >> i for i in range(len(relative))]],
        **({"heads": heads} if head_width == -1 else {"head_width": head_width}),
        "num_classes": labels,
        "late_condition": True,
        **sinusoids(width, endpoint=False, scale=counted, offset=-1 / steps),
        "embedding_width": 4 * width,
        "modulation": "scale-shift" if options["use_scale_shift_norm"] else "shift",
        "resample": "block" if options["resblock_updown"] else "conv",
        "norm_groups": 32,
        "dropout": options["dropout"],
    }


def _path(options: Mapping[str, Any]) -> dict[str, Any]:
    steps = options["diffusion_steps"]
    if options["noise_schedule"] == "linear":
        return {"name": "tabulated-betas", "levels": steps, "first": 0.1 / steps, "last": 20 / steps}
    if options["noise_schedule"] == "cosine":
        return {"name": "tabulated-cosine", "levels": steps}
    raise ArgumentError(f"noise_schedule={options['noise_schedule']}: expected linear or cosine")


def _rules(net: UNet, channels: int, options: Mapping[str, Any]) -> list[Rule]:
    order = "3hd" if options["use_new_attention_order"] else "h3d"
    rules = layer("embedding.first", "time_embed.0", cosines_first) + layer("embedding.second", "time_embed.2")
    if net.embedding.label is not None:
        rules.append(Rule("embedding.label.table.weight", ("label_emb.weight",), with_no_label))
    rules += layer("first", "input_blocks.0.0")
    for part in parts(net):
        theirs = _name(part, net)
        if isinstance(part.module, ResidualBlock):
            rules += _block(part.name, theirs, part.module)
        elif isinstance(part.module, Attention):
            rules += _attention(part.name, theirs, by_head(part.module.heads, order))
        else:
            rules += layer(f"{part.name}.conv", f"{theirs}.{'op' if part.way == 'down' else 'conv'}")
    rules += layer("norm", "out.0")
    return rules + [Rule(f"last.{kind}", (f"out.2.{kind}",), lambda t: t[:channels]) for kind in ("weight", "bias")]


def with_no_label(table: Tensor) -> Tensor:
    """A row of zeros behind the classes."""
    return torch.cat([table, torch.zeros_like(table[:1])])


def _name(part: Part, net: UNet) -> str:
    """Their name of a part: a list of lists, where attention and the way up are behind the block."""
    if part.way == "middle":
        return f"middle_block.{1 if part.kind == 'attention' else 2 * part.number}"
    if part.way == "down":
        return f"input_blocks.{part.entry + 1}.{int(part.kind == 'attention')}"
    if part.kind != "resize":
        return f"output_blocks.{part.entry}.{int(part.kind == 'attention')}"
    last = list(net.up[net.levels - 1 - part.level].children())[part.number - 1]
    return f"output_blocks.{part.entry}.{1 if last.attention is None else 2}"


def _block(ours: str, theirs: str, block: ResidualBlock) -> list[Rule]:
    pairs = {
        "norm_1": "in_layers.0",
        "conv_1": "in_layers.2",
        "modulation": "emb_layers.1",
        "norm_2": "out_layers.0",
        "conv_2": "out_layers.3",
    }
    if block.skip is not None:
        pairs["skip"] = "skip_connection"
    return [rule for a, b in pairs.items() for rule in layer(f"{ours}.{a}", f"{theirs}.{b}")]


def _attention(ours: str, theirs: str, ordered: Any) -> list[Rule]:
    return [
        *layer(f"{ours}.norm", f"{theirs}.norm"),
        *[Rule(f"{ours}.qkv.{kind}", (f"{theirs}.qkv.{kind}",), ordered) for kind in ("weight", "bias")],
        *layer(f"{ours}.out", f"{theirs}.proj_out", matrix),
    ]
