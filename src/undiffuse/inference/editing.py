"""Inpainting, colourisation and super-resolution by an unconditional model: the reverse process, with data imposed.

All three know an orthogonal projection of x_0 and impose it on the way (Song et al. 2021, section 5 and appendix I):
`Imputation`. In the result the known part is exact, and the rest is the model's. Its law is `p(x_0 | known)` only
approximately: the unknown part sees the data through the noise of its own time alone, so at large noise it commits
itself with little knowledge, and the error remains with an exact score and ever more steps (Trippe et al. 2023,
arXiv 2206.04119, section 3). It is exact where known and unknown parts are independent. `resample` lessens the error
at that many times the cost (Lugmayr et al. 2022, arXiv 2201.09865).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams, fresh_seed
from undiffuse.fields import Denoiser
from undiffuse.inference.encoding import check_event
from undiffuse.inference.known import BlockMeans, ChannelMix, Entries, Imputation, Known
from undiffuse.solvers import Solver, get_solver, sample
from undiffuse.solvers.base import Cond

Event = Float[Tensor, "b *event"]
Seed = int | Sequence[int] | Tensor | Streams | None


def inpaint(
    denoiser: Denoiser,
    image: Event,
    mask: Bool[Tensor, "..."],
    *,
    solver: str | Solver = "ddpm",
    steps: int = 200,
    resample: int = 1,
    cond: Cond = None,
    seed: Seed = None,
) -> Event:
    """Samples whose entries under the mask are those of `image`, bit for bit; the law of the rest is approximate.

    Args:
        denoiser: the model.
        image: (B, *event); only what is known is read. Repeat a row for several samples of it.
        mask: true where the image is known; of the shape of the image or of one event, its channel axis may be 1.
        solver, steps, cond: as of `ud.sample`. A solver that draws noise mends what earlier steps got wrong.
        resample: times that each step that ends in noise is made, at that many times the cost; see above.
        seed: an integer (row i uses stream i of it), one for each row, or streams. A row does not depend on others.

    Raises:
        ArgumentError: a mask of another shape or type, or with nothing known, or nothing to find, in some image; known
            entries that are not finite.
    """
    mask = _check_mask(mask, image)
    keep = Entries(mask)
    known = keep(image)
    check_event(known, 1)
    return _completed(denoiser, Known(keep, known), solver, steps, resample, cond, seed)


def colourise(
    denoiser: Denoiser,
    grey: Float[Tensor, "b one *space"],
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    *,
    solver: str | Solver = "ddpm",
    steps: int = 200,
    resample: int = 1,
    cond: Cond = None,
    seed: Seed = None,
) -> Float[Tensor, "b c *space"]:
    """Samples x with `sum_c weights_c x_c = grey` at each place; the law of the rest is approximate.

    Args:
        denoiser: a model of as many channels as there are weights.
        grey: (B, 1, *space), in the scale of the weighted sum.
        weights: of the channels; by default the mean of three.
        solver, steps, resample, cond, seed: as of `inpaint`.

    Raises:
        ArgumentError: grey that has not one channel or is not finite; fewer than two weights, or all 0.
    """
    check_event(grey, 1)
    if grey.ndim < 3 or grey.shape[1] != 1:
        raise ArgumentError(f"grey has shape {tuple(grey.shape)}: expected one channel, (B, 1, *space)")
    mix = ChannelMix(tuple(float(w) for w in weights))
    size = sum(w * w for w in mix.weights)
    if len(mix.weights) < 2 or not (math.isfinite(size) and size > 0):
        raise ArgumentError(f"weights are {list(mix.weights)}: expected one for each of 2 channels or more, not all 0")
    return _completed(denoiser, Known(mix, mix.lifted(grey)), solver, steps, resample, cond, seed)


def super_resolve(
    denoiser: Denoiser,
    small: Float[Tensor, "b c h w"],
    factor: int,
    *,
    solver: str | Solver = "ddpm",
    steps: int = 200,
    resample: int = 1,
    cond: Cond = None,
    seed: Seed = None,
) -> Float[Tensor, "b c large_h large_w"]:
    """Samples whose means over blocks of factor x factor pixels are `small`; the law of the rest is approximate.

    Args:
        denoiser: a model of images `factor` times as high and wide.
        small: (B, C, h, w).
        factor: a whole number of at least 2.
        solver, steps, resample, cond, seed: as of `inpaint`.

    Raises:
        ArgumentError: small that is no finite (B, C, h, w); a factor that is not a whole number of at least 2.
    """
    check_event(small, 1)
    if small.ndim != 4:
        raise ArgumentError(f"small has shape {tuple(small.shape)}: expected images (B, C, h, w)")
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
        raise ArgumentError(f"factor is {factor!r}: expected a whole number of at least 2")
    blocks = BlockMeans(factor)
    return _completed(denoiser, Known(blocks, blocks.lifted(small)), solver, steps, resample, cond, seed)


def _completed(
    denoiser: Denoiser, known: Known, solver: str | Solver, steps: int, resample: int, cond: Cond, seed: Seed
) -> Event:
    """A sample with that known part, from a start whose known part has its law given the data too."""
    if not isinstance(resample, int) or isinstance(resample, bool) or resample < 1:
        raise ArgumentError(f"resample is {resample!r}: expected how often each step is made, a whole number >= 1")
    chosen = stepwise(solver)
    value = known.value
    weight = next((p for p in denoiser.parameters() if p.is_floating_point()), value)
    value = value.to(weight.device, torch.promote_types(value.dtype, torch.float32))
    known = Known(known.project, value)
    streams = seed if isinstance(seed, Streams) else Streams.of(fresh_seed() if seed is None else seed, len(value))
    streams = Streams(streams.keys.to(value.device), streams.draw)
    z = Streams(streams.keys, streams.draw).normal(value.shape, dtype=value.dtype, device=value.device)
    end = torch.tensor(denoiser.path.t_max, dtype=torch.float64)
    start = torch.add(float(denoiser.path.alpha(end)) * value, z, alpha=float(denoiser.path.sigma(end)))
    imposed = Imputation(known, chosen, resample)
    x: Any = sample(denoiser, noise=start, solver=chosen, steps=steps, cond=cond, seed=streams, corrector=imposed)
    return known.put(x, value)


def stepwise(solver: str | Solver) -> Solver:
    """The solver, if something can be imposed between its steps.

    Raises:
        ArgumentError: an unknown name, or a solver that makes all steps at once (`Picard`, `Tuned`).
    """
    chosen = get_solver(solver)
    if chosen.at_once:
        raise ArgumentError(
            f"solver {type(chosen).__name__}: it makes all steps at once, and editing imposes what is known after "
            "each. Take one that goes step by step: ddpm (its noise mends what earlier steps got wrong), or dpmpp-2m"
        )
    return chosen


def _check_mask(mask: Tensor, image: Tensor) -> Bool[Tensor, "b ..."]:
    """The mask with a row for each image."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"mask is {given}: expected a boolean tensor, true where the image is known (mask > 0.5)")
    if not image.is_floating_point() or image.ndim < 2:
        raise ArgumentError(f"image is {image.dtype} of shape {tuple(image.shape)}: expected floats (B, *event)")
    rows = mask if mask.ndim == image.ndim else mask[None]
    one_channel = image.ndim > 2 and rows.ndim == image.ndim and rows.shape[1] == 1
    wanted = (image.shape[0], 1 if one_channel else image.shape[1], *image.shape[2:])
    if tuple(rows.shape) not in (wanted, (1, *wanted[1:])):
        raise ArgumentError(
            f"mask has shape {tuple(mask.shape)}: expected that of the image, {tuple(image.shape)}, or of one event, "
            f"{tuple(image.shape[1:])}; its channel axis may be 1"
        )
    known = rows.flatten(1).float().mean(1)
    for share, what, remedy in ((0.0, "empty", "draw with ud.sample"), (1.0, "full", "nothing is left to find")):
        if bool((known == share).any()):
            raise ArgumentError(f"mask is {what} in image {int((known == share).nonzero()[0, 0])}: {remedy}")
    return rows.to(image.device)
