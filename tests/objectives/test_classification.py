"""Cross entropy of noisy data: its value by quadrature, its minimiser, and what a trained classifier guides to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import undiffuse as ud
from undiffuse.core.errors import ArgumentError

F64 = torch.float64
LAW = ud.GaussianMixture(
    torch.tensor([[-0.9], [0.6], [1.5]], dtype=F64),
    torch.tensor([0.5, 0.3, 0.4], dtype=F64),
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    labels=torch.tensor([0, 1, 0]),
)


class Sharpened(nn.Module):
    """The exact logits times a number."""

    def __init__(self, path, factor):
        super().__init__()
        self.exact, self.path = LAW.classifier(path), path
        self.factor = nn.Parameter(torch.tensor(factor, dtype=F64))

    def forward(self, x, t):
        return self.factor * self.exact(x, t).log_softmax(1)


def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    streams = ud.Streams.of(0, n)
    labels = (streams.uniform((n,), dtype=F64) < 0.3).long()
    return LAW.sample(n, streams, labels), labels


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear()], ids=["vp", "linear"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_value_by_quadrature_and_minimiser(path, factor):
    """At one time the loss is the integral of `-sum_y p(y, x) log q(y | x)`; least at the posterior, factor 1."""
    n, t = 1_000_000, torch.tensor(0.4, dtype=F64)
    x_0, labels = drawn(n)
    model = Sharpened(path, factor)
    noise = torch.randn(n, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    losses = ud.NoisyClassification().at(model, x_0, t.expand(n), noise, labels)
    x = torch.linspace(-8, 8, 20_001, dtype=F64)[:, None]
    joint = model.exact(x, t).exp()
    wanted = torch.trapezoid(-(joint * model(x, t).log_softmax(1)).sum(1), x[:, 0]).detach()
    error = float(losses.detach().std()) / n**0.5
    assert abs(float(losses.detach().mean() - wanted)) < 4 * error < 0.01 * float(wanted)
    (slope,) = torch.autograd.grad(losses.mean(), model.factor)
    if factor == 1:
        assert abs(float(slope)) < 4 * error
    else:
        assert float(slope) > 0.05


def test_a_trained_classifier_guides_to_its_class():
    torch.manual_seed(0)
    path = ud.VP()
    model = ud.NetworkClassifier(ud.nets.ClassifierMLP(1, 2, hidden=32, layers=1), path)
    optimizer, objective = torch.optim.Adam(model.parameters(), lr=5e-3), ud.NoisyClassification()
    x_0, labels = (part.float() if part.is_floating_point() else part for part in drawn(40_000))
    for step in range(400):
        rows = slice(500 * (step % 80), 500 * (step % 80) + 500)
        loss = objective(model, x_0[rows], labels[rows], torch.Generator().manual_seed(step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(7)
    t = torch.rand(4000, generator=generator) * 0.99 + 0.005
    x_t = path.perturb(x_0[:4000], t, torch.randn(4000, 1, generator=generator))
    exact = LAW.classifier(path)(x_t.double(), t.double()).softmax(1)
    with torch.no_grad():
        assert float((model(x_t, t).softmax(1) - exact).abs().mean()) < 0.03
    guided = ud.ClassifierGuidance(LAW.denoiser(path), model)
    cond = torch.ones(2000, dtype=torch.long)
    x = ud.sample(guided, (2000, 1), solver="ddpm", steps=100, cond=cond, seed=0)
    assert abs(float(x.mean()) - 0.6) < 0.1
    assert abs(float(x.std()) - 0.3) < 0.1


def test_the_convolutional_classifier_reads_noisy_digits():
    torch.manual_seed(0)
    data = ud.data.load(source="digits", split="train")
    x, labels = data.batch(torch.arange(len(data)))
    path = ud.Cosine()
    model = ud.NetworkClassifier(ud.nets.ClassifierConv([1, 8, 8], 10, width=16), path)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = ud.NoisyClassification()(model, x[rows], labels[rows], generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = []
        for t in (0.05, 0.5, 0.999):
            x_t = path.perturb(x, torch.full((len(x),), t), torch.randn(x.shape, generator=generator))
            right.append(float((model(x_t, t).argmax(1) == labels).float().mean()))
    assert right[0] > 0.95  # nearly clean
    assert 0.5 < right[1] < right[0]  # half noise
    assert right[2] < 0.2  # noise: chance is 0.1


def test_wrong_arguments_are_explained():
    model = Sharpened(ud.VP(), 1.0)
    x_0, labels = drawn(4)
    with pytest.raises(ArgumentError, match="Did you mean 'uniform'"):
        ud.NoisyClassification("unifrm")
    with pytest.raises(ArgumentError, match="cond is None"):
        ud.NoisyClassification()(model, x_0)
    with pytest.raises(ArgumentError, match="the model has 2 classes"):
        ud.NoisyClassification()(model, x_0, labels + 2)
    with pytest.raises(ArgumentError, match=r"expected logits \(B, K\)"):
        ud.NetworkClassifier(ud.nets.EnergyMLP(1, hidden=4), ud.VP())(x_0, 0.5)
    with pytest.raises(ArgumentError, match="at least 2 classes"):
        ud.nets.ClassifierMLP(2, 1)
    with pytest.raises(ArgumentError, match="= 4"):
        ud.nets.ClassifierConv([1, 6, 8], 3, multipliers=(1, 1, 1))
    unlabelled = ud.NoisyClassification().at(model, x_0, torch.full((4,), 0.5, dtype=F64), 0 * x_0, labels * 0 - 1)
    assert torch.equal(unlabelled, torch.zeros(4, dtype=F64))
