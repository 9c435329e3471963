"""Six predictions, one change of basis."""

import itertools

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.fields import PREDICTIONS
from undiffuse.fields.prediction import convert, get
from undiffuse.paths import VE, VP, Karras, Linear, Trig
from worlds import PATHS

F64 = torch.float64
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def a_pair(path, n=64):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, n, 3, generator=generator, dtype=F64)
    t = torch.linspace(path.t_low, path.t_high, n, dtype=F64)
    return t, x_0, noise, path.perturb(x_0, t, noise)


def quantity(name, path, t, x_0, noise):
    """What each name means, by its own definition (not through the coefficients)."""
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    x_t = alpha * x_0 + sigma * noise
    if name == "score":  # of p(x_t | x_0), by autograd of the log-density
        point = x_t.clone().requires_grad_(True)
        log_density = (-0.5 * ((point - alpha * x_0) / sigma).square()).sum()
        return torch.autograd.grad(log_density, point)[0]
    if name == "velocity":  # d x_t / dt at fixed (x_0, eps), by autograd in t
        return torch.func.jvp(
            lambda u: path.alpha(u)[:, None] * x_0 + path.sigma(u)[:, None] * noise,
            (t,),
            (torch.ones_like(t),),
        )[1]
    if name == "edm":  # (x_0 - c_skip x) / c_out of Karras et al., table 1, at x / alpha and level sigma / alpha
        level, sd = sigma / alpha, 0.5
        skip, out = sd**2 / (level**2 + sd**2), level * sd / (level**2 + sd**2).sqrt()
        return (x_0 - skip * x_t / alpha) / out
    return {"data": x_0, "noise": noise, "noise-unscaled": noise, "v": alpha * noise - sigma * x_0}[name]


@every_path
@pytest.mark.parametrize("names", list(itertools.product(PREDICTIONS, PREDICTIONS)), ids="-".join)
def test_every_conversion(path, names):
    source, target = names
    if path in (PATHS["zero-snr-table"],):
        t, x_0, noise, _ = a_pair(path)
        t = t * 0.95  # its last knot has a derivative from the right only
        x_t = path.perturb(x_0, t.clamp(min=path.t_low), noise)
        t = t.clamp(min=path.t_low)
    else:
        t, x_0, noise, x_t = a_pair(path)
    given = quantity(source, path, t, x_0, noise)
    wanted = quantity(target, path, t, x_0, noise)
    got = convert(given, x_t, t, path, source=source, target=target)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@every_path
def test_data_and_noise_from_every_output(path):
    t, x_0, noise, x_t = a_pair(path)
    for prediction in PREDICTIONS.values():
        c = prediction.coefficients(path, t)
        output = c.target(x_0, noise)
        torch.testing.assert_close(c.data(output, x_t), x_0, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(c.noise(output, x_t), noise, rtol=1e-6, atol=1e-6)


@every_path
@pytest.mark.parametrize("name", PREDICTIONS)
def test_without_noise_the_estimate_is_the_state(path, name):
    if path is PATHS["ve"]:
        pytest.skip("never reaches sigma = 0")
    c = PREDICTIONS[name].coefficients(path, torch.tensor(path.t_min, dtype=F64))
    assert (c.c_skip, c.c_out) == (1, 0)


def test_edm_scales_are_those_of_the_paper():
    """c_in, c_skip, c_out, c_noise of Karras et al. 2022, table 1, at sigma = 2, sigma_data = 0.5."""
    c = PREDICTIONS["edm"].coefficients(Karras(), torch.tensor(2.0, dtype=F64), 0.5)
    assert float(c.c_skip) == pytest.approx(0.25 / 4.25, rel=1e-12)
    assert float(c.c_out) == pytest.approx(1.0 / 4.25**0.5, rel=1e-12)
    assert float(c.c_in) == pytest.approx(1 / 4.25**0.5, rel=1e-12)
    assert float(c.c_noise) == pytest.approx(0.25 * torch.log(torch.tensor(2.0, dtype=F64)).item(), rel=1e-12)


def test_edm_input_and_target_have_unit_variance():
    """Why EDM scales as it does: for data of variance sigma_data^2, c_in x_t and the target F both have variance 1."""
    for path in (Karras(), VP(), Linear()):
        t = torch.linspace(path.t_low, path.t_max, 50, dtype=F64)
        c = PREDICTIONS["edm"].coefficients(path, t, 0.3)
        variance_in = c.c_in.square() * (0.09 * path.alpha(t).square() + path.sigma(t).square())
        torch.testing.assert_close(variance_in, torch.ones_like(t))
        torch.testing.assert_close(0.09 * c.a.square() + c.b.square(), torch.ones_like(t))


def test_velocity_and_v_agree_on_the_trigonometric_path_only():
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    velocity, v = (PREDICTIONS[n].coefficients(Trig(), t) for n in ("velocity", "v"))
    torch.testing.assert_close(velocity.a, v.a * torch.pi / 2)
    torch.testing.assert_close(velocity.b, v.b * torch.pi / 2)
    velocity, v = (PREDICTIONS[n].coefficients(Linear(), t) for n in ("velocity", "v"))
    assert (velocity.a / v.a - velocity.b / v.b).abs().max() > 8  # at t = 0.1: 10 against 10 / 9


def test_unknown_prediction_offers_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'velocity'"):
        get("velocty")


def test_unscaled_noise_is_ncsnpps_parametrisation():
    """score = h / sigma of Song et al. 2021: eps = -h, the input is x_t itself, the label log sigma."""
    path = VE(0.02, 100.0)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    c = get("noise-unscaled").coefficients(path, t)
    sigma = 0.02 * 5000**t
    torch.testing.assert_close(c.c_in, torch.ones(3, dtype=F64))
    torch.testing.assert_close(c.c_noise, sigma.log())
    x_t, h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(-c.noise(-h, x_t) / sigma[:, None], h / sigma[:, None])
    torch.testing.assert_close(c.data(-h, x_t), x_t + sigma[:, None] * h)
