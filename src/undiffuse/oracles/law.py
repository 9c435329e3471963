"""`Law`: a data distribution whose every noisy marginal, denoiser and posterior is in closed form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.core.shapes import as_time
from undiffuse.fields import Denoiser
from undiffuse.paths import Path

Event = Float[Tensor, "b *event"]
Cond = Tensor | dict[str, Tensor] | None
Time = Float[Tensor, ""] | Float[Tensor, " b"] | float


class Law(nn.Module):
    """A distribution of x_0 on events of shape `event` (flattened size D).

    A subclass gives `posterior_means`, from which score and denoiser follow, and the methods marked abstract. Its
    tensors are buffers, so `.to(device, dtype)` moves it. It computes in the wider of its own dtype and that
    of x, and answers in the dtype of x.
    """

    event: tuple[int, ...]
    dtype: torch.dtype
    smooth: ClassVar[bool] = False  # whether it surely has a density, and so a score at sigma = 0 too

    # ------------------------------------------------------------------ what a subclass gives

    @abstractmethod
    def posterior_means(
        self, x: Float[Tensor, "b d"], alpha: Tensor, sigma: Tensor, cond: Cond
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """`(E[x_0 | x], -grad log p(x))` for `x = alpha x_0 + sigma eps`, nothing divided by sigma or alpha.

        alpha and sigma have shape () or (B, 1).
        """

    @abstractmethod
    def flat_log_prob(self, x: Float[Tensor, "b d"], alpha: Tensor, sigma: Tensor, cond: Cond) -> Float[Tensor, " b"]:
        """Log-density of `alpha x_0 + sigma eps`, nats; alpha and sigma as above."""

    @abstractmethod
    def sample(self, n: int, generator: Generator = None) -> Event:
        """`n` draws, shape (n, *event)."""

    @abstractmethod
    def scaled(self, alpha: Tensor, sigma: Tensor) -> Self:
        """The law of `alpha x_0 + sigma eps`, for scalars alpha and sigma."""

    @abstractmethod
    def flat_posterior_covariance(
        self, x: Float[Tensor, "b d"], alpha: Tensor, sigma: Tensor, cond: Cond
    ) -> Float[Tensor, "b d d"]:
        """`Cov[x_0 | x]`, alpha and sigma as in `posterior_means`."""

    # ------------------------------------------------------------------ what follows

    def log_prob(self, x: Event, cond: Cond = None) -> Float[Tensor, " b"]:
        """Log-density in nats, shape (B,).

        Raises:
            ArgumentError: x of another event shape; a law without a density.
        """
        flat = self.flat(x)
        return self.flat_log_prob(flat, flat.new_ones(()), flat.new_zeros(()), cond).to(x.dtype)

    def log_prob_at(self, x_t: Event, path: Path, t: Time, cond: Cond = None) -> Float[Tensor, " b"]:
        """Log-density of x_t in nats, as `perturbed(path, t).log_prob`: for a time of each row, differentiable in t.

        Raises:
            ArgumentError: x of another event shape, a time outside the path, or a law without a density there.
        """
        flat = self.flat(x_t)
        return self.flat_log_prob(flat, *scales_of(path, t, flat), cond).to(x_t.dtype)

    def score(self, x: Event, cond: Cond = None) -> Event:
        """`grad log p(x)`."""
        flat = self.flat(x)
        one, zero = flat.new_ones(()), flat.new_zeros(())
        return -self.posterior_means(flat, one, zero, cond)[1].to(x.dtype).reshape(x.shape)

    def perturbed(self, path: Path, t: float | Float[Tensor, ""]) -> Self:
        """The law of x_t, of the same class: its `log_prob` is the log-density at time t.

        Raises:
            ArgumentError: t outside the path.
        """
        time = torch.as_tensor(t, dtype=torch.float64)
        path.check_time(time)
        return self.scaled(path.alpha(time), path.sigma(time))

    def denoiser(self, path: Path) -> LawDenoiser:
        """The exact `E[x_0 | x_t]` on a path."""
        return LawDenoiser(self, path)

    def posterior_covariance(self, x_t: Event, path: Path, t: Time, cond: Cond = None) -> Float[Tensor, "b d d"]:
        """`Cov[x_0 | x_t]` of the flattened event, by second-order Tweedie

        `(sigma^2 / alpha^2)(I + sigma^2 Hess log p_t(x_t))`, without its divisions.
        """
        flat = self.flat(x_t)
        alpha, sigma = scales_of(path, t, flat)
        return self.flat_posterior_covariance(flat, alpha, sigma, cond).to(x_t.dtype)

    def flat(self, x: Tensor) -> Float[Tensor, "b d"]:
        """x as (B, D) in the dtype computed in; raises on another event shape."""
        if not x.is_floating_point() or x.ndim == 0 or tuple(x.shape[1:]) != self.event:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)} and dtype {x.dtype}: expected floats of shape (B, *{self.event})"
            )
        return x.reshape(x.shape[0], -1).to(torch.promote_types(x.dtype, self.dtype))

    def unlabelled(self, cond: Cond) -> None:
        """Raise where a condition is given to a law without labels."""
        if cond is not None:
            raise ArgumentError(f"{type(self).__name__} has no labels: cond must be None, given {type(cond).__name__}")


def scales_of(path: Path, t: Time, flat: Float[Tensor, "b d"]) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at t, of shape () or (B, 1)."""
    time = as_time(t, flat)
    if time.ndim > 1 or (time.ndim == 1 and time.shape[0] not in (1, flat.shape[0])):
        raise ArgumentError(f"time has shape {tuple(time.shape)}: expected () or ({flat.shape[0]},)")
    path.check_time(time)
    alpha, sigma = path.alpha(time), path.sigma(time)
    return (alpha[:, None], sigma[:, None]) if time.ndim else (alpha, sigma)


def check_labels(cond: Cond, rows: int, known: Collection[int]) -> Tensor:
    """`cond` as labels that are known, one for each row of x; -1 is all.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(cond, Tensor) or cond.shape != (rows,) or cond.is_floating_point():
        raise ArgumentError(f"cond must be an integer tensor of shape ({rows},), one label for each row of x")
    strange = sorted(set(cond.tolist()) - {-1, *known})
    if strange:
        raise ArgumentError(f"cond holds label {strange[0]}; labels: {sorted({*known} - {-1})}, -1 for all")
    return cond


class LawDenoiser(Denoiser):
    """The exact denoiser of a law; noise and score come from the law without a division by sigma."""

    def __init__(self, law: Law, path: Path):
        super().__init__(path)
        self.law = law

    @property
    def t_low(self) -> float:
        return self.path.t_min

    def _answer(self, x_t: Tensor, t: Time, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.law.flat(x_t)
        alpha, sigma = scales_of(self.path, t, flat)
        return *self.law.posterior_means(flat, alpha, sigma, cond), sigma

    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        return self._answer(x_t, t, cond)[0].to(x_t.dtype).reshape(x_t.shape)

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        x_0, pull, sigma = self._answer(x_t, t, cond)
        # Given x_0 itself the noise is unknown: its mean is 0, also where the law is made of points.
        noise = sigma * pull if self.law.smooth else torch.where(sigma == 0, 0.0, sigma * pull)
        return x_0.to(x_t.dtype).reshape(x_t.shape), noise.to(x_t.dtype).reshape(x_t.shape)

    def score(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        return -self._answer(x_t, t, cond)[1].to(x_t.dtype).reshape(x_t.shape)
