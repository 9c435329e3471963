"""The MLP: exact zero at the start, closed forms it must learn, and what it refuses."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.nets import MLP


def train(net, make, steps=400, lr=3e-3):
    adam = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        x, c, cond, target = make(torch.Generator().manual_seed(step))
        loss = (net(x, c, cond) - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return net.eval()


def test_new_network_returns_exactly_zero_and_any_event_shape():
    torch.manual_seed(0)
    for shape in (2, [3], [2, 3, 4]):
        event = [shape] if isinstance(shape, int) else shape
        y = MLP(shape)(torch.randn(4, *event), torch.rand(4))
        assert y.shape == (4, *event)
        assert y.abs().max() == 0


def test_it_learns_the_conditional_mean_of_a_gaussian():
    """x_0 ~ N(0, diag(s^2)), x_t = x_0 + sigma eps: E[x_0 | x_t] = s^2 / (s^2 + sigma^2) x_t, label log sigma."""
    torch.manual_seed(0)
    variance = torch.tensor([1.0, 0.09])

    def make(generator, n=512):
        sigma = torch.empty(n).uniform_(-1.5, 1.0, generator=generator).exp()
        x_0 = torch.randn(n, 2, generator=generator) * variance.sqrt()
        return x_0 + sigma[:, None] * torch.randn(n, 2, generator=generator), sigma.log(), None, x_0

    net = train(MLP(2, hidden=64, layers=2), make)
    x, c, _, _ = make(torch.Generator().manual_seed(10**6), 4000)
    exact = variance / (variance + c.exp()[:, None].square()) * x
    with torch.no_grad():
        error = (net(x, c) - exact).square().mean(0) / exact.square().mean(0)
    # Of the variance of the answer, per coordinate; a network blind to the noise level is left with over 0.05.
    assert error[0] < 0.01
    assert error[1] < 0.05


def test_it_learns_labels_vectors_and_their_absence():
    """Target: the class's number plus the vector; an absent label counts 1 (the mean of 0, 1, 2), a vector 0."""
    torch.manual_seed(0)

    def make(generator, n=256):
        label = torch.randint(-1, 3, (n,), generator=generator)
        vector = torch.rand(n, 1, generator=generator) * 2 - 1
        known = torch.where(label < 0, 1, label)[:, None] + vector
        absent = torch.rand(n, 1, generator=generator) < 0.3
        target = torch.where(absent, known - vector, known)
        cond = {"label": label, "vector": torch.where(absent, torch.nan, vector)}
        return torch.randn(n, 1, generator=generator), torch.rand(n, generator=generator), cond, target

    net = train(MLP(1, hidden=48, layers=2, num_classes=3, cond_dim=1), make, steps=300)
    x, c, cond, target = make(torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        assert (net(x, c, cond) - target).square().mean() < 0.01


def test_rows_are_independent():
    torch.manual_seed(0)
    net = MLP([2], hidden=32, num_classes=3)
    torch.nn.init.normal_(net.last.weight)
    x, c, labels = torch.randn(6, 2), torch.rand(6), torch.tensor([0, 1, 2, -1, 0, 1])
    together = net(x, c, labels)
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(x, c)[3], together[3])


def test_every_parameter_has_a_gradient_without_a_condition():
    net = MLP(2, num_classes=3, cond_dim=2)
    net(torch.randn(4, 2), torch.rand(4)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_types():
    torch.manual_seed(0)
    net = MLP(2)
    torch.nn.init.normal_(net.last.weight)
    x, c = torch.randn(64, 2), torch.rand(64)
    y = net(x, c)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = net(x, c)
    assert narrow.dtype == torch.float32
    assert (narrow - y).square().mean() < 1e-3 * y.square().mean()
    wide = net.double()(x.double(), c.double())
    torch.testing.assert_close(wide.float(), y, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentError, match=r"built for \(B, 2\)"):
        MLP(2)(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ArgumentError, match="one or more positive sizes"):
        MLP([2, 0])
    with pytest.raises(ArgumentError, match="hidden=0"):
        MLP(2, hidden=0)
