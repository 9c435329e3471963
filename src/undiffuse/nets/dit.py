"""A transformer over patches of an image (Peebles and Xie 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.core.errors import ArgumentError
from undiffuse.nets.blocks import attend, zero
from undiffuse.nets.embedding import Cond, Embedding
from undiffuse.nets.mlp import event_shape

Tokens = Float[Tensor, "b n c"]

_LONGEST = 1e4  # slowest of the positions' frequencies, in patches per radian


def positions(rows: int, columns: int, width: int) -> Float[Tensor, "n width"]:
    """[sin(f_k x), cos(f_k x), sin(f_k y), cos(f_k y)] of patch (y, x), f_k = 10000^(-4 k / width), in row order.

    (Vaswani et al. 2017, section 3.5, for columns and rows.)
    """
    rates = _LONGEST ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def line(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64)[:, None] * rates
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    across = line(columns)[None].expand(rows, -1, -1)
    along = line(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, along], dim=2).flatten(0, 1)


def modulate(x: Tokens, shift: Float[Tensor, "b c"], scale: Float[Tensor, "b c"]) -> Tokens:
    """(1 + scale) norm(x) + shift: layer norm without a gain of its own."""
    hat = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, None].to(hat.dtype), hat, 1 + scale[:, None].to(hat.dtype))


class Block(nn.Module):
    """Attention, then two layers, each adapted and gated by the noise embedding e (adaLN-Zero, their section 3.2).

    x <- x + g_1 attention(modulate(x, s_1, t_1)),    x <- x + g_2 W_2 gelu(W_1 modulate(x, s_2, t_2)),

    with all six of g, s, t linear in e, and 0 at the start: a new block is the identity.

    Args:
        width: channels of a token, and of e.
        heads: number of attention heads.
        expansion: hidden width of the two layers, in units of `width`.
    """

    def __init__(self, width: int, heads: int, expansion: int):
        super().__init__()
        self.heads = heads
        self.modulation = zero(nn.Linear(width, 6 * width))
        self.qkv = spread(nn.Linear(width, 3 * width))
        self.out = spread(nn.Linear(width, width))
        self.first = spread(nn.Linear(width, expansion * width))
        self.second = spread(nn.Linear(expansion * width, width))

    def forward(self, x: Tokens, e: Float[Tensor, "b c"]) -> Tokens:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(e).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attention(modulate(x, shift_1, scale_1))
        h = F.gelu(self.first(modulate(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.second(h)

    def attention(self, x: Tokens) -> Tokens:
        """Every token looks at every other."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, c))


def spread(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with their start: weights as Glorot and Bengio's, of the whole patch at once, and no offset."""
    nn.init.xavier_uniform_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DiT(nn.Module):
    """Diffusion transformer: `net(x, c_noise, cond) -> (B, C, H, W)` in the type of x, exactly 0 before training.

    Patches of `patch` x `patch` pixels become tokens of `width` channels, with sin-cos positions added, go through
    `depth` blocks (see `Block`), and become pixels again.

    | size | `width` | `depth` | `heads` | parameters with `patch` 2, ImageNet's labels, variances, 4 channels |
    |---|---|---|---|---|
    | S | 384 | 12 | 6 | 33 M |
    | B | 768 | 12 | 12 | 130 M |
    | L | 1024 | 24 | 16 | 458 M |
    | XL | 1152 | 28 | 16 | 675 M |

    Args:
        shape: event shape [C, H, W]. Other sizes are taken at the call too, if they are divisible.
        patch: height and width of a patch, in pixels.
        width: channels of a token, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        expansion: hidden width of a block's two layers, in units of `width`.
        num_classes: number of class labels; -1 means no label. None: no labels.
        cond_dim: size of a vector condition; a row of NaN means absent. None: no vector.
        embedding: "sinusoidal" or "fourier" features of the noise label.
        noise_scale, noise_offset: the features are of `noise_scale (label + noise_offset)`.
        noise_features: number of those features.
        noise_frequencies: [highest, lowest] of sinusoidal ones; None: [64, 0.25], for labels of order one.
        out_channels: channels of the result; None: those of x.

    Raises:
        ArgumentError: a number out of range, a size that is not divisible by `patch`; at the call, an `x` or a
            condition that does not fit.
    """

    positions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        *,
        expansion: int = 4,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        embedding: str = "sinusoidal",
        noise_scale: float = 1.0,
        noise_offset: float = 0.0,
        noise_features: int = 256,
        noise_frequencies: Sequence[float] | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        self.shape = event_shape(shape)
        if len(self.shape) != 3:
            raise ArgumentError(f"event shape {list(self.shape)}: a DiT takes [channels, height, width]")
        if min(patch, width, depth, heads, expansion) < 1 or width % 4 or width % heads:
            raise ArgumentError(
                f"patch={patch}, width={width}, depth={depth}, heads={heads}, expansion={expansion}: expected positive "
                "integers, and a width that 4 and heads divide"
            )
        self.patch, self.width, self.out_channels = patch, width, out_channels or self.shape[0]
        self._check_size(self.shape[1], self.shape[2])
        self.embedding = Embedding(
            width,
            noise=embedding,
            num_classes=num_classes,
            cond_dim=cond_dim,
            noise_scale=noise_scale,
            noise_offset=noise_offset,
            features=noise_features,
            frequencies=noise_frequencies,
            late_condition=True,
        )
        self.first = spread(nn.Conv2d(self.shape[0], width, patch, stride=patch))
        self.blocks = nn.ModuleList(Block(width, heads, expansion) for _ in range(depth))
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.last = zero(nn.Linear(width, patch * patch * self.out_channels))
        place = positions(self.shape[1] // patch, self.shape[2] // patch, width)
        self.register_buffer("positions", place.float(), persistent=False)

    def _check_size(self, height: int, width: int) -> None:
        if height % self.patch or width % self.patch:
            fits = [-(-n // self.patch) * self.patch for n in (height, width)]
            raise ArgumentError(
                f"images of {height}x{width} in patches of {self.patch}x{self.patch}: height and width must be "
                f"divisible; resize or pad them to {fits[0]}x{fits[1]}, or choose another patch"
            )

    def forward(
        self, x: Float[Tensor, "b c h w"], c_noise: Float[Tensor, " b"], cond: Cond = None
    ) -> Float[Tensor, "b d h w"]:
        if x.shape[1] != self.shape[0]:
            raise ArgumentError(f"x has {x.shape[1]} channels: this DiT was built for {self.shape[0]}")
        self._check_size(x.shape[2], x.shape[3])
        dtype = self.first.weight.dtype
        e, grid = self.embedding(c_noise, cond).to(dtype), self.first(x.to(dtype))
        rows, columns = grid.shape[2:]
        as_built = (rows, columns) == (self.shape[1] // self.patch, self.shape[2] // self.patch)
        place = self.positions if as_built else positions(rows, columns, self.width)
        h = grid.flatten(2).transpose(1, 2) + place.to(grid.device, grid.dtype)
        for block in self.blocks:
            h = block(h, e)
        shift, scale = self.modulation(e).chunk(2, dim=1)
        y = self.last(modulate(h, shift, scale))
        y = y.reshape(-1, rows, columns, self.patch, self.patch, self.out_channels)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, *x.shape[2:]).to(x.dtype)
