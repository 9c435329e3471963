"""Products with Jacobians, divergences and their random estimates, against matrices written out."""

import math

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undiffuse.core import autodiff
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import NetworkEnergy

F64 = torch.float64
MODES = ["auto", "forward", "reverse"]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Net(nn.Module):
    """Two layers on events of shape (2, 3)."""

    def __init__(self, outputs=6):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))
        self.double()

    def forward(self, x, c_noise=None, cond=None):
        out = self.net(x.flatten(1))
        return out.reshape(x.shape) if out.shape[1] > 1 else out


FIELDS = {"network": Net(), "score of an energy": NetworkEnergy(Net(1), prior_std=1.5).score}


def jacobians(f, x):
    """(B, D, D), one row of the batch at a time, by torch's own full Jacobian."""
    rows = [torch.autograd.functional.jacobian(lambda r: f(r[None])[0], row) for row in x]
    return torch.stack(rows).reshape(len(x), x[0].numel(), -1)


X, V = drawn(1, 4, 2, 3), drawn(2, 4, 2, 3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", FIELDS)
def test_every_derivative_is_the_full_jacobian_s(field, mode, grad):
    f = FIELDS[field]
    value, full = f(X).detach(), jacobians(f, X)
    v = V.flatten(1)
    with torch.set_grad_enabled(grad):
        answers = (
            (autodiff.jvp(f, X, V, mode), torch.einsum("bij,bj->bi", full, v).reshape(X.shape)),
            (autodiff.quadratic_form(f, X, V, mode), torch.einsum("bi,bij,bj->b", v, full, v)),
            (autodiff.divergence(f, X, mode), full.diagonal(dim1=1, dim2=2).sum(1)),
        )
    for (got_value, got), wanted in answers:
        assert got_value.requires_grad == got.requires_grad == grad
        torch.testing.assert_close(got_value, value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["jvp", "quadratic_form", "divergence", "hutchinson"])
def test_gradients_of_the_derivatives_reach_the_parameters(what, mode):
    """d/dk of every derivative of k f equals that derivative of f: they are linear in f."""
    f, k = FIELDS["score of an energy"], torch.tensor(1.3, dtype=F64, requires_grad=True)

    def take(g):
        if what in ("jvp", "quadratic_form"):
            return getattr(autodiff, what)(g, X, V, mode)[1].sum()
        if what == "divergence":
            return autodiff.divergence(g, X, mode)[1].sum()
        return autodiff.hutchinson(g, X, generator=Streams.of(0, 4), mode=mode)[1].sum()

    (slope,) = torch.autograd.grad(take(lambda x: k * f(x)), k)
    torch.testing.assert_close(slope, take(f).detach(), rtol=1e-9, atol=1e-11)


def test_gradient_of_a_function():
    """E = sum_i i x_i^3 / 3, whose gradient is i x_i^2; its graph is kept only where gradients are enabled."""
    weight = torch.arange(1.0, 7.0, dtype=F64).reshape(2, 3)

    def energy(x):
        return (weight * x**3 / 3).flatten(1).sum(1)

    for x in (X, X.clone().requires_grad_()):
        value, slope = autodiff.gradient(energy, x)
        torch.testing.assert_close(value, energy(X), rtol=1e-12, atol=0)
        torch.testing.assert_close(slope, weight * X**2, rtol=1e-12, atol=0)
        assert value.requires_grad
        assert slope.requires_grad
        with torch.no_grad():
            value, slope = autodiff.gradient(energy, x)
        torch.testing.assert_close(slope, weight * X**2, rtol=1e-12, atol=0)
        assert not value.requires_grad
        assert not slope.requires_grad


def test_a_function_that_does_not_depend_on_x_has_gradient_zero():
    weight = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for constant in (lambda x: x.new_ones(len(x)), lambda x: weight.expand(len(x))):
        value, slope = autodiff.gradient(constant, X)
        torch.testing.assert_close(value, constant(X))
        assert torch.equal(slope, torch.zeros_like(X))
    for mode in MODES:
        for f in (torch.ones_like, lambda x: weight.expand(x.shape)):
            for answer in (autodiff.jvp(f, X, V, mode), autodiff.divergence(f, X, mode)):
                assert not answer[1].any()


@pytest.mark.parametrize("shape", [(4, 1), (), (4, 2, 3)])
def test_an_energy_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"expected one number per sample, \(4,\)"):
        autodiff.gradient(lambda x: x.sum() * x.new_ones(shape), X)


class Cube(torch.autograd.Function):
    """x^3 with a backward formula and no forward rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


def test_an_operation_without_a_forward_rule_goes_backward():
    for mode in ("auto", "reverse"):
        value, pushed = autodiff.jvp(Cube.apply, X, V, mode)
        torch.testing.assert_close(value, X**3)
        torch.testing.assert_close(pushed, 3 * X**2 * V)
    with pytest.raises(NotImplementedError):
        autodiff.jvp(Cube.apply, X, V, "forward")
    torch.testing.assert_close(autodiff.divergence(Cube.apply, X)[1], (3 * X**2).flatten(1).sum(1))


def test_another_failure_inside_the_function_is_not_hidden():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        autodiff.jvp(nn.Linear(5, 5).double(), X, V)


def test_unknown_names_are_refused():
    for call in (
        lambda: autodiff.jvp(Net(), X, V, "foward"),
        lambda: autodiff.divergence(Net(), X, "back"),
        lambda: autodiff.quadratic_form(Net(), X, V, "back"),
        lambda: autodiff.probe("rademacker", (2, 3)),
        lambda: autodiff.hutchinson(Net(), X, probes=0),
    ):
        with pytest.raises(ArgumentError):
            call()


# ---------------------------------------------------------------- random directions


SIZE, N = 6, 400_000


@pytest.mark.parametrize("kind", autodiff.PROBES)
@pytest.mark.parametrize("source", ["streams", "generator"])
def test_moments_of_the_probes(kind, source):
    """E u = 0 and E u u^T = I: 27 numbers within 4.5 standard errors (false alarm 2e-4 a case)."""
    generator = Streams.of(3, N) if source == "streams" else torch.Generator().manual_seed(3)
    u = autodiff.probe(kind, (N, 2, 3), generator, dtype=F64).flatten(1)
    assert (u.mean(0) * math.sqrt(N)).abs().max() < 4.5
    second = u.mT @ u / N - torch.eye(SIZE, dtype=F64)
    spread = {"rademacher": (0.0, 1.0), "gaussian": (2.0, 1.0), "sphere": (2 * 5 / 8, 6 / 8)}[kind]
    off = second - torch.diag(second.diagonal())
    assert off.abs().max() < 4.5 * math.sqrt(spread[1] / N)
    assert second.diagonal().abs().max() <= 4.5 * math.sqrt(spread[0] / N)
    if kind != "gaussian":  # both lie on the sphere
        torch.testing.assert_close(u.square().sum(1), torch.full((N,), float(SIZE), dtype=F64))


@pytest.mark.parametrize("kind", autodiff.PROBES)
@pytest.mark.parametrize("probes", [1, 3])
def test_mean_and_variance_of_the_estimate(kind, probes):
    """u^T A u has mean tr A and the variances of `probe`; on the sphere 2 D/(D+2) (|S|^2 - tr(A)^2/D).

    Mean within 4 standard errors (6e-5). The variance's relative error is about sqrt(15/N) at most (kurtosis of
    u^T A u), 0.6 %: 3 % is five of them.
    """
    a = drawn(7, SIZE, SIZE)
    sym = 0.5 * (a + a.mT)
    x = torch.zeros(N, SIZE, dtype=F64)
    _, estimate = autodiff.hutchinson(
        lambda y: y @ a.mT, x, probes=probes, kind=kind, generator=torch.Generator().manual_seed(11)
    )
    variance = {
        "rademacher": 2 * (sym.square().sum() - sym.diagonal().square().sum()),
        "gaussian": 2 * sym.square().sum(),
        "sphere": 2 * SIZE / (SIZE + 2) * (sym.square().sum() - torch.trace(a) ** 2 / SIZE),
    }[kind] / probes
    assert (estimate.mean() - torch.trace(a)).abs() < 4 * (variance / N).sqrt()
    torch.testing.assert_close(estimate.var(), variance, rtol=0.03, atol=0)


def test_a_sample_keeps_its_probe_whatever_the_batch():
    for kind in autodiff.PROBES:
        whole = autodiff.probe(kind, (8, 2, 3), Streams.of(5, 8))
        parts = [autodiff.probe(kind, (4, 2, 3), Streams.of(5, 4, first=i)) for i in (0, 4)]
        assert torch.equal(whole, torch.cat(parts))


# ---------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Bytes of the tensors made by the operations inside and still alive, at most at a time."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {k: held for k, held in self.storages.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def most_alive(call):
    with Live() as live:
        call()
    return live.most


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", ["network", "energy"])
def test_a_divergence_without_gradients_does_not_keep_a_graph_per_dimension(field, mode):
    """All 24 directions need less than twice the memory of one; with gradients they keep 24 graphs."""
    size = 24
    net = nn.Sequential(nn.Linear(size, 32), nn.SiLU(), nn.Linear(32, size if field == "network" else 1)).double()
    f = net if field == "network" else NetworkEnergy(_Plain(net)).score
    x, v = drawn(1, 8, size), drawn(2, 8, size)
    with torch.no_grad():
        one = most_alive(lambda: autodiff.quadratic_form(f, x, v, mode))
        everything = most_alive(lambda: autodiff.divergence(f, x, mode))
    assert everything < 2 * one
    assert most_alive(lambda: autodiff.divergence(f, x, mode)) > 5 * everything  # the measure sees graphs that are kept


class _Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, c_noise, cond):
        return self.net(x)
