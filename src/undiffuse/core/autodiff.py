"""Derivatives of maps `f: (B, *event) -> (B, *event)` that act on each sample alone: products with their Jacobian,
their divergence, and random directions to estimate it with.

Everything here can be differentiated again, towards the parameters inside `f`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Generator

Event = Float[Tensor, "b *event"]
Map = Callable[[Tensor], Tensor]
Mode = Literal["auto", "forward", "reverse"]
MODES: dict[str, Mode] = {"auto": "auto", "forward": "forward", "reverse": "reverse"}


def gradient(f: Callable[[Tensor], Tensor], x: Event) -> tuple[Float[Tensor, " b"], Event]:
    """`(f(x), grad f(x))` of a function with one number per sample; keeps the graph where gradients are enabled.

    Raises:
        ArgumentError: f returned another shape than (B,).
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = _leaf(x)
        value = f(x)
        if value.shape != x.shape[:1]:
            raise ArgumentError(
                f"the energy returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}: expected one number "
                f"per sample, ({x.shape[0]},)"
            )
        # Some backward formulas have a forward rule only where they are recorded themselves.
        recorded = keep or forward_ad.unpack_dual(x).tangent is not None
        slope = _pull(value.sum(), x, None, recorded)
    return (value if keep else value.detach()), slope


def _leaf(x: Tensor) -> Tensor:
    """x as a tensor that gradients reach, with the tangent that it carries: `detach` would drop that."""
    if x.requires_grad:
        return x
    primal, tangent = forward_ad.unpack_dual(x)
    leaf = primal.detach().requires_grad_()
    return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)


def _pull(value: Tensor, x: Tensor, u: Tensor | None, create_graph: bool, retain_graph: bool | None = None) -> Tensor:
    """`u^T dvalue/dx`; zero where value does not depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(
        value, x, u, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )[0]


def jvp(f: Map, x: Event, v: Event, mode: Mode = "auto") -> tuple[Event, Event]:
    """`(f(x), J v)`, J the Jacobian of f at x.

    Args:
        mode: "forward" takes about one more evaluation of f; "reverse" two backward passes, for operations without a
            forward rule; "auto" is forward, and reverse where torch has no such rule.

    Raises:
        NotImplementedError: mode is "forward" and an operation inside f has no forward rule.
    """
    if choose(mode, MODES, "differentiation mode") != "reverse":
        try:
            with forward_ad.dual_level():
                value, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
            return value, torch.zeros_like(value) if tangent is None else tangent
        except (NotImplementedError, RuntimeError) as error:
            if mode == "forward" or not _no_forward_rule(error):
                raise
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = _leaf(x)
        value = f(x)
        # J v is the derivative of u^T J towards u, at any u (Townsend's trick).
        u = torch.zeros_like(value).requires_grad_()
        pushed = _pull(_pull(value, x, u, True), u, v, keep, keep)
    return (value, pushed) if keep else (value.detach(), pushed)


def _no_forward_rule(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) or "forward AD" in str(error) or "jvp" in str(error)


def quadratic_form(f: Map, x: Event, v: Event, mode: Mode = "auto") -> tuple[Event, Float[Tensor, " b"]]:
    """`(f(x), v^T J v)` for one direction per sample.

    "reverse" goes back once and keeps the activations of f for it; "forward" keeps none. "auto" is "reverse": it took
    0.4 to 0.9 of the time of "forward" on two CPU cores, with and without gradients, for networks and energies.
    """
    if choose(mode, MODES, "differentiation mode") == "forward":
        value, pushed = jvp(f, x, v, "forward")
        return value, _dot(v, pushed)
    value, pull = _pullback(f, x)
    return value, _dot(pull(v), v)


def _pullback(f: Map, x: Event) -> tuple[Event, Map]:
    """f(x), and the function `u -> u^T J`, which can be called many times."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = _leaf(x)
        value = f(x)

    return (value if keep else value.detach()), lambda u: _pull(value, x, u, keep, True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def divergence(f: Map, x: Event, mode: Mode = "auto") -> tuple[Event, Float[Tensor, " b"]]:
    """`(f(x), tr J)`, exactly: D products of the Jacobian, D the size of an event.

    Without gradients the memory is that of a few evaluations of f, whatever D. "reverse" evaluates f once and goes
    back D times; "forward" evaluates f D times with a tangent and keeps no activations. "auto" is "reverse", the
    faster one wherever measured (see `quadratic_form`).
    """
    choose(mode, MODES, "differentiation mode")
    size = math.prod(x.shape[1:])
    if mode == "forward":
        value, total = x, x.new_zeros(x.shape[0])
        for i in range(size):
            value, pushed = jvp(f, x, _unit(x, i), "forward")
            total = total + pushed.flatten(1)[:, i]
        return value, total
    value, pull = _pullback(f, x)
    total = x.new_zeros(x.shape[0])
    for i in range(size):
        total = total + pull(_unit(x, i)).flatten(1)[:, i]
    return value, total


def _unit(x: Tensor, i: int) -> Tensor:
    unit = torch.zeros_like(x)
    unit.view(x.shape[0], -1)[:, i] = 1
    return unit


def _rademacher(shape, generator, dtype, device):
    return random.uniform(shape, generator, dtype=dtype, device=device).sub_(0.5).sign_()


def _gaussian(shape, generator, dtype, device):
    return random.normal(shape, generator, dtype=dtype, device=device)


def _sphere(shape, generator, dtype, device):
    z = random.normal(shape, generator, dtype=dtype, device=device)
    length = z.flatten(1).norm(dim=1).reshape(-1, *[1] * (z.ndim - 1))
    return z * (math.sqrt(math.prod(shape[1:])) / length)


PROBES: dict[str, Callable[..., Tensor]] = {"rademacher": _rademacher, "gaussian": _gaussian, "sphere": _sphere}


def probe(kind: str, shape: Sequence[int], generator: Generator = None, *, dtype=torch.float32, device=None) -> Tensor:
    """Random directions u of shape (B, *event) with `E[u u^T] = I`: signs, normals, or points of the sphere of
    radius sqrt(D).

    With S the symmetric part of A, the variance of `u^T A u` is `2 (|S|^2 - sum_i S_ii^2)` for signs, `2 |S|^2` for
    normals, and `2 (D |S|^2 - tr(S)^2) / (D + 2)` on the sphere.

    Raises:
        ArgumentError: unknown kind; the nearest is offered.
    """
    return choose(kind, PROBES, "probe")(tuple(shape), generator, dtype, device)


def hutchinson(
    f: Map, x: Event, *, probes: int = 1, kind: str = "rademacher", generator: Generator = None, mode: Mode = "auto"
) -> tuple[Event, Float[Tensor, " b"]]:
    """`(f(x), mean of u^T J u over K probes)`: an unbiased estimate of the divergence (Hutchinson 1989).

    Raises:
        ArgumentError: fewer than one probe.
    """
    if probes < 1:
        raise ArgumentError(f"probes is {probes}: expected at least 1 random direction")
    directions = [probe(kind, x.shape, generator, dtype=x.dtype, device=x.device) for _ in range(probes)]
    return trace_along(f, x, torch.stack(directions), mode)


def trace_along(
    f: Map, x: Event, directions: Float[Tensor, "k b *event"], mode: Mode = "auto"
) -> tuple[Event, Float[Tensor, " b"]]:
    """`(f(x), mean over k of u_k^T J u_k)` along given directions, from one evaluation of f where mode is not
    "forward"."""
    if choose(mode, MODES, "differentiation mode") == "forward":
        value, total = x, x.new_zeros(x.shape[0])
        for u in directions:
            value, form = quadratic_form(f, x, u, mode)
            total = total + form
        return value, total / len(directions)
    value, pull = _pullback(f, x)
    return value, torch.stack([_dot(pull(u), u) for u in directions]).mean(0)


def trace_by_sketch(
    f: Map, x: Event, sketch: Float[Tensor, "k b *event"], directions: Float[Tensor, "m b *event"]
) -> tuple[Event, Float[Tensor, " b"]]:
    """`(f(x), tr(Q^T J Q) + mean over m of v^T J v)`, Q a basis of the columns `J^T S`, v a direction without its part
    in Q: Hutch++ (Meyer et al. 2021). 2 k + m products with J^T; unbiased, and exact where J has rank <= k.

    Args:
        sketch: S, k <= D random directions.
        directions: m more.
    """
    value, pull = _pullback(f, x)
    # The basis is a constant to gradients: the estimate is unbiased for any, and the QR of columns that depend on each
    # other has none.
    columns = torch.stack([pull(u).detach().flatten(1) for u in sketch], 2)
    basis = torch.linalg.qr(columns)[0]
    total = x.new_zeros(x.shape[0])
    for j in range(basis.shape[2]):
        u = basis[:, :, j].reshape(x.shape)
        total = total + _dot(pull(u), u)
    rest = []
    for u in directions:
        flat = u.flatten(1)
        v = (flat - torch.einsum("bdk,bek,be->bd", basis, basis, flat)).reshape(x.shape)
        rest.append(_dot(pull(v), v))
    return value, total + torch.stack(rest).mean(0)
