"""`sample` with a Markov kernel: the same chains as `kernel.run`, and what makes no sense is refused."""

import math

import pytest
import torch
from torch import nn

import undiffuse as ud
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.core.random import Streams


def energy(scale: float = 1.0) -> ud.Energy:
    return ud.FunctionEnergy(lambda x: x.square().sum(1) / (2 * scale**2))


def test_a_chain_of_a_name_has_its_law():
    """A Gaussian of width 0.2 from starts of width 1: after 200 steps of 0.01 nothing is left of them (0.75^200), and
    the variance of 8,000 numbers is known to 4 x 1.6 %. Unadjusted: `v / (1 - step / 2v)`, 14 % wider."""
    law = ud.sample(energy(0.2), (4_000, 2), solver="mala", steps=200, seed=0)
    assert law.var().item() == pytest.approx(0.04, rel=0.06)
    law = ud.sample(energy(0.2), (4_000, 2), solver="langevin", steps=200, seed=0)
    assert law.var().item() == pytest.approx(0.04 / (1 - 0.01 / 0.08), rel=0.06)


def test_the_chains_are_those_of_the_kernel():
    kernel, streams = ud.HMC(0.3, 4), Streams.of(5, 7)
    start = streams.normal((7, 3))
    ran = kernel.run(energy(), start, 11, generator=streams, keep=True)
    drawn = ud.sample(energy(), (7, 3), solver=kernel, steps=11, seed=5, return_info=True)
    torch.testing.assert_close(drawn.x, ran.x, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(drawn.trajectory), torch.cat([start[None], ran.samples]), rtol=0, atol=0)
    assert drawn.nfe == ran.evals == 1 + 4 * 11
    again = ud.sample(energy(), noise=start, solver=kernel, steps=11, seed=5)
    torch.testing.assert_close(again, drawn.x, rtol=0, atol=0)
    alone = ud.sample(energy(), (3, 3), solver=kernel, steps=11, seed=5)
    torch.testing.assert_close(alone, drawn.x[:3])


def test_a_denoiser_is_sampled_at_its_least_noise():
    """Langevin on `p_t` at t_low of a Gaussian: variance 0.25 and the step's bias of 2 %, to 4 x 2.2 % of chance."""
    path = ud.Karras(sigma_min=0.002)
    denoiser = ud.Gaussian(torch.zeros(1), 0.5).denoiser(path)
    x = ud.sample(denoiser, (4_000, 1), solver="langevin", steps=200, seed=1)
    assert x.var().item() == pytest.approx(0.25 / (1 - 0.01 / 0.5), rel=0.09)
    with pytest.raises(ArgumentError, match="energy_and_score"):
        ud.sample(denoiser, (4, 1), solver="mala")


def test_dtype_condition_and_modes():
    seen = {}

    class Labelled(ud.Energy):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x, cond=None):
            seen["mode"], seen["cond"] = self.training, cond
            return (x - cond[:, None]).square().sum(1) * self.weight

    model, cond = Labelled(), torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    x = ud.sample(model, (3, 50), solver=ud.Langevin(0.05), steps=100, cond=cond, seed=2)
    assert x.dtype == torch.float64
    assert (x.mean(1) - cond).abs().max() < 4 * math.sqrt(0.5 / 50)
    assert seen["mode"] is False
    assert model.training is True
    with pytest.raises(ArgumentError, match="one row for each of 3"):
        ud.sample(model, (3, 50), solver="langevin", cond=cond[:2])


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match="is a Markov kernel"):
        ud.sample(energy(), (3, 2), solver="langevin", grid="time")
    with pytest.raises(ArgumentError, match="follows a path"):
        ud.sample(energy(), (3, 2))
    with pytest.raises(ArgumentError, match="Did you mean 'langevin'"):
        ud.sample(energy(), (3, 2), solver="langvin")
    with pytest.raises(ArgumentError, match=r"give the object, ParallelTempering\("):
        ud.sample(energy(), (3, 2), solver="parallel-tempering")
    with pytest.raises(SamplingError, match="smaller step"):
        ud.sample(energy(1e-9), (3, 2), solver="langevin", steps=2000, seed=0)


def test_chains_that_fail_are_named_and_the_others_kept():
    def broken(x):
        return torch.where(x[:, 0] > 1.5, torch.nan, 1.0) * x.square().sum(1) / 2

    with pytest.warns(UserWarning, match="chains became infinite or NaN"):
        x = ud.sample(ud.FunctionEnergy(broken), (200, 2), solver=ud.Langevin(0.1), steps=50, seed=0)
    assert bool(torch.isfinite(x).all())
