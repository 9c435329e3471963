"""Muon: its orthogonalisation against the singular value decomposition, its step in closed form, what it moves."""

import math

import pytest
import torch
from torch import nn
from training_toys import tiny_model

from undiffuse.training import TrainConfig
from undiffuse.training.optim import Muon, make_optimizers, move, orthogonalise

F64 = torch.float64


def quintic(s):
    """Five rounds of the published polynomial on a singular value."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 4, 4)])
def test_singular_values_follow_the_polynomial_and_vectors_stay(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = quintic(s / s.square().sum(-1, keepdim=True).sqrt())
    torch.testing.assert_close(orthogonalise(matrices), u @ torch.diag_embed(s) @ vh, rtol=1e-9, atol=1e-9)


def test_singular_values_end_near_one():
    s = torch.linspace(0.005, 1.0, 20_000, dtype=F64)
    rest = (1 - s.square()).clamp(min=0).sqrt()  # so that each matrix has norm 1
    ends = orthogonalise(torch.diag_embed(torch.stack([s, rest], dim=1)))
    largest = ends[:, 0, 0]
    assert 0.68 < largest.min() < 0.69
    assert 1.15 < largest.max() < 1.16
    assert orthogonalise(torch.zeros(1, 2, 3)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_fades_out_leaves_numbers(dtype):
    matrices = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-10, 1e-18, 1e-25, 1e-40):
        found = orthogonalise((scale * matrices).to(dtype)).float()
        assert bool(torch.isfinite(found).all())
        assert found.abs().max() < 1.2
    assert torch.linalg.svdvals(orthogonalise(1e-10 * matrices)).min() > 0.1


def test_two_steps_of_a_matrix_and_of_the_convolution_that_it_is():
    """Momentum, scale and decay, with the singular value decomposition in the place of the products."""
    n, lr, b, decay = 4, 0.1, 0.9, 0.5
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    start = torch.randn(n, n, generator=torch.Generator().manual_seed(2), dtype=F64)
    other = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=F64)
    p, twin = nn.Parameter(start.clone()), nn.Parameter(start.reshape(n, 1, 2, 2).clone())
    optimizer = Muon([p, twin], lr, momentum=b, weight_decay=decay, precision=F64)
    past, w = torch.zeros(n, n, dtype=F64), start.clone()
    for gradient in (q, -2.0 * q + 0.5 * other):
        p.grad, twin.grad = gradient.clone(), gradient.reshape(n, 1, 2, 2).clone()
        optimizer.step()
        past = b * past + (1 - b) * gradient
        u, s, vh = torch.linalg.svd(b * past + (1 - b) * gradient)
        moved = u @ torch.diag(quintic(s / s.norm())) @ vh
        w = w - lr * (0.2 * math.sqrt(n) * moved + decay * w)
    torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twin.detach().reshape(n, n), p.detach(), rtol=1e-12, atol=1e-12)


def test_a_step_is_as_large_as_adams():
    torch.manual_seed(0)
    for shape in ((64, 64, 3, 3), (16, 512), (300, 8)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], lr=1.0, precision=torch.float32).step()
        assert 0.2 * 0.7 < p.detach().square().mean().sqrt() < 0.2 * 1.14


def test_matrices_are_its_own_and_the_rest_is_adams():
    model = tiny_model()
    model.net.first.bias.requires_grad_(False)
    config = TrainConfig(optimizer="muon", lr=0.3, betas=(0.8, 0.9), weight_decay=0.1, precision="bf16")
    muon, adam = make_optimizers(model, config)
    names = {p: n for n, p in model.named_parameters()}

    def moved(optimizer):
        return [names[p] for p in optimizer.param_groups[0]["params"]]

    assert isinstance(muon, Muon)
    assert muon.precision == torch.bfloat16
    assert moved(muon) == ["net.first.weight", "net.last.weight"]
    assert moved(adam) == ["net.labels.weight", "net.last.bias"]
    assert muon.param_groups[0]["weight_decay"] == adam.param_groups[0]["weight_decay"] == 0.1
    assert muon.param_groups[0]["momentum"] == 0.8
    assert muon.param_groups[0]["lr"] == 0.3
    (only,) = make_optimizers(nn.Linear(2, 3, bias=False), TrainConfig(optimizer="muon"))
    assert isinstance(only, Muon)
    assert only.precision == torch.float32


def test_every_optimiser_moves_at_the_rate_of_the_step():
    p, q = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))
    optimizers = make_optimizers(nn.ParameterList([p, q]), TrainConfig(optimizer="muon", lr=1.0))
    for rate in (0.5, 0.25):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.eye(2), torch.ones(2)
        move(optimizers, rate)
        assert p.grad is None
        assert q.grad is None
        step = 0.2 * math.sqrt(2) * quintic(math.sqrt(0.5))
        torch.testing.assert_close(before[0] - p.detach(), rate * step * torch.eye(2), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(before[1] - q.detach(), torch.full((2,), rate), rtol=1e-4, atol=1e-6)
