"""Weights of diffusers' `UNet2DModel`, with the scheduler beside it (a pipeline's folder, or the model's alone)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.integrations.guided_diffusion import with_no_label
from undiffuse.integrations.imported import Imported, empty, settings, whole_numbers
from undiffuse.integrations.rules import Rule, apply, cosines_first, layer, mapping, sines_first, stacked
from undiffuse.integrations.walk import Part, parts
from undiffuse.nets import UNet
from undiffuse.nets.blocks import Attention, ResidualBlock

# The defaults of `UNet2DModel`, of which files may leave some out.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# What `UNet` can be: other values of these are refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
# Names of attention in files written before diffusers 0.15.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.")


def diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> Imported:
    """A `UNet2DModel`.

    Args:
        state: `diffusion_pytorch_model.safetensors`.
        config: `config.json` beside it.
        scheduler: `scheduler_config.json`; None: DDPM's linear chain of 1000 levels and predicted noise.

    Raises:
        ArgumentError: a setting that `UNet`, or a path of ours, has not.
        CheckpointError: weights of another architecture; names what is missing, unknown, or of another shape.
    """
    options = {**_DEFAULTS, **mapping(config, "config.json")}
    for key, allowed in _ONLY.items():
        if options[key] not in allowed:
            raise ArgumentError(f"UNet2DModel's {key} is {options[key]!r}: only {_listed(allowed)} can be imported")
    scaled = options["resnet_time_scale_shift"] == "scale_shift"
    groups = options["attn_norm_num_groups"]
    if options["add_attention"] and groups != options["norm_num_groups"] and (scaled or groups is not None):
        raise ArgumentError(
            f"UNet2DModel's attn_norm_num_groups is {groups}: only an attention normed in norm_num_groups = "
            f"{options['norm_num_groups']} groups, as the rest, can be imported"
        )
    with settings("scheduler_config.json"):
        path, prediction, steps = _chain(mapping({} if scheduler is None else scheduler, "scheduler_config.json"))
    with settings("config.json"):
        arguments = _arguments(options, steps)
    net, what = empty(arguments), "the weights of UNet2DModel"
    given = {
        _OLD.sub(lambda m: f"{m[1]}.{_OLD_NAMES[m[2]]}.", name): tensor for name, tensor in mapping(state, what).items()
    }
    weights = apply(_rules(net, bool(options["flip_sin_to_cos"])), given, net, what)
    notes = () if scheduler else ("there was no scheduler: DDPM's linear chain and predicted noise are assumed",)
    return Imported(arguments, path, prediction, weights, notes=notes)


def _listed(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)


def _chain(scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], str, int]:
    """Path, prediction and number of steps."""
    steps = int(scheduler.get("num_train_timesteps", 1000))
    wanted = str(scheduler.get("prediction_type", "epsilon"))
    if wanted not in _PREDICTIONS:
        raise ArgumentError(f"the scheduler's prediction_type is '{wanted}': expected {', '.join(_PREDICTIONS)}")
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise ArgumentError("the scheduler has betas of its own: only linear and squaredcos_cap_v2 can be imported")
    schedule = scheduler.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":
        return {"name": "tabulated-cosine", "levels": steps}, _PREDICTIONS[wanted], steps
    if schedule != "linear":
        raise ArgumentError(f"the scheduler's beta_schedule is '{schedule}': expected linear or squaredcos_cap_v2")
    ends = {"first": float(scheduler.get("beta_start", 1e-4)), "last": float(scheduler.get("beta_end", 0.02))}
    return {"name": "tabulated-betas", "levels": steps, **ends}, _PREDICTIONS[wanted], steps


def _arguments(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The arguments of `UNet`."""
    widths = whole_numbers(options["block_out_channels"], "block_out_channels")
    if any(w % widths[0] for w in widths):
        raise ArgumentError(f"block_out_channels={widths}: expected multiples of the first")
    size, channels = options.get("sample_size"), int(options["in_channels"])
    if size is None:
        raise ArgumentError('UNet2DModel has no sample_size: add "sample_size": 32, its images\' size, to config.json')
    height, width = (size, size) if isinstance(size, int) else size
    down, up = options["down_block_types"], options["up_block_types"]
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    unknown = [kind for kind in (*down, *up) if kind not in kinds]
    if unknown or [kinds[k] for k in down] != [kinds[k] for k in up][::-1]:
        raise ArgumentError(
            f"blocks {list(down)} and {list(up)}: only {', '.join(kinds)} can be imported, the same on both ways"
        )
    half, shift = widths[0] // 2, float(options["freq_shift"])
    head = options["attention_head_dim"]
    return {
        "shape": [channels, int(height), int(width)],
        "width": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "blocks": int(options["layers_per_block"]),
        "attention": [int(height) >> i for i, kind in enumerate(down) if kinds[kind]],
        "middle_attention": bool(options["add_attention"]),
        **({"heads": 1} if head is None else {"head_width": int(head)}),
        "num_classes": options["num_class_embeds"],
        "late_condition": True,
        "noise_scale": float(steps),
        "noise_offset": -1 / steps,
        "noise_features": widths[0],
        "noise_frequencies": [1.0, 1e-4 ** ((half - 1) / (half - shift))],
        "embedding_width": int(options["time_embedding_dim"] or 4 * widths[0]),
        "modulation": "shift" if options["resnet_time_scale_shift"] == "default" else "scale-shift",
        "resample": "conv" if options["downsample_padding"] else "conv-end",
        "norm_groups": int(options["norm_num_groups"]),
        "norm_eps": float(options["norm_eps"]),
        "dropout": float(options["dropout"]),
        "out_channels": int(options["out_channels"]),
    }


def _rules(net: UNet, cosines: bool) -> list[Rule]:
    rules = layer("embedding.first", "time_embedding.linear_1", cosines_first if cosines else sines_first)
    rules += layer("embedding.second", "time_embedding.linear_2")
    if net.embedding.label is not None:
        rules.append(Rule("embedding.label.table.weight", ("class_embedding.weight",), with_no_label))
    rules += layer("first", "conv_in")
    for part in parts(net):
        theirs = _name(part, net)
        if isinstance(part.module, ResidualBlock):
            rules += _block(part.name, theirs, part.module)
        elif isinstance(part.module, Attention):
            rules += _attention(part.name, theirs)
        else:
            rules += layer(f"{part.name}.conv", f"{theirs}.conv")
    return rules + layer("norm", "conv_norm_out") + layer("last", "conv_out")


def _name(part: Part, net: UNet) -> str:
    kind = "attentions" if part.kind == "attention" else "resnets"
    if part.way == "middle":
        return f"mid_block.{kind}.{part.number}"
    index = part.level if part.way == "down" else net.levels - 1 - part.level
    if part.kind == "resize":
        return f"{part.way}_blocks.{index}.{part.way}samplers.0"
    return f"{part.way}_blocks.{index}.{kind}.{part.number}"


def _block(ours: str, theirs: str, block: ResidualBlock) -> list[Rule]:
    pairs = {"norm_1": "norm1", "conv_1": "conv1", "modulation": "time_emb_proj", "norm_2": "norm2", "conv_2": "conv2"}
    if block.skip is not None:
        pairs["skip"] = "conv_shortcut"
    return [rule for a, b in pairs.items() for rule in layer(f"{ours}.{a}", f"{theirs}.{b}")]


def _attention(ours: str, theirs: str) -> list[Rule]:
    three = ("to_q", "to_k", "to_v")
    joint = [
        Rule(f"{ours}.qkv.{kind}", tuple(f"{theirs}.{name}.{kind}" for name in three), stacked)
        for kind in ("weight", "bias")
    ]
    return [*layer(f"{ours}.norm", f"{theirs}.group_norm"), *joint, *layer(f"{ours}.out", f"{theirs}.to_out.0")]
