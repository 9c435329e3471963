"""Guidance by a classifier of noisy data: Bayes' rule for scores."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undiffuse.core.errors import ArgumentError
from undiffuse.core.shapes import as_time, pad_to
from undiffuse.fields import Denoiser

Event = Float[Tensor, "b *event"]
Time = Float[Tensor, ""] | Float[Tensor, " b"] | float
Cond = Tensor | dict[str, Tensor] | None

# The signal alpha / sigma at which a classifier is still asked: in float32 its gradient over alpha keeps four digits.
FAINTEST = 1e-3


class ClassifierGuidance(Denoiser):
    """`grad log p_t(x_t) + scale grad_x log p(y | x_t, t)` as a denoiser, y given as `cond`.

    With `g` that gradient, `E[x_0] = D(x_t, t) + scale (sigma^2 / alpha) g` and `E[eps] = E_D[eps] - scale sigma g`
    (Song et al. 2021, eq. 14 and appendix I.1; monograph, chapter 8). At scale 1, with the exact classifier, it is the
    denoiser of `p(x_0 | y)`; another scale is no longer the score of a diffused law. Where the signal is gone (past
    `path.t_high` and below alpha / sigma = 1e-3) the classifier is asked at the last time before: its gradient vanishes
    with alpha, and what it moves x_0 by is their ratio.

    `cond` (int64, (B,)) are classes; -1, or None for all rows, leaves the denoiser as it is. The denoiser itself is
    always called without a condition. A call costs one of the denoiser, and the classifier forwards and backwards.

    Args:
        denoiser: an unconditional one.
        classifier: `classifier(x_t, t) -> logits (B, K)`, t of shape (B,). If it has a `path`, that must be the
            denoiser's.
        scale: of the classifier's gradient.

    Raises:
        ArgumentError: a classifier trained on another path, a scale that is not finite; at a call, logits that are not
            (B, K), labels out of range.
    """

    def __init__(self, denoiser: Denoiser, classifier: nn.Module, scale: float = 1.0):
        super().__init__(denoiser.path)
        trained_on = getattr(classifier, "path", denoiser.path)
        if trained_on != denoiser.path:
            raise ArgumentError(
                f"a classifier trained on another path: {trained_on}, and the denoiser's is {denoiser.path}. Give one "
                "trained on this path, or move the denoiser with ud.on_path"
            )
        if not math.isfinite(scale):
            raise ArgumentError(f"scale is {scale}: expected a finite number")
        self.denoiser = denoiser
        self.classifier = classifier
        self.scale = scale
        faint = float(denoiser.path.time_of(torch.tensor(math.log(FAINTEST), dtype=torch.float64)))
        self.last = min(max(denoiser.path.t_high, faint), denoiser.path.t_max)

    @property
    def t_low(self) -> float:
        return self.denoiser.t_low

    def forward(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        x_0 = self.denoiser(x_t, t)
        return x_0 if cond is None else x_0 + self._moves(x_t, t, cond)[0]

    def estimate(self, x_t: Event, t: Time, cond: Cond = None) -> tuple[Event, Event]:
        x_0, noise = self.denoiser.estimate(x_t, t)
        if cond is None:
            return x_0, noise
        on_data, on_score = self._moves(x_t, t, cond)
        return x_0 + on_data, noise - pad_to(self.path.sigma(as_time(t, x_t)), x_t) * on_score

    def score(self, x_t: Event, t: Time, cond: Cond = None) -> Event:
        score = self.denoiser.score(x_t, t)
        return score if cond is None else score + self._moves(x_t, t, cond)[1]

    def _moves(self, x_t: Event, t: Time, cond: Cond) -> tuple[Event, Event]:
        """What is added to E[x_0], `scale (sigma^2 / alpha) g`, and to the score, `scale g`.

        Past `last` the second is what goes with the first in `x_t = alpha x_0 + sigma eps`.
        """
        time = as_time(t, x_t)
        asked = time.clamp(max=self.last)
        alpha, sigma = self.path.alpha(asked), self.path.sigma(asked)
        faded = (self.path.alpha(time) / alpha) * (sigma / self.path.sigma(time)).square()
        on_score = self.scale * torch.where(time > asked, faded, torch.ones_like(faded))
        pull = self.pull(x_t, asked, cond)
        return pad_to(self.scale * sigma.square() / alpha, x_t) * pull, pad_to(on_score, x_t) * pull

    def pull(self, x_t: Event, t: Time, cond: Cond) -> Event:
        """`grad_x log p(y | x_t, t)`, 0 where y is -1; differentiable where gradients are on."""
        outer = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # What was made in inference mode is never part of a graph: copies are.
            x_t = x_t.clone() if x_t.is_inference() else x_t
            t = t.clone() if isinstance(t, Tensor) and t.is_inference() else t
            cond = cond.clone() if isinstance(cond, Tensor) and cond.is_inference() else cond
            x = x_t if outer and x_t.requires_grad else x_t.detach().requires_grad_(True)
            logits = self._logits(x, as_time(t, x_t).expand(len(x_t)))
            labels = self._labels(cond, logits)
            chosen = logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            total = torch.where(labels < 0, torch.zeros_like(chosen), chosen).sum()
            (pull,) = torch.autograd.grad(total, x, create_graph=outer)
        return pull

    def _logits(self, x: Event, t: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        dtype = next((p.dtype for p in self.classifier.parameters() if p.is_floating_point()), x.dtype)
        logits = self.classifier(x.to(dtype), t)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ArgumentError(
                f"the classifier returned shape {tuple(logits.shape)} for {len(x)} samples: expected logits (B, K)"
            )
        return logits.to(x.dtype)

    def _labels(self, cond: Cond, logits: Tensor) -> Tensor:
        rows, classes = logits.shape
        if not isinstance(cond, Tensor) or cond.shape != (rows,) or cond.is_floating_point():
            given = f"shape {tuple(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
            raise ArgumentError(f"cond is {given}: expected the class of each of {rows} samples, integers ({rows},)")
        if cond.device.type == "cpu" and not bool(((cond >= -1) & (cond < classes)).all()):
            raise ArgumentError(f"cond holds {cond.min()} to {cond.max()}: this classifier knows 0 ... {classes - 1}")
        return cond.to(logits.device, torch.int64)
