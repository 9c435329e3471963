"""Small U-Nets whose layers are all at work, and what to put in."""

import torch

from undiffuse.nets import UNet


def small(shape=(2, 8, 8), width=8, multipliers=(1, 2), blocks=1, seed=0, **options) -> UNet:
    """A small network whose zero layers have been given values."""
    torch.manual_seed(seed)
    net = UNet(shape, width, multipliers, blocks, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


def batch(n=5, shape=(2, 8, 8), dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator).to(dtype), torch.rand(n, generator=generator).to(dtype)
