"""Bits per dimension of data with levels, against a law whose bins have known masses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import undiffuse as ud
from undiffuse.core.errors import ArgumentError
from undiffuse.inference.dequantisation import VariationalDequantiser, count_levels, dequantise, levels_of

F64 = torch.float64


def discretised(levels: int, std: float, n: int, seed: int = 0):
    """A Gaussian image of 4 x 4 pixels cut into levels: the law, data as loaders scale them, and -log2 P per dim."""
    law = ud.Gaussian(torch.full((1, 4, 4), 0.1, dtype=F64), std=torch.full((1, 4, 4), std, dtype=F64))
    v = law.sample(n, ud.Streams.of(seed, n)).clamp(-1, 1 - 1e-9)
    k = ((v + 1) * levels / 2).floor()
    edges = torch.distributions.Normal(torch.tensor(0.1, dtype=F64), torch.tensor(std, dtype=F64))
    table = edges.cdf(2 * (torch.arange(levels, dtype=F64) + 1) / levels - 1) - edges.cdf(
        2 * torch.arange(levels, dtype=F64) / levels - 1
    )
    bits = -torch.log2(table[k.long()]).flatten(1).mean(1)
    entropy = -float((table * torch.log2(table.clamp(min=1e-300))).sum())
    return law, 2 * k / (levels - 1) - 1, bits, entropy


def test_uniform_noise_recovers_the_bits_of_fine_levels():
    """256 levels, 25 of them a standard deviation: the bound is loose by 1e-4 bits."""
    law, x, bits, entropy = discretised(256, 0.2, 200)
    v = dequantise(x, ud.Streams.of(3, len(x)))
    nats = ud.log_likelihood(law.denoiser(ud.Linear()), v, divergence="exact").nats
    found = ud.bits_per_dim(nats, 16)
    assert float((found - bits).mean()) == pytest.approx(0, abs=0.005)
    standard = float(found.std()) / 200**0.5
    assert float(found.mean()) == pytest.approx(entropy, abs=3 * standard + 0.005)


def test_learned_noise_recovers_the_bits_of_coarse_levels():
    """8 levels, 2 of them a standard deviation: uniform noise loses more than 0.01 bits, a learned one under 0.003.

    A bin is fuller at its side towards the mean, which a network of x can say.
    """
    torch.manual_seed(0)
    levels, n = 8, 400
    law, x, bits, _ = discretised(levels, 0.45, n)
    denoiser = law.denoiser(ud.Linear())
    uniform = ud.bits_per_dim(law.log_prob(dequantise(x, ud.Streams.of(4, n), levels=levels)), 16, levels)
    assert float((uniform - bits).mean()) > 0.01
    net = nn.Conv2d(1, 8, 1).double()
    learned = VariationalDequantiser((1, 4, 4), 8, net, levels).double().fit(denoiser, x, steps=300)
    with torch.no_grad():
        v, log_q = learned(x, ud.Streams.of(5, n))
    nats = ud.log_likelihood(denoiser, v[:20], divergence="exact").nats
    assert torch.allclose(nats, law.log_prob(v[:20]), atol=1e-4)
    found = ud.bits_per_dim(law.log_prob(v) - log_q, 16, levels) - bits
    assert -0.002 < float(found.mean()) < 0.003


def test_log_q_is_the_density_of_the_noise():
    """Shares of the parts within 4 standard errors of p, each part uniform inside, and log q = log K p."""
    n, p = 40_000, torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=F64)
    x = torch.full((n, 1), 2 * 3 / 7 - 1, dtype=F64)
    q = VariationalDequantiser((1,), 4, levels=8).double()
    with torch.no_grad():
        q.logits.copy_(p.log()[:, None] + 0.3)
        v, log_q = q(x, ud.Streams.of(6, n))
    u = (v[:, 0] + 1) * 4 - 3
    part = (u * 4).floor().long()
    assert float((torch.bincount(part, minlength=4) / n - p).abs().max()) < 4 * 0.5 / n**0.5
    assert torch.allclose(log_q, torch.log(4 * p)[part])
    inside = 4 * u - part
    for k in range(4):
        own = inside[part == k]
        assert float(own.mean()) == pytest.approx(0.5, abs=4 * 0.289 / len(own) ** 0.5)
        assert float(own.var()) == pytest.approx(1 / 12, rel=0.06)


def test_what_has_no_levels_is_refused():
    x = 2 * torch.arange(256, dtype=F64)[None] / 255 - 1
    assert torch.equal(levels_of(x), torch.arange(256, dtype=F64)[None])
    v = dequantise(x, ud.Streams.of(0, 1))
    assert torch.equal(((v + 1) * 128).floor(), torch.arange(256, dtype=F64)[None])
    assert count_levels(x) == 256
    assert count_levels(2 * torch.tensor([[0.0, 3, 4, 16]]) / 16 - 1) == 17
    assert count_levels(torch.tensor([[-1.0, 1.0]])) == 256  # nothing else is known of it
    wide = (2 * torch.arange(65_536, dtype=F64) / 65_535 - 1).float()
    assert count_levels(wide) == 65_536
    for fail in (dequantise, count_levels):
        with pytest.raises(ArgumentError, match="of a level off"):
            fail(v)
    with pytest.raises(ArgumentError, match="data run from -1 to 3"):
        dequantise(x * 2 + 1)
    with pytest.raises(ArgumentError, match="levels is 1"):
        levels_of(x, 1)
