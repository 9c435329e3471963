"""Tweedie's formulas: what the score, and a denoiser's Jacobian, say of x_0 given `x_t = alpha x_0 + sigma eps`.

With `D(x) = E[x_0 | x_t = x] = (x + sigma^2 grad log p_t(x)) / alpha` the second one,
`Cov[x_0 | x_t] = (sigma^2 / alpha^2) (I + sigma^2 Hess log p_t(x_t))`, is one product with a Jacobian away:

    Cov[x_0 | x_t] = (sigma^2 / alpha) dD/dx_t.

For an exact denoiser that Jacobian is symmetric and has no negative eigenvalue; for a network it need not be either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.autodiff import jvp, probe
from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.fields.denoiser import Cond, Denoiser, Event, Time
from undiffuse.paths import Path

Map = Callable[[Tensor], Tensor]

# Low-rank: width of the space in blocks of r, and restarts at most. It stops at a residual of eps^(2/3) of the largest
# eigenvalue: above the rounding of a network, and its square is what eigenvalues are off by.
_WIDTH, _RESTARTS = 5, 300


def scales_with_signal(path: Path, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at t.

    Raises:
        ArgumentError: a time off the path, or where alpha = 0.
    """
    time = as_time(t, like)
    path.check_time(time)
    alpha, sigma = path.alpha(time), path.sigma(time)
    if bool((alpha == 0).any()):
        where = float(time.expand(alpha.shape)[alpha == 0].flatten()[0])
        raise ArgumentError(
            f"alpha = 0 at t = {where:g} of {path}: x_t holds no signal there, so its density says nothing of x_0 and "
            "Tweedie's formula divides by 0; take an earlier time"
        )
    return alpha, sigma


def posterior_mean(score: Event, x_t: Event, path: Path, t: Time) -> Event:
    """`E[x_0 | x_t] = (x_t + sigma^2 s) / alpha`, s the score of p_t at x_t (eq. 3.3.6).

    Raises:
        ArgumentError: a time off the path, or where alpha = 0.
    """
    alpha, sigma = scales_with_signal(path, t, x_t)
    return (x_t + pad_to(sigma.square(), x_t) * score) / pad_to(alpha, x_t)


def covariance_product(denoiser: Denoiser, x_t: Event, t: Time, v: Event, cond: Cond = None) -> Event:
    """`Cov[x_0 | x_t] v = (sigma^2 / alpha) (dD/dx_t) v`: about two evaluations of the denoiser; 0 where sigma = 0.

    Keeps its graph where gradients are enabled. A network's Jacobian J is taken as it is, not made symmetric.

    Raises:
        ArgumentError: a time off the path, or where alpha = 0.
    """
    scale = _scale(denoiser, x_t, t)
    return _scaled(scale, jvp(lambda y: denoiser(y, t, cond), x_t, v)[1])


def _scale(denoiser: Denoiser, x_t: Tensor, t: Time) -> Tensor:
    """`sigma^2 / alpha`, ready to multiply x_t."""
    alpha, sigma = scales_with_signal(denoiser.path, t, x_t)
    return pad_to(sigma.square() / alpha, x_t)


def _scaled(scale: Tensor, v: Tensor) -> Tensor:
    # A denoiser of points has no derivative at sigma = 0, and none is needed.
    return torch.where(scale == 0, torch.zeros_like(v), scale * v)


def _transposed(denoiser: Denoiser, x_t: Tensor, t: Time, cond: Cond) -> Map:
    """`u -> J^T u`, callable many times on the one evaluation made here; records nothing."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        value = denoiser(x, t, cond)

    def pull(u: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(x)
        (pulled,) = torch.autograd.grad(value, x, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if pulled is None else pulled

    return pull


def _units(x: Tensor) -> Tensor:
    """The unit directions of an event, (D, *event)."""
    size = math.prod(x.shape[1:])
    return torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape[1:])


def covariance_matrix(denoiser: Denoiser, x_t: Event, t: Time, cond: Cond = None) -> Float[Tensor, "b d d"]:
    """`Cov[x_0 | x_t]` of the flattened event by D products, made symmetric: `(sigma^2 / alpha) (J + J^T) / 2`.

    Records no gradients. Memory B D^2.

    Raises:
        ArgumentError: a time off the path, or where alpha = 0.
    """
    scale, pull = _scale(denoiser, x_t, t), _transposed(denoiser, x_t, t, cond)
    rows = torch.stack([_scaled(scale, pull(unit.expand(x_t.shape))).flatten(1) for unit in _units(x_t)], 1)
    return 0.5 * (rows + rows.mT)


def covariance_diagonal(
    denoiser: Denoiser,
    x_t: Event,
    t: Time,
    *,
    probes: int | None = None,
    cond: Cond = None,
    generator: Generator = None,
) -> Event:
    """The variances `Cov[x_0 | x_t]_ii`, of the shape of x_t. Records no gradients.

    Args:
        probes: None: exact, by D products. K: the mean of `u * (C u)` over K random sign vectors u, unbiased, with
            variance `sum_{j != i} C_ij^2 / K` (Bekas, Kokiopoulou and Saad 2007).

    Raises:
        ArgumentError: fewer than one probe; a time off the path, or where alpha = 0.
    """
    if probes is not None and probes < 1:
        raise ArgumentError(f"probes is {probes}: expected at least 1 random direction, or None for the exact diagonal")
    scale, pull = _scale(denoiser, x_t, t), _transposed(denoiser, x_t, t, cond)
    total = torch.zeros_like(x_t)
    if probes is None:
        for unit in _units(x_t):
            total = total + unit * pull(unit.expand(x_t.shape))
        return _scaled(scale, total)
    for _ in range(probes):
        u = probe("rademacher", x_t.shape, generator, dtype=x_t.dtype, device=x_t.device)
        total = total + u * pull(u)
    return _scaled(scale, total / probes)


def covariance_eigenpairs(
    denoiser: Denoiser, x_t: Event, t: Time, rank: int, *, cond: Cond = None, generator: Generator = None
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r *event"]]:
    """The r largest eigenvalues of `Cov[x_0 | x_t]`, falling, and their unit vectors: by products only.

    Of the symmetric part of the Jacobian: one product is a forward and a reverse pass. A block Krylov space of at most
    5 r directions, restarted (Rayleigh-Ritz) until the residual is eps^(2/3) of the largest eigenvalue; where that is
    not reached in 300 restarts a warning says what is left. Memory O(B D r). Records no gradients.

    Raises:
        ArgumentError: a rank outside 1 ... D; a time off the path, or where alpha = 0.
    """
    batch, size = x_t.shape[0], math.prod(x_t.shape[1:])
    if not 1 <= rank <= size:
        raise ArgumentError(f"rank is {rank}: expected 1 to {size}, the size of an event")
    scale = _scale(denoiser, x_t, t)
    with torch.no_grad():
        pull = _transposed(denoiser, x_t, t, cond)

        def product(block: Tensor) -> Tensor:
            """(B, D, K) to the same."""
            columns = [column.reshape(x_t.shape) for column in block.unbind(2)]
            images = [_scaled(scale, 0.5 * (pull(v) + jvp(lambda y: denoiser(y, t, cond), x_t, v)[1])) for v in columns]
            return torch.stack([image.flatten(1) for image in images], 2)

        start = random.normal((batch, size, rank), generator, dtype=x_t.dtype, device=x_t.device)
        values, vectors = _top_eigenpairs(product, torch.linalg.qr(start).Q)
    return values, vectors.mT.reshape(batch, rank, *x_t.shape[1:])


def _top_eigenpairs(product: Map, x: Tensor) -> tuple[Tensor, Tensor]:
    """Restarted block Krylov iteration for symmetric maps, from orthonormal blocks (B, D, r); each row stops alone.

    A restart keeps the r best directions and the r they came from, as conjugate gradients do (Knyazev 2001).
    """
    size, rank = x.shape[1:]
    done = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    values, residual = x.new_zeros(x.shape[0], rank), x.new_zeros(x.shape[0])
    basis = x
    images = newest = product(x)
    for _ in range(_RESTARTS):
        while basis.shape[2] < min(size, _WIDTH * rank):
            block = _orthonormal(newest[:, :, : size - basis.shape[2]], basis)
            newest = product(block)
            basis, images = torch.cat([basis, block], 2), torch.cat([images, newest], 2)
        small = basis.mT @ images
        found, mixing = torch.linalg.eigh(0.5 * (small + small.mT))
        found, mixing = found.flip(1)[:, :rank], mixing.flip(2)[:, :, :rank]
        newest = images @ mixing
        error = (newest - basis @ (mixing * found[:, None])).norm(dim=1).amax(1)
        values, x = torch.where(done[:, None], values, found), torch.where(done[:, None, None], x, basis @ mixing)
        residual = torch.where(done, residual, error)
        done = done | (residual <= torch.finfo(x.dtype).eps ** (2 / 3) * found.abs().amax(1))
        if basis.shape[2] == size or bool(done.all()):
            return values, x
        previous = torch.eye(basis.shape[2], rank, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        kept = torch.linalg.qr(torch.cat([mixing, previous], 2)).Q
        basis, images = basis @ kept, images @ kept
    warnings.warn(
        f"low-rank covariance: after {_RESTARTS} restarts the residual is up to {float(residual.max()):.2g} in "
        f"{int((~done).sum())} of {len(done)} samples; it bounds the error of their eigenvalues (a crowded spectrum?)",
        stacklevel=3,
    )
    return values, x


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """The block's directions that the basis lacks; where it lacks none, any others."""
    # Once removes the known part, twice the rounding of it, and the third serves blocks that were all rounding.
    for _ in range(3):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block


Form = Literal["full", "diagonal", "low-rank"]


def posterior_covariance(
    denoiser: Denoiser,
    x_t: Event,
    t: Time,
    *,
    form: Form = "full",
    rank: int | None = None,
    cond: Cond = None,
    generator: Generator = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`Cov[x_0 | x_t] = (sigma^2 / alpha) dD/dx_t` in one of three forms; 0 where sigma = 0.

    Args:
        form: "full": (B, D, D), `covariance_matrix`. "diagonal": (B, *event), `covariance_diagonal`. "low-rank":
            (values (B, r), vectors (B, r, *event)), `covariance_eigenpairs`.
        rank: r, for "low-rank" only.
        generator: for the start of "low-rank".

    Raises:
        ArgumentError: an unknown form; a rank missing, or given without need; a time off the path, or where alpha = 0.
    """
    if (choose(form, _FORMS, "form of the covariance") == "low-rank") != (rank is not None):
        raise ArgumentError(f"form is '{form}', rank {rank}: expected a rank for 'low-rank', and for it alone")
    if rank is not None:
        return covariance_eigenpairs(denoiser, x_t, t, rank, cond=cond, generator=generator)
    if form == "diagonal":
        return covariance_diagonal(denoiser, x_t, t, cond=cond)
    return covariance_matrix(denoiser, x_t, t, cond)


_FORMS: dict[str, str] = {name: name for name in ("full", "diagonal", "low-rank")}
