"""`Path`: how data becomes noise, `x_t = alpha(t) x_0 + sigma(t) eps`, and all that follows from alpha and sigma."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.core.shapes import pad_to

Time = Float[Tensor, " *b"]


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.enable_grad():
        t = t.detach().requires_grad_(True)
        value = function(t)
        if not value.requires_grad:  # a constant schedule
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), t)[0]


class Path(ABC):
    """An affine Gaussian path `p(x_t | x_0) = N(alpha(t) x_0, sigma(t)^2 I)`.

    Time runs from data (`t_min`) to noise (`t_max`). A subclass gives `alpha` and `sigma`, the angle
    `atan2(sigma, alpha)` growing with t; derivatives and the inverse then come from autograd and bisection, and
    are overridden by closed forms where there are any. All methods take a float tensor of shape () or (B,) and
    return that shape, dtype and device.

    Attributes:
        t_min, t_max: the interval on which samples move. `sigma(t_min) = 0` where the path reaches it.
        t_low: the smallest time at which a network is trained or called, `sigma(t_low) > 0`.
        t_high: the largest time with a moderate signal, `alpha(t_high) > 0`. The half log-SNR is evaluated
            on [t_low, t_high] only; outside it quantities are written in alpha and sigma themselves.
        value: whether equal paths of this very class are the same for good, so that what is computed of one may be kept
            for another. Not inherited: a subclass may compare by less than it is made of.
    """

    value: ClassVar[bool] = False
    t_min: float = 0.0
    t_max: float = 1.0
    t_low: float = 1e-3
    t_high: float = 1.0

    # ------------------------------------------------------------------ the schedule

    @abstractmethod
    def alpha(self, t: Time) -> Time:
        """Signal scale."""

    @abstractmethod
    def sigma(self, t: Time) -> Time:
        """Noise scale, the standard deviation of x_t given x_0."""

    def alpha_dot(self, t: Time) -> Time:
        """`d alpha / dt`."""
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Time) -> Time:
        """`d sigma / dt`; infinite at t = 0 where sigma grows like sqrt(t)."""
        return _derivative(self.sigma, t)

    def variance_dot(self, t: Time) -> Time:
        """`d sigma^2 / dt`, finite at both ends."""
        return 2 * self.sigma(t) * self.sigma_dot(t)

    def half_log_snr(self, t: Time) -> Time:
        """`lambda = log(alpha / sigma)`, in nats; strictly decreasing, infinite where sigma or alpha is 0."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def angle(self, t: Time) -> Time:
        """`theta = atan2(sigma, alpha)` in [0, pi/2]: the coordinate that is regular at both ends."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def omega(self, t: Time) -> Time:
        """`alpha sigma' - sigma alpha'`, the Wronskian of the schedule; positive inside the path."""
        return self.alpha(t) * self.sigma_dot(t) - self.sigma(t) * self.alpha_dot(t)

    # ------------------------------------------------------------------ the inverse

    def time_of(self, half_log_snr: Time) -> Time:
        """The time with this half log-SNR: the inverse of `half_log_snr`."""
        return self._time_of_pair(torch.sigmoid(2 * half_log_snr).sqrt(), torch.sigmoid(-2 * half_log_snr).sqrt())

    def time_of_angle(self, theta: Time) -> Time:
        """The time with this angle: the inverse of `angle`."""
        # cos(pi/2) is 6e-17 in float64: the complement is exact at both ends.
        return self._time_of_pair(torch.sin(math.pi / 2 - theta), torch.sin(theta))

    def _time_of_pair(self, alpha: Time, sigma: Time) -> Time:
        """The time whose (alpha, sigma) is proportional to this pair; here by bisection of the angle."""
        theta = torch.atan2(sigma, alpha).double()
        low = torch.full_like(theta, self.t_min)
        high = torch.full_like(theta, self.t_max)
        for _ in range(64):
            middle = 0.5 * (low + high)
            below = self.angle(middle) < theta
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (0.5 * (low + high)).to(sigma.dtype)

    # ------------------------------------------------------------------ the linear SDE

    def drift(self, t: Time) -> Time:
        """`f(t) = alpha' / alpha` of `dx = f x dt + g dw` (Lemma 4.4.1); minus infinity where alpha is 0."""
        return self.alpha_dot(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Time:
        """`g(t)`, with `g^2 = d sigma^2 / dt - 2 f sigma^2` (Lemma 4.4.1)."""
        return (self.variance_dot(t) - 2 * self.drift(t) * self.sigma(t).square()).clamp(min=0).sqrt()

    def transition(self, s: Time, t: Time) -> tuple[Time, Time]:
        """Scale and standard deviation of `p(x_t | x_s)`, s < t.

        `scale = alpha_t / alpha_s` and `std^2 = sigma_t^2 - scale^2 sigma_s^2`, in the factored form
        `sigma_t^2 (1 - r)(1 + r)` with `r = alpha_t sigma_s / (alpha_s sigma_t)`.

        Raises:
            ArgumentError: a time outside the path, or s >= t.
        """
        self._check_order(s, t)
        r = self._ratio(s, t)
        return self.alpha(t) / self.alpha(s), self.sigma(t) * ((1 - r) * (1 + r)).clamp(min=0).sqrt()

    def posterior(
        self, x_t: Float[Tensor, "b *event"], x_0: Float[Tensor, "b *event"], t: Time, s: Time
    ) -> tuple[Float[Tensor, "b *event"], Time]:
        """Mean and standard deviation of `p(x_s | x_t, x_0)`, s < t (Lemma 4.4.2, eq. 4.4.4).

        `mean = (r sigma_s / sigma_t) x_t + alpha_s (1 - r^2) x_0`, `std = sigma_s sqrt(1 - r^2)`, with r as in
        `transition`: regular at `sigma_s = 0` and at `alpha_t = 0`.

        Raises:
            ArgumentError: a time outside the path, or s >= t.
        """
        self._check_order(s, t)
        r = self._ratio(s, t)
        rest = ((1 - r) * (1 + r)).clamp(min=0)
        on_x_t = pad_to(r * self.sigma(s) / self.sigma(t), x_t)
        on_x_0 = pad_to(self.alpha(s) * rest, x_0)
        return on_x_t * x_t + on_x_0 * x_0, self.sigma(s) * rest.sqrt()

    def _ratio(self, s: Time, t: Time) -> Time:
        """`r = alpha_t sigma_s / (alpha_s sigma_t)` in [0, 1]: exp(lambda_t - lambda_s) without a logarithm."""
        return (self.alpha(t) / self.alpha(s)) * (self.sigma(s) / self.sigma(t))

    # ------------------------------------------------------------------ draws

    def perturb(
        self, x_0: Float[Tensor, "b *event"], t: Time, noise: Float[Tensor, "b *event"]
    ) -> Float[Tensor, "b *event"]:
        """`x_t = alpha(t) x_0 + sigma(t) noise`.

        Raises:
            ArgumentError: a time outside the path, or of a shape other than () or (B,).
        """
        self.check_time(t)
        return pad_to(self.alpha(t), x_0) * x_0 + pad_to(self.sigma(t), noise) * noise

    def simulate(
        self, x_0: Float[Tensor, "b *event"], times: Float[Tensor, " n"], generator: Generator = None
    ) -> Float[Tensor, "n b *event"]:
        """The states of the forward process at some times: one joint path for each x_0, exact at any spacing.

        `x_s` at the first time by `perturb`, then each from the one before by `transition`; so the states at s < t have
        covariance `alpha_t / alpha_s (alpha_s^2 Cov[x_0] + sigma_s^2)`.

        Args:
            x_0: data; their dtype and device are those of the states.
            times: strictly increasing, on the path; with t_min where sigma(t_min) = 0 the first state is the data.
            generator: as of `random.normal`; one draw for each time.

        Raises:
            ArgumentError: times that do not increase, or leave the path.
        """
        if times.ndim != 1 or len(times) == 0 or not bool((times[1:] > times[:-1]).all()):
            raise ArgumentError(f"times are {times.tolist()}: expected one or more, strictly increasing")
        times = times.detach().to("cpu", torch.float64)
        self.check_time(times)

        def step(x: Tensor, scale: Tensor, std: Tensor) -> Tensor:
            z = random.normal(x.shape, generator, dtype=x.dtype, device=x.device)
            return x * float(scale) + z * float(std)

        states = [step(x_0, self.alpha(times[0]), self.sigma(times[0]))]
        for s, t in itertools.pairwise(times.unbind()):
            states.append(step(states[-1], *self.transition(s, t)))
        return torch.stack(states)

    def prior(self, shape: Sequence[int], generator: Generator = None) -> Tensor:
        """A draw of `N(0, sigma(t_max)^2 I)`, the law of x_{t_max} once the signal is lost."""
        return random.normal(shape, generator) * self.prior_std

    def prior_log_prob(self, x: Float[Tensor, "b *event"]) -> Float[Tensor, " b"]:
        """Log-density of `prior` in nats."""
        flat = x.flatten(1) / self.prior_std
        constant = flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -0.5 * flat.square().sum(dim=1) - constant

    @property
    def prior_std(self) -> float:
        """`sigma(t_max)`."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    # ------------------------------------------------------------------ what a network is told

    def noise_label(self, t: Time) -> Time:
        """The default noise label of a network on this path: a number of order 1 that grows with the noise."""
        return t

    def input_scale(self, t: Time) -> Time:
        """The default input scale of a network: 1 where x_t has the size of the data already."""
        return torch.ones_like(t)

    # ------------------------------------------------------------------ checks

    def check_time(self, t: Time) -> None:
        """Raise unless all of `t` lies on the path. On an accelerator nothing is read back, so nothing is checked.

        Raises:
            ArgumentError: a time below t_min, above t_max, or not finite.
        """
        if t.device.type != "cpu" or t.numel() == 0:
            return
        slack = 1e-6 * (self.t_max - self.t_min)  # the ends themselves, rounded to float32
        low, high = t.min().item(), t.max().item()
        if not (low >= self.t_min - slack and high <= self.t_max + slack):
            raise ArgumentError(
                f"time outside the path: given {low:g} to {high:g}, "
                f"expected {self.t_min:g} <= t <= {self.t_max:g} on {self}"
            )

    def _check_order(self, s: Time, t: Time) -> None:
        self.check_time(s)
        self.check_time(t)
        if s.device.type == "cpu" and not bool((s < t).all()):
            raise ArgumentError("s must lie before t (s < t): time grows with the noise")


def change_of_path(source: Path, target: Path, t: Time) -> tuple[Time, Time]:
    """Time `tau` and scale `c` with `x_t` on `target` equal in law to `c x_tau` on `source` (Prop. 6.3.3).

    `tau` is the source's time of equal angle `atan2(sigma, alpha)` and `c` the ratio of the norms of (alpha, sigma),
    so nothing is singular where alpha or sigma is 0. A target noisier, or cleaner, than the source's own end is
    mapped to that end.
    """
    alpha, sigma = target.alpha(t), target.sigma(t)
    tau = source._time_of_pair(alpha, sigma).clamp(source.t_min, source.t_max)
    return tau, torch.hypot(alpha, sigma) / torch.hypot(source.alpha(tau), source.sigma(tau))
