"""Exact log-likelihood along the probability flow (instantaneous change of variables).

Along the flow `dx / dt = v(x, t)` the log-density of a moving point falls by the divergence of v,
`d log p_t(x_t) / dt = -div v(x_t, t)` (eq. 4.2.7; Chen et al. 2018). In the coordinates of
`undiffuse.solvers.flow`, `y = x / n(t)` at the angle theta,

    log p_0(x) = log p_T(x_T) + D log(n_T / n_0) + integral of div_y (dy / dtheta) dtheta.

An estimate of the divergence costs one product with the Jacobian and is integrated with the way, whose steps then also
resolve it. The exact one costs D products, so the way is found first and the divergence integrated along it, at a half
to a third as many places (`undiffuse.solvers.quadrature`). What its errors do to the result the way must then know by
itself: an error e of a step takes the point from one way of the flow to another, whose sum is `log p_t(y + e)`, so that
the result is wrong by `score . e` to first order; that too is kept to the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core import autodiff
from undiffuse.core.errors import ArgumentError, choose
from undiffuse.core.random import Streams, fresh_seed
from undiffuse.fields import Denoiser
from undiffuse.inference.encoding import check_event, first_scale, span
from undiffuse.solvers.adaptive import Tolerance, solve
from undiffuse.solvers.base import Bound, Cond, rows_of
from undiffuse.solvers.during import evaluating
from undiffuse.solvers.flow import Flow, norm_at, score_at
from undiffuse.solvers.pairs import PAIRS, Pair
from undiffuse.solvers.quadrature import integrate_along
from undiffuse.solvers.sampling import placed

Event = Float[Tensor, "b *event"]
PerSample = Float[Tensor, " b"]

# (angles (n,), states (n, D), which samples they are (n,)) -> slopes (n, D) and their divergences (n,)
Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Describe = Callable[[float], str]

# Numbers in one call for the divergence where the events are small: operations on fewer cost as much.
_NUMBERS = 4096

# The first step of a way from data, in radians: that share of their width as the score tells it, sqrt(D) / |score|,
# which has the right size for a Gaussian. Nothing in p is narrower than sin(theta).
_SHARE, _LEAST, _MOST = 0.03, 1e-5, 0.03


@dataclass(frozen=True)
class Exact:
    """All D terms of the trace: D products with the Jacobian wherever it is asked for."""

    exact = True

    def draws(self, size: int) -> int:
        """Number of directions that a sample of `size` numbers needs."""
        return 0

    def __call__(self, f: Callable[[Tensor], Tensor], y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        return autodiff.divergence(f, y)


@dataclass(frozen=True)
class Hutchinson:
    """`mean of u^T J u` over K directions, the same all along a sample's way (Grathwohl et al. 2019).

    Unbiased for the log-likelihood.

    Args:
        probes: K.
        kind: "rademacher" (signs), "gaussian" or "sphere".

    Raises:
        ArgumentError: probes < 1, an unknown kind.
    """

    exact = False
    probes: int = 1
    kind: str = "rademacher"

    def __post_init__(self):
        choose(self.kind, autodiff.PROBES, "probe")
        if self.probes < 1:
            raise ArgumentError(f"probes is {self.probes}: expected at least 1 random direction")

    def draws(self, size: int) -> int:
        return self.probes

    def __call__(self, f: Callable[[Tensor], Tensor], y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        return autodiff.trace_along(f, y, directions)


@dataclass(frozen=True)
class HutchPP:
    """Hutch++ (Meyer et al. 2021): the trace within the range of K sketched columns, Hutchinson's estimate outside.

    3 K products with the Jacobian per evaluation; unbiased, and exact where K reaches D.

    Args:
        probes: K; more than D is D.

    Raises:
        ArgumentError: probes < 1.
    """

    exact = False
    probes: int = 1
    kind: str = "rademacher"

    def __post_init__(self):
        Hutchinson(self.probes, self.kind)

    def draws(self, size: int) -> int:
        return 2 * min(self.probes, size)

    def __call__(self, f: Callable[[Tensor], Tensor], y: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        sketch, rest = directions.chunk(2)
        return autodiff.trace_by_sketch(f, y, sketch, rest)


DIVERGENCES: dict[str, Callable[[], Exact | Hutchinson | HutchPP]] = {
    "exact": Exact,
    "hutchinson": Hutchinson,
    "hutch++": HutchPP,
}


@dataclass(frozen=True)
class Likelihood:
    """What `log_likelihood` returns.

    Attributes:
        nats: log-density of each sample, (B,).
        nfe: evaluations of the model that each took, (B,), those for an exact divergence included.
        latent: where the flow carried each, (B, *event), at the path's t_max.
        seed: what makes the random directions again.
    """

    nats: PerSample
    nfe: Int[Tensor, " b"]
    latent: Event
    seed: object


def log_likelihood(
    denoiser: Denoiser,
    x: Event,
    *,
    divergence: str | Exact | Hutchinson | HutchPP = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int | Sequence[int] | Tensor | Streams | None = None,
    cond: Cond = None,
    method: str = "dopri5",
    batch: int = 256,
    prior: Callable[[Tensor], Tensor] | None = None,
    differentiable: bool = False,
) -> Likelihood:
    """Log-density of data under a model, in nats per sample, by the probability flow from data to noise.

    The density is that of `x_t / alpha(t)` at the model's `t_low`, which is t_min for exact denoisers. A sample's
    value does not depend on who shares its batch, but for the rounding of batched kernels: every sample has steps of
    its own, and random directions of its own stream.

    Args:
        denoiser: the model.
        x: data, floats (B, *event); the flow is solved in their type, so give float64 for tolerances below 1e-6.
        divergence: "exact", "hutchinson", "hutch++", or an object with more settings.
        rtol, atol: error allowed to a step: to the point (root mean square over coordinates, in units of
            `x / hypot(alpha, sigma)`) and to the log-density, each by itself. With an exact divergence a tenth of them
            (a twentieth to the point, whose error then is its length), so that the nats come out to about `D rtol`.
        seed: of the random directions, as of `sample`; None: a fresh one, found in the record. Streams are used as they
            are, a number is folded, so that it may be the one that dequantised the data.
        cond: the condition of each sample.
        method: "dopri5", "tsit5" or "bosh3".
        batch: samples at a time. With an exact divergence their accepted steps are kept (method's evaluations + 1
            states each), and it is taken at so many points at a time, more of them where D is below 16.
        prior: log-density of x_{t_max}; None: the path's own, a Gaussian. (A path whose alpha ends above 0, like VP,
            keeps a trace of the data: give an oracle's `perturbed(path, t_max).log_prob` for its exact law.)
        differentiable: keep the graph, for gradients towards x and the parameters; the memory of all steps.

    Raises:
        ArgumentError: x of a shape or type that the model does not take, an unknown divergence or method; a model that
            cannot be differentiated. SamplingError: the tolerance cannot be met.
    """
    rule = choose(divergence, DIVERGENCES, "divergence")() if isinstance(divergence, str) else divergence
    choose(method, PAIRS, "method")
    check_event(x, batch)
    seed = fresh_seed() if seed is None else seed
    # Folded: data that were dequantised by the same seed would meet directions made of the same numbers.
    streams = seed if isinstance(seed, Streams) else Streams.of(seed, len(x)).fold("divergence")
    if len(streams) != len(x):
        raise ArgumentError(f"seed holds {len(streams)} streams: expected one for each of {len(x)} samples")
    cond = placed(cond, len(x), x.device)
    share = 0.1 if rule.exact else 1.0
    tolerance = Tolerance(share * rtol, share * atol, length=rule.exact)
    settings = (rule, tolerance, method, prior)
    parts: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(len(x), device=x.device).split(batch):
        own = Streams(streams.keys.to(x.device)[rows], streams.draw)
        bound = Bound(denoiser, rows_of(cond, rows))
        if differentiable:
            parts.append(_likelihood(bound, x[rows], own, *settings))
        else:
            with evaluating(denoiser):
                parts.append(_likelihood(bound, x[rows], own, *settings))
    nats, nfe, latent = (torch.cat(column) for column in zip(*parts))
    return Likelihood(nats, nfe, latent, seed)


def _likelihood(
    bound: Bound,
    x: Event,
    streams: Streams,
    rule: Exact | Hutchinson | HutchPP,
    tolerance: Tolerance,
    method: str,
    prior: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = math.prod(x.shape[1:])
    way = Flow(bound, tuple(x.shape))
    draws = rule.draws(size)
    directions = x.new_empty(0, len(x), size)
    if draws:
        directions = autodiff.probe(
            getattr(rule, "kind", "rademacher"), (len(x), draws, size), streams, dtype=x.dtype, device=x.device
        )
        directions = directions.transpose(0, 1)

    start, end = span(bound)
    scale = first_scale(bound)
    y = (x * scale / norm_at(bound.path, start)).flatten(1)

    def divergence(theta: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rule(lambda z: way(theta, z, rows), y, directions[:, rows])

    settings = way.angle(start), way.angle(end), PAIRS[method], tolerance
    at, gained, nfe = (_after if rule.exact else _together)(way, divergence, y, settings, way.described(start, end))
    latent = (at * norm_at(bound.path, end)).reshape(x.shape)
    volume = size * math.log(scale * norm_at(bound.path, end) / norm_at(bound.path, start))
    log_prior = bound.path.prior_log_prob(latent) if prior is None else prior(latent)
    return log_prior + gained + volume, nfe, latent


def _together(
    way: Flow, divergence: Divergence, y: Tensor, settings: tuple[float, float, Pair, Tolerance], describe: Describe
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of the way, the integral along it, and evaluations, from one solve of both."""

    def slope(theta: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        value, trace = divergence(theta, state[:, :-1], rows)
        return torch.cat([value, trace[:, None]], 1)

    start, end, pair, tolerance = settings
    tolerance = replace(tolerance, parts=(y.shape[1], 1))
    both = solve(slope, torch.cat([y, y.new_zeros(len(y), 1)], 1), start, end, pair, tolerance, describe=describe)
    return both.y[:, :-1], both.y[:, -1], both.evals


def _after(
    way: Flow, divergence: Divergence, y: Tensor, settings: tuple[float, float, Pair, Tolerance], describe: Describe
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the way first: to half the tolerance, and no step's error may move log p by more than atol + D rtol."""
    start, end, pair, tolerance = settings
    allowed = tolerance.atol + tolerance.rtol * y.shape[1]
    half = replace(tolerance, rtol=0.5 * tolerance.rtol, atol=0.5 * tolerance.atol, steady=True)
    finer = replace(half, also=lambda theta, y, slope, miss: (score_at(theta, y, slope) * miss).sum(1).abs() / allowed)
    first = _first_step(way, y, start)
    found = solve(way, y, start, end, pair, finer, first=first, keep=True, describe=describe)
    assert found.track is not None  # keep=True
    at_once = max(len(y), _NUMBERS // y.shape[1])
    gained, asked = integrate_along(lambda *at: divergence(*at)[1], found.track, tolerance, at_once=at_once)
    return found.y, gained, found.evals + 1 + asked


def _first_step(way: Flow, y: Tensor, start: float) -> tuple[Tensor | None, Tensor]:
    """The slope at the start, if it had to be known, and the first step of a flow at rest, whose slope says nothing."""
    theta = torch.full(y.shape[:1], max(start, _LEAST), dtype=torch.float64, device=y.device)
    slope = way(theta, y, torch.arange(len(y), device=y.device))
    score = score_at(theta, y, slope).detach().double()
    width = (y.shape[1] / score.square().sum(1)).sqrt()
    return slope if start >= _LEAST else None, torch.maximum((_SHARE * width).clamp(max=_MOST), theta)


def bits_per_dim(nats: PerSample | float, event_size: int, levels: int = 256) -> PerSample | float:
    """`-log2 P(x) / D` of data with `levels` values per coordinate, from the log-density of its dequantised form.

    Value k is the bin `[2 k / levels - 1, 2 (k + 1) / levels - 1)` of [-1, 1], of volume `(2 / levels)^D`, and
    `P(x) >= E_u p(x + u) vol` with u uniform in the bin, so that `log2 P / D = nats / (D log 2) + 1 - log2(levels)`
    (Theis et al. 2016, eq. 5, by Jensen's inequality). For 256 levels 7 bits are added to `-nats / (D log 2)`.

    Args:
        nats: log-density of dequantised data scaled to [-1, 1].
        event_size: D.
        levels: values per coordinate; 256 for bytes.

    Raises:
        ArgumentError: event_size < 1, levels < 2.
    """
    if event_size < 1 or levels < 2:
        raise ArgumentError(f"event_size is {event_size}, levels {levels}: expected at least 1 and 2")
    return -nats / (event_size * math.log(2)) + math.log2(levels / 2)
