"""What a network is told beside `x`: the noise level, a class label, a vector.

Every embedding is computed in float32 at least, whatever the autocast state: a noise label in bfloat16 has three
significant digits, too few to tell neighbouring noise levels apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError, choose

Cond = Tensor | Mapping[str, Tensor] | None


class Sinusoidal(nn.Module):
    """e(c) = sqrt(2) [cos(f_k c), sin(f_k c)], f_k geometric from `highest` down to `lowest`; |e|^2 = width.

    (Vaswani et al. 2017, section 3.5, at unit magnitude.) The default range suits labels of order one, such as a
    scaled log-SNR: the lowest frequency is monotone over [-3, 3], the highest tells labels 0.02 apart.
    For labels 0 ... 999 take `highest=1, lowest=1e-4` (Ho et al. 2020).
    """

    frequencies: Tensor

    def __init__(self, width: int, highest: float = 64.0, lowest: float = 0.25):
        super().__init__()
        span = torch.linspace(math.log(highest), math.log(lowest), width // 2, dtype=torch.float64)
        self.register_buffer("frequencies", span.exp().float(), persistent=False)

    def forward(self, c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        angle = _wide(c_noise)[:, None] * _wide(self.frequencies)
        return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)


class Fourier(nn.Module):
    """e(c) = sqrt(2) [cos(2 pi f_k c), sin(2 pi f_k c)], f_k ~ N(0, scale^2), fixed; |e|^2 = width.

    (Tancik et al. 2020; Song et al. 2021, NCSN++, which uses scale = 16 on log sigma.) The frequencies are part of
    the state, since they are drawn when the module is made.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * scale * torch.randn(width // 2))

    def forward(self, c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b width"]:
        angle = _wide(c_noise)[:, None] * _wide(self.frequencies)
        return math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)


class ImageFourier(nn.Module):
    """x, then `e^{-w^2 s^2 / 2} sin(w x)` and the same of cos for `w = 2^n pi`, n in `powers`, along the channels.

    (Kingma et al. 2021, appendix C.) The label is log s, s = sigma / alpha, as "noise-unscaled" has it; where
    the waves in use have not faded alpha is about 1, and s the size of the noise in x. The factor is the mean of
    `sin(w (x + s z))` over `sin(w x)` (Barron et al. 2021, eq. 14): a wave shorter than the noise says nothing of the
    image and fades out. Without it the network stays rough at high noise, and the probability flow takes twice the
    evaluations.
    """

    def __init__(self, powers: Sequence[int] = ()):
        super().__init__()
        if not all(0 <= power <= 16 for power in powers):
            raise ArgumentError(f"input_fourier is {list(powers)}: expected numbers from 0 to 16, w = 2^n pi")
        self.powers = tuple(powers)
        self.copies = 1 + 2 * len(self.powers)

    def forward(self, x: Float[Tensor, "b c h w"], c_noise: Float[Tensor, " b"]) -> Float[Tensor, "b d h w"]:
        if not self.powers:
            return x
        wide, size, parts = _wide(x), _wide(c_noise).exp()[:, None, None, None], [_wide(x)]
        for power in self.powers:
            w = 2.0**power * math.pi
            fade = torch.exp(-0.5 * (w * size).square())
            parts += [fade * (w * wide).sin(), fade * (w * wide).cos()]
        return torch.cat(parts, dim=1)


NOISE_EMBEDDINGS: dict[str, type[nn.Module]] = {"sinusoidal": Sinusoidal, "fourier": Fourier}


class Labels(nn.Module):
    """Class label -> vector: a table whose last row is the learned embedding of "no label" (label -1)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.5)  # as large as the noise features behind their first layer

    def forward(self, labels: Tensor | None, batch: int) -> Float[Tensor, "b width"]:
        if labels is None:
            labels = torch.full((batch,), -1, dtype=torch.int64, device=self.table.weight.device)
        self._check(labels, batch)
        return F.embedding(torch.where(labels < 0, self.num_classes, labels), _wide(self.table.weight))

    def _check(self, labels: Tensor, batch: int) -> None:
        if labels.is_floating_point() or labels.shape != (batch,):
            raise ArgumentError(
                f"class labels have shape {tuple(labels.shape)} and type {labels.dtype}: expected ({batch},) integers, "
                f"-1 for no label"
            )
        # Looking at the values would stop a GPU's queue, and break a compiled graph.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= self.num_classes:
            raise ArgumentError(
                f"class labels run from {low} to {high}: this network knows 0 ... {self.num_classes - 1}, and -1 for "
                f"no label; build it with num_classes={high + 1} or correct the labels"
            )


class Vector(nn.Module):
    """Vector condition (B, d) -> vector; a row with a NaN is absent and gets a learned embedding of its own.

    The linear map is evaluated for absent rows too (at zero, result dropped), so that no parameter is ever without
    a gradient, which DistributedDataParallel would refuse.
    """

    def __init__(self, cond_dim: int, width: int):
        super().__init__()
        self.cond_dim = cond_dim
        self.linear = nn.Linear(cond_dim, width)
        self.absent = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, vector: Tensor | None, batch: int) -> Float[Tensor, "b width"]:
        if vector is None:
            vector = torch.full((batch, self.cond_dim), math.nan, device=self.absent.device)
        if vector.shape != (batch, self.cond_dim) or not vector.is_floating_point():
            raise ArgumentError(
                f"the vector condition has shape {tuple(vector.shape)} and type {vector.dtype}: expected "
                f"({batch}, {self.cond_dim}) floats, a row of NaN where it is absent"
            )
        missing = vector.isnan().any(dim=1, keepdim=True)
        known = _linear(self.linear, vector.nan_to_num(0.0))
        return torch.where(missing, _wide(self.absent), known)


class Embedding(nn.Module):
    """Noise label and condition -> one vector per sample, float32 at least, (B, width).

    e = silu(W_2 silu(W_1 noise(noise_scale (c_noise + noise_offset)) + label + vector))

    Args:
        width: size of the result.
        noise: "sinusoidal" or "fourier".
        num_classes: number of class labels, or None.
        cond_dim: size of the vector condition, or None.
        noise_scale, noise_offset: what is done to the noise label first.
        features: number of noise features, even.
        frequencies: (highest, lowest) of the sinusoidal features; None: `Sinusoidal`'s.
        late_condition: add label and vector behind W_2 (Dhariwal and Nichol 2021) instead of behind W_1.

    `cond` is a label tensor if only `num_classes` is set, a vector tensor if only `cond_dim` is; with both, and
    wherever it is clearer, a dict with keys "label" and "vector", either of which may be left out.
    """

    def __init__(
        self,
        width: int,
        *,
        noise: str = "sinusoidal",
        num_classes: int | None = None,
        cond_dim: int | None = None,
        noise_scale: float = 1.0,
        noise_offset: float = 0.0,
        features: int = 64,
        frequencies: Sequence[float] | None = None,
        late_condition: bool = False,
    ):
        super().__init__()
        if features < 2 or features % 2:
            raise ArgumentError(f"{features} noise features: expected an even number, at least 2")
        self.noise_scale, self.noise_offset, self.late_condition = noise_scale, noise_offset, late_condition
        kind = choose(noise, NOISE_EMBEDDINGS, "noise embedding")
        self.noise = kind(features) if frequencies is None else kind(features, *_range(noise, frequencies))
        self.label = None if num_classes is None else Labels(num_classes, width)
        self.vector = None if cond_dim is None else Vector(cond_dim, width)
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)

    def forward(self, c_noise: Float[Tensor, " b"], cond: Cond = None) -> Float[Tensor, "b width"]:
        label, vector = self.split(cond)
        with torch.autocast(c_noise.device.type, enabled=False):
            h = _linear(self.first, self.noise((_wide(c_noise) + self.noise_offset) * self.noise_scale))
            if self.late_condition:
                return F.silu(self._told(_linear(self.second, F.silu(h)), label, vector))
            return F.silu(_linear(self.second, F.silu(self._told(h, label, vector))))

    def _told(self, h: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        """`h` with the embeddings of label and vector added."""
        if self.label is not None:
            h = h + self.label(label, h.shape[0])
        if self.vector is not None:
            h = h + self.vector(vector, h.shape[0])
        return h

    def split(self, cond: Cond) -> tuple[Tensor | None, Tensor | None]:
        """(labels, vectors) of a condition, either None.

        Raises:
            ArgumentError: a condition that this network was not built for.
        """
        accepted = {"label": self.label, "vector": self.vector}
        known = [name for name, part in accepted.items() if part is not None]
        if cond is None:
            return None, None
        if isinstance(cond, Tensor):
            if len(known) != 1:
                raise ArgumentError(
                    "this network takes a label and a vector: pass cond as a dict with keys 'label' and 'vector'"
                    if known
                    else "this network was built without a condition: pass cond=None, or set num_classes or cond_dim"
                )
            cond = {known[0]: cond}
        unknown = [name for name in cond if name not in known]
        if unknown:
            raise ArgumentError(f"the condition has the key '{unknown[0]}': this network knows {known or 'none'}")
        return cond.get("label"), cond.get("vector")


def _range(noise: str, frequencies: Sequence[float]) -> tuple[float, float]:
    """(highest, lowest), checked."""
    if noise != "sinusoidal" or len(frequencies) != 2 or not 0 < frequencies[1] <= frequencies[0] < math.inf:
        raise ArgumentError(
            f"noise_frequencies={list(frequencies)} with embedding='{noise}': expected [highest, lowest], positive, "
            f"of sinusoidal features; Fourier features are spread by noise_scale"
        )
    return frequencies[0], frequencies[1]


def _wide(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 at least, also where its weights have been cast to a narrower type."""
    weight = _wide(layer.weight)
    return F.linear(x.to(weight.dtype), weight, _wide(layer.bias))
