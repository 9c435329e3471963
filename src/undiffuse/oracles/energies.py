"""Energies whose partition function is known: laws read as energies, and the test problems of samplers."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.fields.energy import Energy
from undiffuse.oracles.law import Cond, Event, Law


class KnownEnergy(Energy):
    """An energy with a known normaliser: `p(x) = exp(-E(x) - log_z)` on events of shape `event`, sampled exactly.

    It computes in the dtype of x; samples are of the dtype and on the device of the module, which `.to` changes.
    """

    event: tuple[int, ...]
    place: Tensor

    def __init__(self, event: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | None = None):
        super().__init__()
        self.event = event
        self.register_buffer("place", torch.zeros((), dtype=dtype, device=device), persistent=False)

    @property
    @abstractmethod
    def log_z(self) -> float:
        """`log of the integral of exp(-E)`, nats."""

    @abstractmethod
    def sample(self, n: int, generator: Generator = None) -> Event:
        """`n` exact draws, (n, *event)."""

    def log_prob(self, x: Event, cond: Cond = None) -> Float[Tensor, " b"]:
        """`-E(x) - log_z`, nats."""
        return -self(x, cond) - self.log_z

    def check(self, x: Tensor, cond: Cond) -> None:
        """Raise on an event of another shape, and on a condition: these energies have none."""
        if not x.is_floating_point() or x.ndim == 0 or tuple(x.shape[1:]) != self.event:
            raise ArgumentError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)} and dtype {x.dtype}: expected floats of shape "
                f"(B, {', '.join(map(str, self.event))})"
            )
        if cond is not None:
            raise ArgumentError(f"{type(self).__name__} has no labels: cond must be None, given {type(cond).__name__}")

    def normal(self, n: int, generator: Generator) -> Event:
        """Standard normals of n events, to make samples of."""
        return random.normal((n, *self.event), generator, dtype=self.place.dtype, device=self.place.device)


class LawEnergy(Energy):
    """`E(x) = -log p(x)` of a law, in nats: `log_z = 0`, and the score is the law's own closed form."""

    log_z = 0.0

    def __init__(self, law: Law):
        super().__init__()
        self.law = law

    @property
    def event(self) -> tuple[int, ...]:
        return self.law.event

    def forward(self, x: Event, cond: Cond = None) -> Float[Tensor, " b"]:
        return -self.law.log_prob(x, cond)

    def score(self, x: Event, cond: Cond = None) -> Event:
        return self.law.score(x, cond)

    def energy_and_score(self, x: Event, cond: Cond = None) -> tuple[Float[Tensor, " b"], Event]:
        return self(x, cond), self.score(x, cond)

    def log_prob(self, x: Event, cond: Cond = None) -> Float[Tensor, " b"]:
        """`log p(x)`, nats."""
        return self.law.log_prob(x, cond)

    def sample(self, n: int, generator: Generator = None) -> Event:
        """`n` draws of the law, (n, *event)."""
        return self.law.sample(n, generator)


class Ring(KnownEnergy):
    """`E(x) = ((|x| - r) / w)^2 / 2` on the plane, a ridge of width w along the circle of radius r.

    With `rho = |x|`, `Z = 2 pi int_0^inf rho exp(-(rho - r)^2 / (2 w^2)) d rho`, that is
    `2 pi (w^2 exp(-a^2 / 2) + r w sqrt(pi / 2) (1 + erf(a / sqrt 2)))` with `a = r / w`.
    The score is 0 at the origin, where the energy has a kink.

    Raises:
        ArgumentError: radius < 0 or width <= 0; at the call, x of another shape than (B, 2), or a condition.
    """

    def __init__(self, radius: float = 1.0, width: float = 0.1):
        super().__init__((2,))
        if not (radius >= 0 and width > 0):
            raise ArgumentError(f"Ring: radius {radius}, width {width}: expected radius >= 0 and width > 0")
        self.radius, self.width = float(radius), float(width)

    @property
    def log_z(self) -> float:
        a = self.radius / self.width
        mass = math.exp(-(a**2) / 2) + a * math.sqrt(math.pi / 2) * (1 + math.erf(a / math.sqrt(2)))
        return math.log(2 * math.pi * self.width**2 * mass)

    def forward(self, x: Float[Tensor, "b 2"], cond: Cond = None) -> Float[Tensor, " b"]:
        return self.energy_and_score(x, cond)[0]

    def energy_and_score(self, x, cond=None):
        self.check(x, cond)
        rho = torch.linalg.vector_norm(x, dim=1)
        off = (rho - self.radius) / self.width
        # At the origin a division by 1 instead of 0: the direction x / rho is then 0, as is its derivative.
        unit = x / torch.where(rho == 0, torch.ones_like(rho), rho)[:, None]
        return off.square() / 2, -(off / self.width)[:, None] * unit

    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n 2"]:
        """`n` draws: rho by bisection of its distribution function to the last bit, a uniform angle."""
        u = random.uniform((n, 2), generator, dtype=torch.float64, device=self.place.device)
        angle = 2 * math.pi * u[:, 1]
        low = torch.full_like(angle, max(0.0, self.radius - 40 * self.width))
        high = torch.full_like(angle, self.radius + 40 * self.width)
        mass = u[:, 0] * math.exp(self.log_z)
        for _ in range(64):
            middle = (low + high) / 2
            below = self._mass_within(middle) < mass
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (high[:, None] * torch.stack([angle.cos(), angle.sin()], 1)).to(self.place.dtype)

    def _mass_within(self, rho: Tensor) -> Tensor:
        """`2 pi int_0^rho s exp(-(s - r)^2 / (2 w^2)) ds`."""
        a, off = self.radius / self.width, (rho - self.radius) / self.width
        between = torch.erf(off / math.sqrt(2)) + math.erf(a / math.sqrt(2))
        ends = math.exp(-(a**2) / 2) - torch.exp(-off.square() / 2)
        return 2 * math.pi * self.width**2 * (ends + a * math.sqrt(math.pi / 2) * between)


class Funnel(KnownEnergy):
    """`v = x_1 ~ N(0, scale^2)`, `x_2 ... x_D | v ~ N(0, e^v)` (Neal 2003, section 8), up to its normaliser:

    `E(x) = v^2 / (2 scale^2) + e^{-v} (x_2^2 + ... + x_D^2) / 2 + (D - 1) v / 2`, `log_z = D/2 log(2 pi) + log scale`.

    Below `v = -15 scale`, a region of probability 4e-51, `e^{-v}` goes on along its tangent, so that energy and score
    stay finite far out.

    Args:
        dim: D.
        scale: standard deviation of v; 3 is Neal's.

    Raises:
        ArgumentError: dim < 2 or scale <= 0; at the call, x of another shape than (B, D), or a condition.
    """

    def __init__(self, dim: int = 10, scale: float = 3.0):
        super().__init__((dim,))
        if dim < 2 or not scale > 0:
            raise ArgumentError(f"Funnel: dim {dim}, scale {scale}: expected at least 2 dimensions and scale > 0")
        self.dim, self.scale = dim, float(scale)

    @property
    def log_z(self) -> float:
        return self.dim / 2 * math.log(2 * math.pi) + math.log(self.scale)

    def forward(self, x: Float[Tensor, "b d"], cond: Cond = None) -> Float[Tensor, " b"]:
        self.check(x, cond)
        v, rest = x[:, 0], x[:, 1:]
        kept = v.clamp(min=-15 * self.scale)
        precision = torch.exp(-kept) * (1 + (kept - v))
        spread = v.square() / (2 * self.scale**2) + (self.dim - 1) / 2 * v
        return spread + (rest.square() * precision[:, None]).sum(1) / 2

    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n d"]:
        z = self.normal(n, generator)
        v = self.scale * z[:, :1]
        return torch.cat([v, torch.exp(v / 2) * z[:, 1:]], 1)


class Rosenbrock(KnownEnergy):
    """The hybrid Rosenbrock density (Pagani, Wiegand and Nadarajah 2022): `blocks` chains that share x_1,

    `E(x) = a (x_1 - mu)^2 + sum_j sum_i b (x_{j,i} - x_{j,i-1}^2)^2`, `i = 2 ... length`, `x_{j,1} = x_1`.

    `D = blocks (length - 1) + 1`, in the order x_1, block 1, block 2, ...; `Z = pi^{D/2} a^{-1/2} b^{-(D-1)/2}`.
    The defaults are the banana on the plane, `((1 - x_1)^2 + 100 (x_2 - x_1^2)^2) / 20`.

    Raises:
        ArgumentError: blocks < 1, length < 2, a or b <= 0; at the call, x of another shape than (B, D), or a condition.
    """

    def __init__(self, blocks: int = 1, length: int = 2, *, mu: float = 1.0, a: float = 0.05, b: float = 5.0):
        if blocks < 1 or length < 2 or not (a > 0 and b > 0):
            raise ArgumentError(
                f"Rosenbrock: blocks {blocks}, length {length}, a {a}, b {b}: expected blocks >= 1, length >= 2, "
                f"a > 0 and b > 0"
            )
        super().__init__((blocks * (length - 1) + 1,))
        self.blocks, self.length = blocks, length
        self.mu, self.a, self.b = float(mu), float(a), float(b)

    @property
    def log_z(self) -> float:
        steps = self.event[0] - 1
        return (self.event[0] * math.log(math.pi) - math.log(self.a) - steps * math.log(self.b)) / 2

    def forward(self, x: Float[Tensor, "b d"], cond: Cond = None) -> Float[Tensor, " b"]:
        self.check(x, cond)
        chains = x[:, 1:].reshape(-1, self.blocks, self.length - 1)
        before = torch.cat([x[:, :1, None].expand(-1, self.blocks, 1), chains[:, :, :-1]], 2)
        bends = (chains - before.square()).square().sum((1, 2))
        return self.a * (x[:, 0] - self.mu).square() + self.b * bends

    def sample(self, n: int, generator: Generator = None) -> Float[Tensor, "n d"]:
        z = self.normal(n, generator)
        first = self.mu + z[:, :1] / math.sqrt(2 * self.a)
        steps = z[:, 1:].reshape(n, self.blocks, self.length - 1) / math.sqrt(2 * self.b)
        chain, now = [], first.expand(n, self.blocks)
        for i in range(self.length - 1):
            now = now.square() + steps[:, :, i]
            chain.append(now)
        return torch.cat([first, torch.stack(chain, 2).reshape(n, -1)], 1)
