"""A perfect network, whatever it predicts, is sampled as the exact denoiser that it was made of."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from solvers.measuring import DETERMINISTIC, F64, SOLVERS, mixture, numbers, strong_error
from undiffuse.core.errors import ArgumentError
from undiffuse.core.instants import known, sent
from undiffuse.fields import PREDICTIONS, Answer, Denoiser, NetworkDenoiser, on_path, prediction
from undiffuse.oracles.law import LawDenoiser
from undiffuse.paths import VP, Karras, Linear
from undiffuse.solvers import DDIM, Bound, Euler, EulerMaruyama, integrate, sample


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
    spec = network.prediction.coefficients(VP(), torch.tensor(t, dtype=F64))
    assert network.ask(x, asked).on_x == network.ask(x, t).on_x == spec.c_skip


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
    assert known(0.3) == (0.3, (0.3,), None)
    for other in (times[0.7] * 2, times[0.7].clone(), times[0.7].expand(3), torch.tensor(0.7)):
        assert known(other) is None
    times[0.2].add_(0.1)
    assert known(times[0.2]) is None  # all of a run's are views of one tensor
    times = sent((0.2, 0.7), torch.zeros(1))
    asked = sent((0.7,), torch.zeros(1))[0.7].requires_grad_()
    assert known(asked) is None
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


class Zero(nn.Module):
    def forward(self, x, label, cond=None):
        return torch.zeros_like(x)


class HalfForward(NetworkDenoiser):
    def forward(self, x_t, t, cond=None):
        return 0.5 * super().forward(x_t, t, cond)


class HalfCall(NetworkDenoiser):
    def __call__(self, *args):
        return 0.5 * super().__call__(*args)


class HalfOutput(NetworkDenoiser):
    def output(self, x_t, t, cond=None):
        output, c = super().output(x_t, t, cond)
        return output, replace(c, c_skip=0.5 * c.c_skip, c_out=0.5 * c.c_out)


class HalfCoefficients(NetworkDenoiser):
    def _coefficients(self, time):
        c = super()._coefficients(time)
        return replace(c, c_skip=0.5 * c.c_skip, c_out=0.5 * c.c_out)


def hooked():
    network = NetworkDenoiser(Zero(), VP(), "v")
    network.register_forward_hook(lambda module, given, out: 0.5 * out)
    return network


def replaced():
    network = NetworkDenoiser(Zero(), VP(), "v")
    said = network.forward
    network.forward = lambda x_t, t, cond=None: 0.5 * said(x_t, t, cond)
    return network


HALVES = {
    kind.__name__: partial(kind, Zero(), VP(), "v") for kind in (HalfForward, HalfCall, HalfOutput, HalfCoefficients)
}
HALVES |= {"a hook": hooked, "an instance's own": replaced}


@pytest.mark.parametrize("make", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("solver", ["euler", "abm-4"])
def test_who_changes_the_answer_has_the_last_word(make, solver):
    class Half(LawDenoiser):
        def forward(self, x_t, t, cond=None):
            return 0.5 * NetworkDenoiser(Zero(), VP(), "v")(x_t, torch.as_tensor(t), cond)

    noise = numbers(4, 2)
    wanted = sample(Half(mixture(), VP()), noise=noise, solver=solver, steps=3)
    torch.testing.assert_close(sample(make(), noise=noise, solver=solver, steps=3), wanted)


def test_a_class_that_is_replaced_has_it_too():
    network, noise = NetworkDenoiser(Zero(), VP(), "v"), numbers(4, 2)
    with mock.patch.object(NetworkDenoiser, "forward", lambda self, x_t, t, cond=None: torch.zeros_like(x_t)):
        zero = sample(network, noise=noise, solver="euler", steps=3)
    assert not torch.allclose(zero, sample(network, noise=noise, solver="euler", steps=3))


def test_what_is_compiled_is_called():
    calls = []

    def backend(graph, inputs):
        return lambda *given: calls.append(1) or graph.forward(*given)

    network, x = NetworkDenoiser(Zero(), VP(), "v"), numbers(4, 2)
    grid = torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    wanted = integrate(Bound(network, grid=grid), x, grid, Euler())
    got = integrate(Bound(torch.compile(network, backend=backend), grid=grid), x, grid, Euler())
    torch.testing.assert_close(got, wanted)
    assert len(calls) == 2
    network.compile(backend=backend)
    torch.testing.assert_close(integrate(Bound(network, grid=grid), x, grid, Euler()), wanted)
    assert len(calls) == 4


def test_a_field_need_not_be_a_denoiser():
    class Field:
        path = VP()

        def __call__(self, x, t, cond=None):
            return torch.zeros_like(x)

    grid, x = torch.tensor([0.9, 0.1], dtype=F64), numbers(4, 2)
    got = integrate(Bound(Field(), grid=grid), x, grid, DDIM())
    torch.testing.assert_close(got, x * (VP().sigma(grid[1]) / VP().sigma(grid[0])))


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


class Writes(nn.Module):
    """Doubles its input: in place, or on a copy."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x, label, cond=None):
        return torch.tanh(x.mul_(2) if self.in_place else x * 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", ["euler", "heun", "abm-4"])
def test_a_network_may_write_into_its_input(mode, solver):
    noise = numbers(4, 2)
    before = noise.clone()
    with mode():
        got, wanted = (
            sample(NetworkDenoiser(Writes(writes), Linear(), "velocity"), noise=noise, solver=solver, steps=4)
            for writes in (True, False)
        )
    assert torch.equal(noise, before)
    torch.testing.assert_close(got, wanted)


def test_a_network_that_begins_to_write_into_its_input_is_told():
    network, x = NetworkDenoiser(Writes(False), Linear(), "velocity"), torch.ones(2, 2)
    network(x, 0.5)
    network.net.in_place = True
    with pytest.raises(ArgumentError, match="change its input in place"):
        network(x, 0.5)
    network.net = Writes(True)  # another one is tried anew
    assert torch.equal(network(torch.ones(2, 2), 0.5), network(torch.ones(2, 2), torch.tensor(0.5)))


def test_a_network_may_write_into_its_input_for_a_condition_alone():
    class Sometimes(nn.Module):
        def forward(self, x, label, cond=None):
            return torch.tanh(x.add_(cond[:, None]) if cond is not None else x)

    network, x, cond = NetworkDenoiser(Sometimes(), Linear(), "velocity"), numbers(3, 2), torch.ones(3)
    wanted = [network(x.clone(), torch.tensor(0.5), c) for c in (cond, None)]
    for _ in range(2):
        for c, answer in zip((None, cond), reversed(wanted)):
            torch.testing.assert_close(network(x, 0.5, c), answer)
    assert torch.equal(x, numbers(3, 2))


def test_a_network_sees_x_dense():
    class Flat(nn.Module):
        def forward(self, x, label, cond=None):
            return x.view(len(x), -1).view(x.shape)

    network = NetworkDenoiser(Flat(), Linear(), "velocity")
    for noise in (numbers(4, 3, 8, 8)[:, :, ::2, ::2], numbers(1, 3).expand(4, 3)):
        wanted = sample(network, noise=noise.clone(), solver="euler", steps=3)
        torch.testing.assert_close(sample(network, noise=noise, solver="euler", steps=3), wanted)


def test_a_prediction_that_learns_is_asked_each_time():
    scale = torch.tensor(1.0, dtype=F64, requires_grad=True)
    label = nn.Identity()
    label.forward = lambda x, label, cond=None: x * label[:, None]
    learned = prediction.Prediction("learned", PREDICTIONS["noise"].line, label=lambda path, t: scale * t)
    network, x = NetworkDenoiser(label, VP(), learned), numbers(2, 2)
    network(x, 0.5).sum().backward()
    assert scale.grad is not None
    before = sample(network, noise=x, solver="euler", steps=2)
    with torch.no_grad():
        scale.mul_(3)
    assert not torch.allclose(sample(network, noise=x, solver="euler", steps=2), before)


def test_what_is_kept_is_for_what_it_was_made_of():
    """Another path, prediction or sigma_data between two calls."""
    _, network = perfect(Karras(), "edm")
    network.net.forward = lambda x, label, cond=None: torch.tanh(x)
    x, t = numbers(3, 2), 0.7
    for change in ({"sigma_data": 0.9}, {"path": VP()}, {"prediction": PREDICTIONS["v"]}):
        network(x, t)
        for name, value in change.items():
            setattr(network, name, value)
        torch.testing.assert_close(network(x, t), network(x, torch.tensor(t, dtype=F64)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moved", [False, True])
def test_threads_may_share_a_denoiser(moved):
    _, network = perfect(Karras(), "edm")
    network.net.forward = lambda x, label, cond=None: torch.tanh(x)
    field = on_path(network, VP()) if moved else network
    noise, interval = numbers(2, 2), sys.getswitchinterval()
    alone = {steps: sample(field, noise=noise, solver="euler", steps=steps) for steps in (3, 5, 7)}
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda n: (n, sample(field, noise=noise, solver="euler", steps=n)), (3, 5, 7) * 15))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(x, alone[n]) for n, x in found)


def test_the_denoised_outlives_the_network_s_buffer():
    """A corrector that asks for the score comes between the answer and the callback."""

    class Nudge:
        def correct(self, field, x, t, noise):
            return x + 0.01 * field.score(x, t)

    exact, network = perfect(Linear(), "velocity")
    seen = [
        torch.stack(
            sample(field, noise=numbers(4, 2), solver="euler", steps=4, corrector=Nudge(), return_info=True).denoised
        )
        for field in (exact, network)
    ]
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-9)


def test_a_tableau_of_one_s_own():
    @dataclass(frozen=True)
    class Ralston(Euler):
        order = 2
        nodes, rows, weights = (0.0, 2 / 3), ((2 / 3,),), (0.25, 0.75)

    exact, network = perfect(VP(), "v")
    assert strong_error(Ralston(), VP(), [20, 40])[1] < 0.4 * strong_error(Ralston(), VP(), [20, 40])[0]
    wanted, got = (sample(field, noise=numbers(4, 2), solver=Ralston(), steps=5) for field in (exact, network))
    torch.testing.assert_close(got, wanted)


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
    _, network = perfect(VP(), "v")
    moved, x = on_path(network, Karras()), numbers(5, 2)
    asked = sent((2.0, 0.5), x)
    for t, tensor in asked.items():
        wanted = moved(x, torch.tensor(t, dtype=F64))
        torch.testing.assert_close(moved(x, tensor), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moved(x, t), wanted, rtol=1e-12, atol=1e-12)
        answer = moved.ask(x, tensor)
        assert answer.on_x != 0
        torch.testing.assert_close(answer.data(x), wanted, rtol=1e-12, atol=1e-12)


def test_what_is_kept_of_another_path_is_of_one_dtype_and_mode():
    class Learns(Denoiser):
        def __init__(self, path):
            super().__init__(path)
            self.weight = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x_t, t, cond=None):
            seen.append(t.dtype)
            return self.weight * t * x_t  # t is saved for the gradient

    seen = []
    moved, x = on_path(Learns(VP()), Karras()), numbers(5, 2)
    with torch.inference_mode():
        moved(x, 0.5)
    moved(x, 0.5).sum().backward()
    assert moved.source.weight.grad is not None
    moved(x.float(), 0.5)
    assert seen == [F64, F64, torch.float32]
