"""The loop that runs Markov kernels: what it keeps, what it refuses, and chains that fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from solvers.transitions import F64, Chosen, Spread, Wavy
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams
from undiffuse.fields.energy import Energy, FunctionEnergy, NetworkEnergy, ScoreNetwork
from undiffuse.solvers.hamiltonian import HMC
from undiffuse.solvers.langevin import MALA, Langevin, Underdamped

KERNELS = {
    "langevin": lambda **kw: Langevin(0.1, **kw),
    "mala": lambda **kw: MALA(0.4, **kw),
    "underdamped": lambda **kw: Underdamped(0.5, 0.7, **kw),
    "hmc": lambda **kw: HMC(0.5, 3, **kw),
}


class Ramp(nn.Module):
    """Score 1 up to x = 6, NaN (or infinite) beyond: with step 1 and no noise, x grows by 1 a step."""

    def __init__(self, beyond: float = math.nan):
        super().__init__()
        self.beyond = beyond

    def score(self, x, cond=None):
        return torch.where(x > 5.5, self.beyond, 1.0)


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_a_chain_that_fails_stays_and_the_others_go_on(beyond):
    x = torch.tensor([[0.0, 0.0], [3.0, -50.0], [-100.0, -100.0], [-90.0, 1.0]])
    run = Langevin(1.0, noise=0.0).run(Ramp(beyond), x, 10)
    # Row 1 is at 6 after steps 0, 1, 2 and fails in step 3; row 0 in step 6; row 3 (second value) in step 5.
    assert run.diverged == {1: 3, 3: 5, 0: 6}
    assert torch.equal(run.x, torch.tensor([[6.0, 6.0], [6.0, -47.0], [-90.0, -90.0], [-85.0, 6.0]]))
    assert not x.equal(run.x)


def test_all_chains_failing_is_an_error_that_names_the_step():
    x = torch.tensor([[0.0], [3.0]])
    with pytest.raises(SamplingError, match=r"all 2 chains.*last in step 6, the first in step 3.*smaller step.*clip"):
        Langevin(1.0, noise=0.0).run(Ramp(), x, 10)


def test_a_step_that_is_too_large():
    """Langevin on N(0, v) multiplies x by 1 - step / v: for step = 4 v by -3, so 1e-3 passes 3.4e38 in step 87."""
    with pytest.raises(SamplingError, match=r"in step 87, the first in step 87\. Try a smaller step size"):
        Langevin(4.0, noise=0.0).run(Spread(1.0), torch.full((1, 1), 1e-3), 200)


class Holed(Energy):
    """A Gaussian with another energy where x > 1."""

    def __init__(self, inside: float):
        super().__init__()
        self.inside = inside

    def forward(self, x, cond=None):
        return torch.where(x[:, 0] > 1, self.inside, x[:, 0].square() / 2)

    def energy_and_score(self, x, cond=None):
        return self(x), -x


def test_infinite_energy_is_density_zero_and_nan_stops():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(300, 1)
    walled = MALA(1.0).run(Holed(math.inf), x, 40, generator=generator)
    assert walled.diverged == {}
    assert float(walled.x.max()) <= 1
    steps, seen = [], []
    for energy in (math.nan, -math.inf):
        seen.clear()
        try:
            run = HMC(1.0, 1).run(
                Holed(energy), x, 4, generator=torch.Generator().manual_seed(1), callback=lambda i, x: seen.append(x)
            )
        except SamplingError:
            pytest.fail("some chains never met the hole")
        steps.append(run.diverged)
        assert 0 < len(run.diverged) < 300
        for row, step in run.diverged.items():
            before = seen[step - 1][row] if step else x[row]
            assert all(torch.equal(later[row], before) for later in seen[step:])
    assert steps[0] == steps[1]
    assert not set(steps[0]) & {int(i) for i in (run.x[:, 0] > 1).nonzero()}


def test_bad_starts_are_named():
    x = torch.zeros(5, 2)
    x[1, 0], x[3, 1] = math.nan, math.inf
    with pytest.raises(ArgumentError, match=r"2 of 5 starting states.*rows 1, 3"):
        Langevin(0.1).run(Spread(1.0, 1.0), x, 3)
    with pytest.raises(ArgumentError, match=r"1 of 2 starting states have an energy.*rows 1"):
        MALA(0.1).run(Holed(math.inf), torch.tensor([[0.0], [2.0]]), 3)


def test_targets_of_another_shape():
    x = torch.zeros(4, 2)
    wrong = FunctionEnergy(lambda x: x.square())
    for kernel in (Langevin(0.1), MALA(0.1), HMC(0.1, 2), Underdamped(0.1)):
        with pytest.raises(ArgumentError, match=r"shape \(4, 2\) for x of shape \(4, 2\): expected one number"):
            kernel.run(wrong, x, 2)

    class Short(nn.Module):
        def score(self, x, cond=None):
            return x[:, :1]

    with pytest.raises(ArgumentError, match=r"score has shape \(4, 1\)"):
        Langevin(0.1).run(Short(), x, 2)
    with pytest.raises(ArgumentError, match="ScoreNetwork has no `energy_and_score`"):
        MALA(0.1).run(ScoreNetwork(nn.Identity()), x, 2)


@pytest.mark.parametrize(
    "counts", [{"steps": 0}, {"steps": -1}, {"steps": 2.0}, {"steps": 3, "burn_in": -1}, {"steps": 3, "thin": 0}]
)
def test_bad_counts_are_refused(counts):
    with pytest.raises(ArgumentError, match="expected a whole number"):
        Langevin(0.1).run(Spread(1.0), torch.zeros(2, 1), **counts)


def test_what_is_kept():
    """burn_in 3, then every second of 7: the states after steps 4, 6, 8, the same run seen by a callback."""
    seen = []
    arguments = {"burn_in": 3, "callback": lambda index, x: seen.append((index, x))}
    run = Langevin(0.1).run(
        Wavy(), torch.zeros(5, 2), 7, thin=2, keep=True, generator=torch.Generator().manual_seed(0), **arguments
    )
    assert [index for index, _ in seen] == list(range(10))
    assert torch.equal(run.samples, torch.stack([seen[i][1] for i in (4, 6, 8)]))
    assert torch.equal(run.x, seen[9][1])
    with pytest.raises(ArgumentError, match="no state would be kept"):
        Langevin(0.1).run(Wavy(), torch.zeros(5, 2), 3, thin=4, keep=True)


def test_acceptance_is_the_mean_after_burn_in():
    chances = []
    kernel, x = MALA(2.0), torch.zeros(6, 1, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    run = kernel.run(Wavy(), x, 5, burn_in=4, generator=generator)
    draw, state = torch.Generator().manual_seed(0), kernel.init(Wavy(), x)
    for _ in range(9):
        z = torch.randn(6, 1, dtype=F64, generator=draw)
        chosen = Chosen(z)
        uniform = torch.rand(6, generator=draw, dtype=F64)
        chosen.uniform = lambda u=uniform: u
        x, state = kernel.step(Wavy(), x, state, chosen)
        chances.append(kernel.acceptance(state))
    assert torch.equal(run.x, x)
    assert torch.allclose(run.acceptance, torch.stack(chances[4:]).mean(0))
    assert Langevin(0.1).run(Wavy(), x, 2).acceptance is None


@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_does_not_depend_on_its_neighbours(name):
    """Streams: the first two of five chains are, bit for bit, the run of two."""
    x = torch.linspace(-2, 2, 10, dtype=F64).reshape(5, 2)
    many = KERNELS[name]().run(Wavy(), x, 15, generator=Streams.of(3, 5)).x
    few = KERNELS[name]().run(Wavy(), x[:2], 15, generator=Streams.of(3, 2)).x
    other = KERNELS[name]().run(Wavy(), x[:2], 15, generator=Streams.of(4, 2)).x
    assert torch.equal(many[:2], few)
    assert not torch.allclose(few, other)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "matrix"])
def test_preconditioning_undoes_any_scale(name, diagonal):
    """P = the covariance: chains on N(0, P), condition 1e8, are L times those on N(0, I) from the same numbers."""
    covariance = torch.diag(torch.tensor([1e4, 1.0, 1e-4], dtype=F64))
    if not diagonal:
        turn = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
        covariance = turn @ covariance @ turn.T
        covariance = (covariance + covariance.T) / 2
    precision, factor = torch.linalg.inv(covariance), torch.linalg.cholesky(covariance)

    class Gaussian(Energy):
        def energy_and_score(self, x, cond=None):
            pull = x @ precision
            return (x * pull).sum(1) / 2, -pull

    y = torch.randn(40, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    given = covariance.diagonal() if diagonal else covariance
    plain = KERNELS[name]().run(Spread(1.0, 1.0, 1.0), y, 20, generator=torch.Generator().manual_seed(2))
    skewed = KERNELS[name](preconditioner=given).run(
        Gaussian(), y @ factor.T, 20, generator=torch.Generator().manual_seed(2)
    )
    back = torch.linalg.solve_triangular(factor, skewed.x.T, upper=False).T
    assert torch.allclose(back, plain.x, atol=1e-6)


def test_preconditioners_that_do_not_fit():
    x = torch.zeros(4, 3)
    for bad, words in (
        (torch.ones(2), r"shape \(2,\): expected an event's, \(3,\), or \(3, 3\)"),
        (torch.tensor([1.0, 0.0, 1.0]), "smallest entry is 0"),
        (torch.diag(torch.tensor([1.0, -1.0, 1.0])), "not positive definite"),
        (torch.ones(3, 3).triu(), "not symmetric"),
    ):
        with pytest.raises(ArgumentError, match=words):
            MALA(0.1, preconditioner=bad).run(Wavy(), x, 2)


def test_the_target_is_evaluated_and_put_back():
    """Dropout is off during a run and on after it; no gradient is recorded; x is not written to."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(2, 1), nn.Dropout(0.5)
            self.dropout.eval()
            self.seen: list[bool] = []

        def forward(self, x, c_noise, cond):
            self.seen.append(self.training or self.linear.training)
            return self.linear(x) + 0 * cond

    energy = NetworkEnergy(Net(), prior_std=1.0).train()
    energy.net.dropout.eval()
    x, cond = torch.zeros(3, 2, requires_grad=True), torch.ones(3, 1)
    run = MALA(0.1).run(energy, x, 4, cond=cond, generator=torch.Generator().manual_seed(0))
    assert energy.net.seen == [False] * 5
    assert energy.training
    assert energy.net.linear.training
    assert not energy.net.dropout.training
    assert not run.x.requires_grad
    assert float(x.detach().abs().sum()) == 0
    assert all(p.grad is None for p in energy.parameters())


def test_events_of_any_shape():
    """Images and scalars: the variance of N(0, 1) in each place. 4,000 x 12 values: standard error 0.65 %."""

    class Normal(Energy):
        def forward(self, x, cond=None):
            return x.square().reshape(len(x), -1).sum(1) / 2

    generator = torch.Generator().manual_seed(0)
    for shape in ((4000, 3, 2, 2), (48000,)):
        run = HMC(0.7, 2).run(Normal(), torch.zeros(shape), 15, generator=generator)
        assert float(run.x.var()) == pytest.approx(1.0, abs=0.026)


def test_an_energy_that_wants_its_rows_in_memory():
    """Many chains of few values lie side by side in memory; an energy that takes a view of x gets rows, same answer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, dtype=F64, generator=generator)
    laid_out: list[bool] = []

    def viewed(y):
        return y.view(-1).view(-1, 2).square().sum(1) / 2

    def plain(y):
        laid_out.append(y.is_contiguous())
        return y.square().sum(1) / 2

    ends = [
        kernel.run(FunctionEnergy(f), x, 5, generator=torch.Generator().manual_seed(1)).x
        for kernel in (Langevin(0.1), HMC(0.3, 2))
        for f in (viewed, plain)
    ]
    assert not any(laid_out)
    assert all(end.is_contiguous() for end in ends)
    assert torch.allclose(ends[0], ends[1], atol=1e-12)
    assert torch.allclose(ends[2], ends[3], atol=1e-12)
    with pytest.raises(RuntimeError, match="invalid for input"):
        Langevin(0.1).run(FunctionEnergy(lambda y: y.view(7, -1).sum(1)), x, 5)


def test_denormals_are_zero_while_chains_run_only():
    def tiny() -> float:
        return float(torch.tensor(1e-30) * torch.tensor(1e-10))

    seen = []

    def energy(x):
        seen.append(tiny())
        return x.square().sum(1)

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    torch.set_flush_denormal(False)
    Langevin(0.1).run(FunctionEnergy(energy), torch.zeros(2, 2), 1)
    assert (seen, tiny() > 0) == ([0.0], True)
    with pytest.raises(ArgumentError):
        Langevin(0.1).run(FunctionEnergy(lambda x: x), torch.zeros(2, 2), 1)
    assert tiny() > 0
    torch.set_flush_denormal(True)  # a caller who wants it keeps it
    Langevin(0.1).run(FunctionEnergy(energy), torch.zeros(2, 2), 1)
    kept = tiny()
    torch.set_flush_denormal(False)
    assert kept == 0.0
