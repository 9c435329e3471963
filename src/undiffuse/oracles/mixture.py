"""A mixture of Gaussians: the smallest world with modes, and the yardstick of solvers."""

from __future__ import annotations

import math
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Generator
from undiffuse.oracles.classifier import MixtureClassifier
from undiffuse.oracles.law import Cond, Event, Law, check_labels
from undiffuse.paths import Path


class GaussianMixture(Law):
    """`sum_k w_k N(means_k, stds_k^2)`, each component with independent coordinates.

    With labels, `cond` (int64, (B,)) selects among the components: row b sees those whose label is `cond[b]`,
    and all of them where `cond[b]` is -1.

    Args:
        means: (K, *event).
        stds: (K,) or (K, *event), positive. For points use `Empirical`.
        weights: (K,), not negative; made to sum to 1; equal by default.
        labels: (K,) integers >= 0, the class of each component.

    Raises:
        ArgumentError: shapes that do not fit, a std <= 0, negative weights.
    """

    smooth = True
    log_weights: Tensor
    flat_means: Tensor
    variances: Tensor
    labels: Tensor | None

    def __init__(
        self,
        means: Float[Tensor, "k *event"],
        stds: Float[Tensor, "k ..."],
        weights: Float[Tensor, " k"] | None = None,
        labels: Int[Tensor, " k"] | None = None,
    ):
        super().__init__()
        count = means.shape[0]
        stds = torch.as_tensor(stds, dtype=means.dtype, device=means.device)
        if stds.shape not in (means.shape[:1], means.shape) or not bool((stds > 0).all()):
            raise ArgumentError(
                f"GaussianMixture: stds has shape {tuple(stds.shape)}, least value {float(stds.min())}: "
                f"expected shape ({count},) or {tuple(means.shape)}, all positive"
            )
        weights = means.new_ones(count) if weights is None else weights.to(means)
        if weights.shape != (count,) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
            raise ArgumentError(
                f"GaussianMixture: weights must be {count} numbers >= 0, not all 0; given {weights.tolist()}"
            )
        if labels is not None and (labels.shape != (count,) or bool((labels < 0).any())):
            raise ArgumentError(f"GaussianMixture: labels must be {count} integers >= 0; given {labels.tolist()}")
        self.event = tuple(means.shape[1:])
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("flat_means", means.detach().reshape(count, -1).clone())
        self.register_buffer("variances", stds.detach().reshape(count, -1).square())
        self.register_buffer("labels", labels)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.flat_means.dtype

    @property
    def weights(self) -> Float[Tensor, " k"]:
        return self.log_weights.exp()

    @property
    def mean(self) -> Float[Tensor, "*event"]:
        return (self.weights @ self.flat_means).reshape(self.event)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Of the flattened event: within components plus between them."""
        offsets = self.flat_means - self.weights @ self.flat_means
        within = (self.weights @ self.variances).expand(self.flat_means.shape[1])
        return torch.diag(within) + offsets.mT @ (self.weights[:, None] * offsets)

    def _log_prior(self, cond: Cond, rows: int) -> Tensor:
        """Log-weights of the components as each row sees them, (1, K) or (B, K)."""
        if cond is None:
            return self.log_weights[None]
        if self.labels is None:
            raise ArgumentError("this mixture has no labels: cond must be None")
        labels = check_labels(cond, rows, self.labels.tolist())
        seen = (labels[:, None] == self.labels) | (labels[:, None] < 0)
        return torch.where(seen, self.log_weights, -torch.inf).log_softmax(1)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: log of weight times density (B, K), offset over variance (B, K, D), and prior variances."""
        alpha, sigma = (v.unsqueeze(-1) if v.ndim else v for v in (alpha, sigma))  # () or (B, 1, 1)
        size, spread = x.shape[1], self.variances.to(x.dtype)
        variance = torch.addcmul(sigma.square(), alpha.square(), spread)  # (K, D or 1) or (B, K, D or 1)
        offset = torch.addcmul(x[:, None], alpha, self.flat_means.to(x.dtype), value=-1)
        pull = offset / variance
        log_det = variance.log().sum(-1) if variance.shape[-1] > 1 else size * variance[..., 0].log()
        # Sums of products as matrix products: a sum over a short axis takes several times as long.
        squares = (offset * pull) @ x.new_ones(size)
        scaled = self._log_prior(cond, x.shape[0]).to(x.dtype) - 0.5 * size * math.log(2 * math.pi)
        return torch.sub(scaled, squares + log_det, alpha=0.5), pull, spread

    def posterior_means(self, x, alpha, sigma, cond):
        joint, pull, spread = self._components(x, alpha, sigma, cond)
        share = joint.softmax(1)
        if spread.shape[1] == 1:
            pulled, slope = (torch.stack([share * spread[:, 0], share], 1) @ pull).unbind(1)
        else:
            pulled, slope = ((share[:, None] @ of)[:, 0] for of in (spread * pull, pull))
        return torch.addcmul(share @ self.flat_means.to(x.dtype), alpha, pulled), slope

    def flat_posterior_covariance(self, x, alpha, sigma, cond):
        joint, pull, spread = self._components(x, alpha, sigma, cond)
        share = joint.softmax(1)
        alpha, sigma = (v.unsqueeze(-1) if v.ndim else v for v in (alpha, sigma))
        centres = self.flat_means.to(x.dtype) + alpha * spread * pull
        offsets = centres - (share[:, :, None] * centres).sum(1, keepdim=True)
        rest = spread * sigma.square() / (alpha.square() * spread + sigma.square())
        within = (share[:, :, None] * rest).sum(1).expand(x.shape)
        return torch.diag_embed(within) + (share[:, :, None] * offsets).mT @ offsets

    def flat_log_prob(self, x, alpha, sigma, cond):
        return self._components(x, alpha, sigma, cond)[0].logsumexp(1)

    def sample(self, n: int, generator: Generator = None, cond: Cond = None) -> Event:
        """`n` draws; `cond` (n,) chooses the class of each."""
        device = self.flat_means.device
        steps = self._log_prior(cond, n).exp().cumsum(1)
        u = random.uniform((n,), generator, dtype=self.dtype, device=device)
        chosen = (u[:, None] * steps[:, -1:] >= steps).sum(1)
        noise = random.normal((n, *self.event), generator, dtype=self.dtype, device=device).reshape(n, -1)
        return (self.flat_means[chosen] + self.variances[chosen].sqrt() * noise).reshape(n, *self.event)

    def log_joint(self, x: Float[Tensor, "b d"], alpha: Tensor, sigma: Tensor) -> Float[Tensor, "b k"]:
        """`log p(component, x_t)` at the scales of `posterior_means`."""
        return self._components(x, alpha, sigma, None)[0]

    def classifier(self, path: Path) -> MixtureClassifier:
        """The exact `log p(y, x_t)` of the classes on a path, as logits."""
        return MixtureClassifier(self, path)

    def responsibilities(self, x: Event, cond: Cond = None) -> Float[Tensor, "b k"]:
        """`p(component | x)`."""
        flat = self.flat(x)
        return self._components(flat, flat.new_ones(()), flat.new_zeros(()), cond)[0].softmax(1).to(x.dtype)

    def scaled(self, alpha: Tensor, sigma: Tensor) -> Self:
        stds = (float(alpha) ** 2 * self.variances + float(sigma) ** 2).sqrt()
        count = len(self.flat_means)
        shape = (count,) if stds.shape[1] == 1 and stds.shape != self.flat_means.shape else (count, *self.event)
        means = float(alpha) * self.flat_means.reshape(count, *self.event)
        return type(self)(means, stds.reshape(shape), self.weights, self.labels)
