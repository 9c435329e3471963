"""A perfect network, whatever it predicts, is sampled as the exact denoiser that it was made of."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from solvers.measuring import DETERMINISTIC, F64, SOLVERS, mixture, numbers
from undiffuse.core.errors import ArgumentError
from undiffuse.core.instants import known, sent
from undiffuse.fields import PREDICTIONS, Answer, NetworkDenoiser, on_path, prediction
from undiffuse.paths import VP, Karras, Linear
from undiffuse.solvers import Bound, EulerMaruyama, sample


class Perfect(nn.Module):
    """Says what a perfect network says; its label is the time. Its answers lie in one buffer, as a CUDA graph's do."""

    def __init__(self, exact, spec):
        super().__init__()
        self.exact, self.spec, self.calls = exact, spec, 0
        self.buffer = None

    def forward(self, x, label, cond=None):
        self.calls += 1
        c = self.spec.coefficients(self.exact.path, label)
        x_t = x / c.c_in[:, None]
        said = c.target(*self.exact.estimate(x_t, label))
        self.buffer = said if self.buffer is None else self.buffer.copy_(said)
        return self.buffer


def perfect(path, name):
    exact = mixture().denoiser(path)
    spec = replace(PREDICTIONS[name], label=lambda path, t: t)
    return exact, NetworkDenoiser(Perfect(exact, spec), path, spec)


# Noise and score say nothing where alpha = 0, and the network is asked a little before.
WAYS = [(path, name) for path in (VP(), Karras()) for name in PREDICTIONS]
WAYS += [(Linear(), name) for name, spec in PREDICTIONS.items() if not spec.needs_signal]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("path", "name"), WAYS, ids=[f"{type(path).__name__}-{name}" for path, name in WAYS])
def test_every_solver_on_every_prediction(path, name, solver):
    exact, network = perfect(path, name)
    start = float(path.sigma(torch.tensor(path.t_max, dtype=F64))) * numbers(16, 2)
    wanted, got = (sample(field, noise=start, solver=solver, steps=6, seed=1) for field in (exact, network))
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_the_record_has_the_denoised_of_every_step(solver):
    exact, network = perfect(Linear(), "velocity")
    wanted, got = (
        sample(field, noise=numbers(8, 2), solver=solver, steps=4, return_info=True) for field in (exact, network)
    )
    torch.testing.assert_close(torch.stack(got.denoised), torch.stack(wanted.denoised), rtol=1e-9, atol=1e-9)
    assert got.nfe == wanted.nfe == network.net.calls


@pytest.mark.parametrize("entry", ["c_skip", "c_out", "c_in"])
def test_one_percent_is_noticed(entry):
    """The coefficients of a run are numbers, and none of them is for show."""
    original = prediction.numbers

    def mutated(*of):
        return {t: replace(c, **{entry: 1.01 * getattr(c, entry)}) for t, c in original(*of).items()}

    for path, solver in ((VP(), "euler"), (Karras(), "abm-4"), (VP(), "ddpm")):
        with mock.patch.object(prediction, "numbers", mutated), pytest.raises(AssertionError):
            test_every_solver_on_every_prediction(path, "edm", sample_solver(solver))


def sample_solver(name):
    return {**DETERMINISTIC, **SOLVERS, "euler-maruyama": EulerMaruyama()}[name]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_number_a_time_and_a_known_time_mean_the_same(name):
    _, network = perfect(VP(), name)
    network.net.buffer = torch.empty(0, dtype=F64)
    network.net.forward = lambda x, label, cond=None: torch.tanh(x) * label[:, None]  # anything
    x, t = numbers(5, 2), 0.3
    asked = sent((0.9, t), x)[t]
    for method in (network, network.noise, network.score, network.velocity):
        wanted = method(x, torch.tensor(t, dtype=F64))
        for time in (t, asked, torch.full((5,), t, dtype=F64)):
            torch.testing.assert_close(method(x, time), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.ask(x, t).data(x), network(x, t), rtol=1e-12, atol=1e-12)
    assert network.ask(x, torch.tensor(t, dtype=F64)).on_x == 0
    assert network.ask(x, asked).on_x == network.ask(x, t).on_x == network.output(x, t)[1].c_skip


def test_a_number_gives_float32_and_bfloat16_what_a_time_gives():
    network = NetworkDenoiser(nn.Tanh(), Karras(), "edm")
    network.net.forward = lambda x, label, cond=None: torch.tanh(x + label[:, None].to(x.dtype))
    for dtype, rtol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        x = numbers(64, 3).to(dtype)
        got, wanted = network(x, 0.7), network(x, torch.tensor(0.7))
        assert got.dtype == wanted.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)


def test_gradients_go_through_known_times():
    net = nn.Linear(2, 2).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, label, cond=None):
            return self.inner(x) * label[:, None]

    network = NetworkDenoiser(Net(), Linear(), "velocity")
    grads = []
    for t in (torch.tensor(0.4, dtype=F64), 0.4, sent((0.4,), numbers(1))[0.4]):
        x = numbers(4, 2).requires_grad_()
        total = network(x, t).square().sum() + network.ask(x, t).plus(x, 0.3, 0.9).square().sum()
        grads.append(torch.autograd.grad(total, (x, net.weight, net.bias)))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_a_path_that_learns_gets_its_gradient_from_a_number_too():
    scale = torch.tensor(2.0, requires_grad=True)

    class Learned(Linear):
        def sigma(self, t):
            return scale * t

    network = NetworkDenoiser(nn.Identity(), Learned(), "noise")
    network.net.forward = lambda x, label, cond=None: x
    network(torch.ones(1, 2), 0.5).sum().backward()
    torch.testing.assert_close(scale.grad, torch.tensor(-2.0))  # 2 (1 - sigma) / alpha


def test_times_are_known_only_as_sent():
    times = sent((0.2, 0.7), torch.zeros(1))
    assert known(times[0.7]).number == 0.7
    assert known(times[0.7]).among == (0.2, 0.7)
    assert known(0.3) == (0.3, (0.3,))
    for other in (times[0.7] * 2, times[0.7].clone(), times[0.7].expand(3), torch.tensor(0.7)):
        assert known(other) is None
    # Were the number taken, compiled code would be made for every time anew.
    inside = torch.compile(lambda t: t + (0.0 if known(t) is None else 1.0), backend="eager", fullgraph=True)
    assert inside(times[0.7]) == times[0.7]


def test_a_compiled_denoiser_is_the_same_at_every_time():
    network = NetworkDenoiser(nn.Tanh(), Linear(), "velocity")
    network.net.forward = lambda x, label, cond=None: torch.tanh(x) + label[:, None]
    compiled = torch.compile(lambda x, t: network(x, t), backend="eager", fullgraph=True)
    x = numbers(3, 2).float()
    for t in sent((0.2, 0.5, 0.9), x).values():
        torch.testing.assert_close(compiled(x, t), network(x, t))


def test_a_subclass_and_a_hook_have_the_last_word():
    class Half(NetworkDenoiser):
        def forward(self, x_t, t, cond=None):
            return 0.5 * super().forward(x_t, t, cond)

    net = nn.Identity()
    net.forward = lambda x, label, cond=None: torch.zeros_like(x)
    plain, half = (kind(net, VP(), "v") for kind in (NetworkDenoiser, Half))
    hooked = NetworkDenoiser(net, VP(), "v")
    hooked.register_forward_hook(lambda module, given, out: 0.5 * out)
    noise = numbers(4, 2)
    whole, first, second = (sample(f, noise=noise, solver="euler", steps=3) for f in (plain, half, hooked))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, whole)


def test_an_answer_is_counted_checked_and_kept():
    exact, network = perfect(Linear(), "velocity")
    bound = Bound(network, grid=torch.tensor([0.8, 0.4, 0.0], dtype=F64))
    x, t = numbers(3, 2), torch.tensor(0.4, dtype=F64)
    bound.track(3)
    answer = bound.ask(x, t)
    assert answer.on_x == 1
    torch.testing.assert_close(bound.denoised, exact(x, t))
    assert bound.calls == 1
    assert bound.rounds.tolist() == [1, 1, 1]
    other = Bound(exact)
    other.field.ask = lambda x_t, t, cond=None: Answer(x_t[:, :1])
    with pytest.raises(ArgumentError, match="returned shape"):
        other.ask(x, t)


def test_a_network_that_changes_its_input_is_told():
    net = nn.Identity()
    net.forward = lambda x, label, cond=None: x.mul_(2)
    network = NetworkDenoiser(net, Linear(), "velocity")
    with pytest.raises(ArgumentError, match="changes its input in place"):
        network(torch.ones(2, 2), 0.5)
    # Scaled on the way in it is a copy that changes.
    assert torch.isfinite(NetworkDenoiser(net, Karras(), "edm")(torch.ones(2, 2), 0.5)).all()


@pytest.mark.parametrize("solver", ["euler", "abm-4", "ddpm", "rk4"])
@pytest.mark.parametrize("name", ["edm", "v", "data"])
@pytest.mark.parametrize(("path", "target"), [(VP(), Karras()), (Karras(), VP()), (Linear(), VP()), (VP(), Linear())])
def test_a_network_on_another_path(path, target, name, solver):
    exact, network = perfect(path, name)
    start = float(target.sigma(torch.tensor(target.t_max, dtype=F64))) * numbers(16, 2)
    wanted, got = (
        sample(on_path(field, target), noise=start, solver=solver, steps=6, seed=1) for field in (exact, network)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


def test_times_on_another_path_are_numbers_too():
    """The time of the source, and what x is divided by, once for a run; from a number as from a tensor."""
    exact, network = perfect(VP(), "v")
    moved, x = on_path(network, Karras()), numbers(5, 2)
    asked = sent((2.0, 0.5), x)
    for t, tensor in asked.items():
        wanted = moved(x, torch.tensor(t, dtype=F64))
        torch.testing.assert_close(moved(x, tensor), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moved(x, t), wanted, rtol=1e-12, atol=1e-12)
        answer = moved.ask(x, tensor)
        assert answer.on_x != 0
        torch.testing.assert_close(answer.data(x), wanted, rtol=1e-12, atol=1e-12)
    inside = on_path(exact, Karras())
    with torch.inference_mode():
        inside(x, 0.5)
    weight = torch.ones((), dtype=F64, requires_grad=True)
    (inside(x * weight, 0.5).sum()).backward()  # nothing kept is of inference mode
    assert weight.grad is not None
