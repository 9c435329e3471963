"""Contrastive divergence: its gradient in closed form, its buffer row by row, and when it gives up."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from undiffuse.core import random
from undiffuse.core.errors import ArgumentError, SamplingError, TrainingError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy
from undiffuse.objectives import starts
from undiffuse.objectives.contrastive import ContrastiveDivergence, Stop, frozen
from undiffuse.objectives.starts import FromNoise, ReplayBuffer, last_of_each
from undiffuse.solvers.langevin import Langevin

F64 = torch.float64


class Bell(Energy):
    """E = (x - m)^2 / (2 s^2): a Gaussian with mean m and standard deviation s, not normalised."""

    def __init__(self, m=0.4, s=1.3):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=F64))
        self.s = nn.Parameter(torch.tensor(s, dtype=F64))

    def forward(self, x, cond=None):
        return (x[:, 0] - self.m).square() / (2 * self.s**2)


@dataclass(frozen=True)
class Ends:
    x: torch.Tensor
    acceptance: torch.Tensor | None = None
    diverged: dict[int, int] = field(default_factory=dict)


class Exact:
    """Chains that have converged: independent draws of the model's own law."""

    def run(self, target, x, steps, *, cond=None, generator=None):
        return Ends(target.m + target.s * random.normal(x.shape, generator, dtype=x.dtype))


class Still:
    """Chains that do not move; remembers how it was called."""

    def __init__(self, diverged=()):
        self.seen, self.diverged = [], dict.fromkeys(diverged, 3)

    def run(self, target, x, steps, *, cond=None, generator=None):
        flags = {p.requires_grad for p in target.parameters()}, {m.training for m in target.modules()}
        self.seen.append((x, steps, cond, *flags))
        return Ends(x, torch.full((len(x),), 0.25), self.diverged)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(objective, model, data, batches=100, n=10_000):
    """Mean gradient over batches and its standard error, (2, parameters)."""
    rng, found = generator(1), []
    for _ in range(batches):
        loss = objective(model, data(n, rng), None, rng).mean()
        found.append(torch.stack(torch.autograd.grad(loss, list(model.parameters()))))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / math.sqrt(batches)


def test_with_converged_chains_the_gradient_is_that_of_the_likelihood():
    """Data N(mu, v): d(-log p)/dm = -(mu - m) / s^2, d/ds = 1/s - (v + (mu - m)^2) / s^3."""
    model, mean, std = Bell(), 0.9, 0.5
    objective = ContrastiveDivergence(Exact(), 1, penalty=0.0)
    got, error = gradients(objective, model, lambda n, rng: mean + std * torch.randn(n, 1, generator=rng, dtype=F64))
    m, s = 0.4, 1.3
    expected = torch.tensor([-(mean - m) / s**2, 1 / s - (std**2 + (mean - m) ** 2) / s**3], dtype=F64)
    assert bool(((got - expected).abs() < 3.3 * error).all())  # 0.2 % of all seeds fail
    assert bool(((got - expected).abs() < 0.01 * expected.abs()).all())
    assert bool((3.3 * error < 0.01 * expected.abs()).all())


def test_one_step_of_langevin_from_the_data():
    """CD-1 in closed form: the chain's mean is m + (1 - h / s^2)(mu - m), its variance (1 - h / s^2)^2 v + 2 h."""
    model, mean, std, h = Bell(), 1.0, 0.7, 0.3
    objective = ContrastiveDivergence(Langevin(h), 1, penalty=0.0)
    got, error = gradients(objective, model, lambda n, rng: mean + std * torch.randn(n, 1, generator=rng, dtype=F64))
    m, s = 0.4, 1.3
    shrink = 1 - h / s**2
    chain = shrink**2 * (std**2 + (mean - m) ** 2) + 2 * h
    expected = torch.tensor([-(mean - m) * (1 - shrink) / s**2, (chain - std**2 - (mean - m) ** 2) / s**3], dtype=F64)
    assert bool(((got - expected).abs() < 3.3 * error).all())
    assert bool((3.3 * error < 0.03 * expected.abs()).all())


def test_penalty_and_data_noise():
    """x = m + s z on both sides: E = z^2 / 2, E E^2 = 3 / 4; noise of std d on the data turns z into N(0, 1 + d^2)."""
    model, rng, n, d = Bell(m=0.0, s=1.0), generator(2), 2_000_000, 0.8
    x = torch.randn(n, 1, generator=rng, dtype=F64)
    loss = ContrastiveDivergence(Exact(), 1, penalty=0.2)(model, x, None, rng).detach()
    error = 3.3 * loss.std() / math.sqrt(n)
    assert abs(loss.mean() - 0.2 * 1.5) < error < 0.01 * 0.3
    loss = ContrastiveDivergence(Exact(), 1, penalty=0.0, data_noise=d)(model, x, None, rng).detach()
    error = 3.3 * loss.std() / math.sqrt(n)
    assert abs(loss.mean() - d**2 / 2) < error < 0.01 * d**2 / 2


class Net(Energy):
    """With all that the negative phase must not disturb: dropout, a frozen parameter, a part in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, 1))
        self.net[0].bias.requires_grad_(False)
        self.net[2].eval()

    def forward(self, x, cond=None):
        shift = 0 if cond is None else cond
        return self.net(x)[:, 0] + shift


def flags(model):
    return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def test_the_negative_phase_disturbs_nothing():
    model, kernel = Net(), Still()
    before = flags(model)
    ContrastiveDivergence(kernel, 7)(model, torch.randn(5, 2), None, generator()).mean().backward()
    assert kernel.seen[0][1] == 7
    assert kernel.seen[0][3:] == ({False}, {False})
    assert flags(model) == before
    assert model.net[0].weight.grad is not None
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert flags(model) == before


def test_no_gradient_flows_through_the_chains():
    model = Bell()
    loss = ContrastiveDivergence(Langevin(0.1), 5, penalty=0.0)(model, torch.ones(4, 1, dtype=F64), None, generator())
    chains = 2 * model.s.detach() ** 2 * (((1 - 0.4) ** 2 / (2 * 1.3**2)) - loss.detach())  # (x- - m)^2
    (slope,) = torch.autograd.grad(loss.sum(), model.s)
    expected = (-(0.36 - chains) / 1.3**3).sum()  # of the energies alone, the chains held fixed
    torch.testing.assert_close(slope, expected)


# ---------------------------------------------------------------- the buffer


def test_rows_are_written_the_last_one_staying():
    assert last_of_each(torch.tensor([3, 1, 3, 0, 1])).tolist() == [3, 4, 2]
    buffer = ReplayBuffer([2], size=5)
    x = torch.arange(10.0).reshape(5, 2)
    buffer.write(torch.tensor([3, 1, 3, 0, 1]), x, torch.tensor([1, 2, 3, 4, 5]))
    assert buffer.age.tolist() == [4, 5, 0, 3, 0]
    assert buffer.x[:, 0].tolist() == [6.0, 8.0, 0.0, 4.0, 0.0]


def test_a_persistent_chain_goes_on_where_it_stopped_and_ages():
    """Chains that do not move, never begun anew: what comes out is what went in, one run older."""
    buffer = ReplayBuffer([2], size=16, reinit=0.0, initial="normal", scale=3.0)
    objective, model, kernel = ContrastiveDivergence(Still(), 1, start=buffer), Net(), Still()
    objective.kernel = kernel
    for k in range(40):
        held, ages = buffer.x.clone(), buffer.age.clone()
        streams = Streams.of(k, 4)
        slots = random.integers(16, (4,), Streams.of(k, 4))
        objective(model, torch.randn(4, 2), None, streams)
        begun = kernel.seen[-1][0]
        for row, slot in enumerate(slots.tolist()):
            if ages[slot] > 0:
                assert torch.equal(begun[row], held[slot])
            last = max(i for i, other in enumerate(slots.tolist()) if other == slot)
            assert torch.equal(buffer.x[slot], begun[last])
            assert buffer.age[slot] == ages[slot] + 1
        untouched = [i for i in range(16) if i not in slots.tolist()]
        assert torch.equal(buffer.x[untouched], held[untouched])
    assert bool((buffer.age > 0).all())
    assert int(buffer.age.sum()) == pytest.approx(160, abs=40)  # rows drawn twice in a batch count once


def test_the_share_begun_anew():
    """20,000 rows with chance 0.3: 0.3 +- 3.3 standard errors of 0.0032 (false alarm 0.1 %)."""
    buffer, n = ReplayBuffer([1], size=50, reinit=0.3, initial="uniform", scale=2.0), 20_000
    buffer.write(torch.arange(50), torch.full((50, 1), 7.0), torch.full((50,), 5))
    begun = buffer.begin(torch.zeros(n, 1), None, Streams.of(3, n))
    anew = begun.x[:, 0] != 7.0
    assert abs(float(anew.double().mean()) - 0.3) < 3.3 * math.sqrt(0.3 * 0.7 / n)
    assert torch.equal(begun.age == 0, anew)
    noise = begun.x[anew, 0].double()
    assert float(noise.abs().max()) <= 2
    assert float(noise.square().mean()) == pytest.approx(4 / 3, rel=0.04)  # variance of U(-2, 2); 3.4 standard errors
    counts = torch.bincount(begun.slots, minlength=50).double()
    assert float((counts - n / 50).square().sum() / (n / 50)) < 96  # chi-squared of 49 degrees: 0.01 %


def test_rows_depend_on_their_own_stream_only():
    buffer = ReplayBuffer([2], size=64, reinit=0.2)
    buffer.write(torch.arange(64), torch.randn(64, 2), torch.ones(64, dtype=torch.int64))
    whole = buffer.begin(torch.zeros(10, 2), None, Streams.of(5, 10))
    part = buffer.begin(torch.zeros(4, 2), None, Streams.of(5, 4, first=3))
    assert torch.equal(whole.x[3:7], part.x)
    assert torch.equal(whole.slots[3:7], part.slots)


def test_a_chain_keeps_the_label_it_was_begun_with():
    buffer = ReplayBuffer([2], size=4, reinit=0.0, labelled=True)
    kernel = Still()
    objective = ContrastiveDivergence(kernel, 1, start=buffer)
    for k in range(12):
        labels, before, age = torch.full((3,), k), buffer.label.clone(), buffer.age.clone()
        slots = random.integers(4, (3,), Streams.of(k, 3))
        objective(Net(), torch.zeros(3, 2), labels, Streams.of(k, 3))
        expected = torch.where(age[slots] == 0, labels, before[slots])
        assert torch.equal(kernel.seen[-1][2], expected)
        assert torch.equal(buffer.label[slots], torch.where(age[slots] == 0, buffer.label[slots], before[slots]))
    assert len(set(buffer.label.tolist())) > 1


def test_a_chain_that_diverged_is_begun_anew():
    buffer = ReplayBuffer([2], size=1000, reinit=0.0)
    slots = random.integers(1000, (4,), Streams.of(1, 4))
    assert len(set(slots.tolist())) == 4
    ContrastiveDivergence(Still(diverged=[1, 2]), 1, start=buffer)(Net(), torch.zeros(4, 2), None, Streams.of(1, 4))
    assert buffer.age[slots].tolist() == [1, 0, 0, 1]


def test_settling_once_for_all_parts_and_processes_is_settling_the_whole():
    """Two processes with two micro-batches each hold the same buffer as one with the whole batch."""
    model, x = Net().eval(), torch.randn(8, 2, generator=generator())
    whole, *halves = (
        ContrastiveDivergence(Langevin(0.1), 2, start=ReplayBuffer([2], size=6, reinit=0.1)) for _ in range(3)
    )
    for k in range(5):
        whole(model, x, None, Streams.of(k, 8))
        for rank, half in enumerate(halves):
            half.deferred = True
            for first in (4 * rank, 4 * rank + 2):
                half(model, x[first : first + 2], None, Streams.of(k, 2, first=first))
        sent = []
        for half in halves:
            sent.append([])
            copy.deepcopy(half).settle(lambda rows, out=sent[-1]: out.append(rows) or rows)
        both = [torch.cat(parts) for parts in zip(*sent)]
        for half in halves:
            received = iter(both)
            half.settle(lambda rows, received=received: next(received))
            for name, value in whole.state_dict().items():
                torch.testing.assert_close(half.state_dict()[name], value, equal_nan=True, msg=f"{name}, step {k}")


# ---------------------------------------------------------------- figures and the end


def test_diagnostics_are_what_they_say():
    model, kernel = Bell(m=0.0, s=1.0), Still()
    objective = ContrastiveDivergence(Langevin(0.1, noise=0.0), 3, start=FromNoise("uniform", 1e-6), data_noise=0.0)
    objective(model, torch.full((4, 1), 2.0, dtype=F64), None, generator())
    said = objective.diagnostics()
    assert set(said) == {"energy_data", "energy_chains", "energy_gap", "chain_move", "chain_age", "score_norm"}
    assert said["energy_data"] == pytest.approx(2.0)
    assert said["energy_gap"] == pytest.approx(-2.0, abs=1e-9)
    objective = ContrastiveDivergence(Langevin(0.1, noise=0.0), 3, start="data")
    objective(model, torch.full((4, 1), 2.0, dtype=F64), None, generator())
    end = 2.0 * 0.9**3  # gradient descent: x <- 0.9 x
    said = objective.diagnostics()
    assert said["score_norm"] == pytest.approx(end)
    assert said["chain_move"] == pytest.approx(2 - end)
    assert said["energy_chains"] == pytest.approx(end**2 / 2)
    objective.kernel = kernel
    objective(model, torch.full((4, 1), 1.0, dtype=F64), None, generator())
    assert objective.diagnostics()["energy_data"] == pytest.approx((2.0 + 0.5) / 2)
    assert "chain_acceptance" not in objective.diagnostics()  # the first kernel had none, and a mean with it has none


class Offset(Energy):
    """E = c on the data side (x = 1), 0 elsewhere."""

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(float(c)))

    def forward(self, x, cond=None):
        return self.c * (x[:, 0] == 1) + 0 * x[:, 0]


def test_stops_when_energies_or_the_gap_run_away():
    noise = FromNoise("normal", 0.1)
    objective = ContrastiveDivergence(Still(), 1, start=noise, stop=Stop(energy=50.0, gap=5.0, patience=3))
    x = torch.ones(4, 1)
    for value in (-6.0, -6.0, -1.0, -6.0, -6.0):  # never three in a row
        objective(Offset(value), x, None, generator())
    with pytest.raises(TrainingError, match=r"step 6: the energy gap .* is 6 .* stop.gap = 5 for 3 steps.*training.lr"):
        objective(Offset(-6.0), x, None, generator())
    with pytest.raises(TrainingError, match=r"step 7: the mean energy is 60 on the data .* stop.energy = 50"):
        objective(Offset(60.0), x, None, generator())
    with pytest.raises(TrainingError, match="step 8"):
        objective(Offset(math.nan), x, None, generator())


def test_chains_that_all_fail_end_training():
    class Failing(Still):
        def run(self, *args, **options):
            raise SamplingError("all 4 chains became infinite")

    with pytest.raises(TrainingError, match="the chains of step 1 failed: all 4 chains"):
        ContrastiveDivergence(Failing(), 1)(Net(), torch.zeros(4, 2))


def test_a_buffer_larger_than_memory(monkeypatch):
    monkeypatch.setattr(starts, "free_memory", lambda: 3 << 30)
    with pytest.raises(ArgumentError, match=r"1,000,000 events of shape \[3, 32, 32\] takes 11.5 GiB and 3 GiB"):
        ReplayBuffer([3, 32, 32], size=1_000_000)
    monkeypatch.undo()
    assert starts.free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ContrastiveDivergence(Still(), 0), "steps 0"),
        (lambda: ContrastiveDivergence(Still(), 1, penalty=-1), "penalty -1"),
        (lambda: ContrastiveDivergence(Still(), 1, start="dta"), "Did you mean 'data'"),
        (lambda: ReplayBuffer([2], reinit=1.5), "reinit 1.5"),
        (lambda: ReplayBuffer([2], initial="unifrm"), "Did you mean 'uniform'"),
        (lambda: FromNoise(scale=0.0), "scale is 0"),
        (lambda: Stop(gap=0.0), "gap > 0"),
        (lambda: ReplayBuffer([2]).begin(torch.zeros(3, 4), None, None), "holds events of shape"),
        (lambda: ReplayBuffer([2]).begin(torch.zeros(3, 2), torch.zeros(3), None), "without labels"),
        (lambda: ReplayBuffer([2], labelled=True).begin(torch.zeros(3, 2), torch.zeros(3, 5), None), "integer labels"),
    ],
)
def test_what_is_wrong_is_named(make, says):
    with pytest.raises(ArgumentError, match=says):
        make()
