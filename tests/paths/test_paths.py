"""Every derived quantity of every path against autograd, quadrature, composition and Bayes' rule."""

import math

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams
from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, Tabulated, Trig, change_of_path
from worlds import PATHS

F64 = torch.float64
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def inside(path: Path, n: int = 997) -> torch.Tensor:
    """Times in the open path, off the knots of the tables."""
    u = (torch.arange(n, dtype=F64) + 0.4217) / n
    return path.t_min + (path.t_max - path.t_min) * u


def autograd(function, t):
    t = t.clone().requires_grad_(True)
    value = function(t)
    return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def close(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@every_path
def test_declared_derivatives_equal_autograd(path):
    t = inside(path)
    close(path.alpha_dot(t), autograd(path.alpha, t))
    close(path.sigma_dot(t), autograd(path.sigma, t))
    close(path.variance_dot(t), autograd(lambda u: path.sigma(u).square(), t))


@every_path
def test_the_linear_sde_has_the_marginals(path):
    """Moments of dx = f x dt + g dw obey m' = f m and V' = 2 f V + g^2 (Lemma 4.4.1)."""
    t = inside(path)
    close(autograd(path.alpha, t), path.drift(t) * path.alpha(t))
    variance_dot = autograd(lambda u: path.sigma(u).square(), t)
    close(2 * path.drift(t) * path.sigma(t).square() + path.diffusion(t).square(), variance_dot, rtol=1e-8)
    # -lambda' = g^2 / (2 sigma^2) = omega / (alpha sigma)
    snr_dot = autograd(path.half_log_snr, t)
    close(-snr_dot, path.diffusion(t).square() / (2 * path.sigma(t).square()), rtol=1e-8)
    close(-snr_dot, path.omega(t) / (path.alpha(t) * path.sigma(t)), rtol=1e-8)


@every_path
def test_inverses(path):
    t = inside(path)
    close(path.time_of(path.half_log_snr(t)), t, atol=1e-10)
    close(path.time_of_angle(path.angle(t)), t, atol=1e-10)
    close(Path._time_of_pair(path, path.alpha(t), path.sigma(t)), t, atol=1e-10)  # by bisection
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    close(path.time_of_angle(path.angle(ends)), ends, atol=1e-12)
    low_high = torch.tensor([path.t_low, path.t_high], dtype=F64)
    assert torch.isfinite(path.half_log_snr(low_high)).all()


@every_path
def test_inverses_in_float32(path):
    t = torch.linspace(path.t_low, path.t_high, 101)
    back = path.time_of(path.half_log_snr(t))
    # Near t_high of a path with alpha = 0 the half log-SNR itself has few digits of t left.
    assert ((back - t).abs() <= 2e-4 * t + 1e-6).all()


@every_path
def test_both_ends_are_regular(path):
    ends = torch.tensor([path.t_min, path.t_max], dtype=F64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    assert alpha[0] == 1
    assert sigma[0] == (0.01 if isinstance(path, VE) else 0)
    if path.t_high < path.t_max:
        assert alpha[1] == 0
        assert sigma[1] == 1
    for quantity in (
        path.angle,
        path.variance_dot,
        path.drift,
        path.diffusion,
        path.noise_label,
        path.input_scale,
    ):
        assert not torch.isnan(quantity(ends)).any(), quantity


def test_values_by_hand():
    t = torch.tensor(0.5, dtype=F64)
    b = 0.1 * 0.5 + 0.5 * 19.9 * 0.25
    close(VP().alpha(t), torch.tensor(math.exp(-b / 2), dtype=F64))
    close(VP().sigma(t), torch.tensor(math.sqrt(1 - math.exp(-b)), dtype=F64))
    close(PATHS["sub-vp"].sigma(t), torch.tensor(1 - math.exp(-b), dtype=F64))
    close(VE(0.01, 50.0).sigma(t), torch.tensor(math.sqrt(0.01 * 50), dtype=F64))
    close(Trig().alpha(t), torch.tensor(math.sqrt(0.5), dtype=F64))
    phi, phi_0 = 0.508 / 1.008 * math.pi / 2, 0.008 / 1.008 * math.pi / 2
    close(Cosine().alpha(t), torch.tensor(math.cos(phi) / math.cos(phi_0), dtype=F64))
    close(Linear().diffusion(t), torch.tensor(math.sqrt(2.0), dtype=F64))  # g^2 = 2 t / (1 - t)
    close(Karras().diffusion(torch.tensor(3.0, dtype=F64)), torch.tensor(math.sqrt(6.0), dtype=F64))


def test_tables_pass_through_their_levels():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    path = Tabulated.from_betas(betas)
    t = torch.arange(1, 1001, dtype=F64) / 1000
    close(path.alpha(t).square(), torch.cumprod(1 - betas, 0), rtol=1e-8)
    close(path.alpha(t).square() + path.sigma(t).square(), torch.ones(1000, dtype=F64))
    sigmas = torch.logspace(-2, 1, 10, dtype=F64)
    close(Tabulated.from_sigmas(sigmas).sigma(torch.arange(1, 11, dtype=F64) / 10), sigmas, rtol=1e-8)
    assert (
        Tabulated.from_sigmas(sigmas) == Tabulated.from_sigmas(sigmas.clone()) != Tabulated.from_sigmas(1.01 * sigmas)
    )
    assert hash(Tabulated.from_sigmas(sigmas)) == hash(Tabulated.from_sigmas(sigmas.clone()))
    # Linear in the half log-SNR between two levels: the geometric mean of the sigmas half-way.
    close(
        Tabulated.from_sigmas(sigmas).sigma(torch.tensor([0.25], dtype=F64)),
        (sigmas[1] * sigmas[2]).sqrt()[None],
    )


@every_path
def test_transitions_compose(path):
    """p(x_u | x_s) = integral of p(x_u | x_t) p(x_t | x_s), and from t_min it is the marginal."""
    times = inside(path, 60)
    s, t, u = times[:20], times[20:40], times[40:]
    scale_st, std_st = path.transition(s, t)
    scale_tu, std_tu = path.transition(t, u)
    scale_su, std_su = path.transition(s, u)
    close(scale_su, scale_st * scale_tu)
    close(std_su.square(), scale_tu.square() * std_st.square() + std_tu.square(), rtol=1e-8)
    close(scale_st * path.alpha(s), path.alpha(t))
    close(scale_st.square() * path.sigma(s).square() + std_st.square(), path.sigma(t).square(), rtol=1e-8)


@every_path
def test_posterior_is_bayes_rule(path):
    """Precision and information of p(x_s | x_t, x_0) add up from p(x_s | x_0) and p(x_t | x_s)."""
    times = inside(path, 40)
    s, t = times[:20], times[20:]
    generator = torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, 20, 3, generator=generator, dtype=F64)
    mean, std = path.posterior(x_t, x_0, t, s)
    scale, step_std = path.transition(s, t)
    precision = 1 / path.sigma(s).square() + (scale / step_std).square()
    information = (path.alpha(s) / path.sigma(s).square())[:, None] * x_0 + (scale / step_std.square())[:, None] * x_t
    close(std.square(), 1 / precision, rtol=1e-7)
    close(mean, information / precision[:, None], rtol=1e-7, atol=1e-9)


def test_posterior_at_both_ends():
    x_0, x_t = torch.full((2, 3), 2.0, dtype=F64), torch.full((2, 3), 5.0, dtype=F64)
    one, half, zero = (torch.tensor(v, dtype=F64) for v in (1.0, 0.5, 0.0))
    mean, std = Linear().posterior(x_t, x_0, one, half)  # alpha_t = 0: x_t says nothing of x_s
    close(mean, 0.5 * x_0)
    close(std, half)
    mean, std = Linear().posterior(x_t, x_0, half, zero)  # sigma_s = 0: x_s is x_0
    close(mean, x_0)
    assert std == 0


@every_path
def test_ddpm_ancestral_coefficients(path):
    """Posterior variance in Ho et al.'s form: (1 - abar_{t-1}) / (1 - abar_t) beta_t on the DDPM table."""
    if path is not PATHS["ddpm-table"]:
        pytest.skip("a statement about one table")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    abar = torch.cumprod(1 - betas, 0)
    i = torch.tensor([5, 400, 999])
    zeros = torch.zeros(3, 1, dtype=F64)
    ones = torch.ones(3, 1, dtype=F64)
    t, s = (i + 1) / torch.tensor(1000, dtype=F64), i / torch.tensor(1000, dtype=F64)
    on_x_0, std = path.posterior(zeros, ones, t, s)
    close(std.square(), (1 - abar[i - 1]) / (1 - abar[i]) * betas[i], rtol=1e-6)
    close(on_x_0[:, 0], abar[i - 1].sqrt() * betas[i] / (1 - abar[i]), rtol=1e-6)


@every_path
@pytest.mark.parametrize("source", [VP(), Linear(), Karras()], ids=["vp", "linear", "karras"])
def test_change_of_path(source, path):
    """Prop. 6.3.3: c (alpha_tau, sigma_tau) on the source is (alpha_t, sigma_t) on the target."""
    t = inside(path)
    t = t[(path.angle(t) <= source.angle(torch.tensor(source.t_max, dtype=F64)))]
    tau, scale = change_of_path(source, path, t)
    close(scale * source.alpha(tau), path.alpha(t), atol=1e-10)
    close(scale * source.sigma(tau), path.sigma(t), atol=1e-10)


@every_path
@pytest.mark.parametrize("source", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_beyond_the_source_s_end_is_its_end(source, path, dtype):
    """Where alpha or sigma is 0 on the target too, as at the first step of a sampler on Linear."""
    for end, own, sign in ((path.t_max, source.t_max, 1), (path.t_min, source.t_min, -1)):
        time, last = torch.tensor(end, dtype=dtype), torch.tensor(own, dtype=dtype)
        tau, scale = change_of_path(source, path, time)
        assert torch.isfinite(scale)
        assert source.t_min <= tau <= source.t_max
        if sign * path.angle(time) >= sign * source.angle(last):
            close(tau, last, rtol=1e-5)


def test_monograph_form_of_the_change_of_path():
    """On the canonical path tau = sigma / (alpha + sigma) and c = alpha + sigma."""
    t = inside(VP())
    tau, scale = change_of_path(Linear(), VP(), t)
    close(tau, VP().sigma(t) / (VP().alpha(t) + VP().sigma(t)))
    close(scale, VP().alpha(t) + VP().sigma(t))


def test_perturb_and_prior():
    path = Karras()
    x_0, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    close(path.perturb(x_0, torch.tensor([1.0, 2.0]), noise)[:, 0, 0, 0], torch.tensor([4.0, 7.0]))
    x = path.prior((20000,), torch.Generator().manual_seed(0))
    assert abs(x.std().item() / 80 - 1) < 0.015  # 3 standard errors of a standard deviation: 3 / sqrt(2 n)
    normal = torch.distributions.Normal(0.0, 80.0)
    points = torch.tensor([[1.0, -20.0], [100.0, 3.0]])
    close(path.prior_log_prob(points), normal.log_prob(points).sum(1), rtol=1e-5)


def test_a_path_of_two_lines_gets_everything_else():
    """alpha and sigma alone: derivatives by autograd, inverse by bisection."""

    class Quadratic(Path):
        def alpha(self, t):
            return 1 - t**2

        def sigma(self, t):
            return t

    t = inside(Quadratic())
    close(Quadratic().alpha_dot(t), -2 * t)
    close(Quadratic().drift(t), -2 * t / (1 - t**2))
    close(Quadratic().time_of(Quadratic().half_log_snr(t)), t, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(beta_min=-1.0),
        lambda: VP(beta_min=20.0, beta_max=0.1),
        lambda: VE(sigma_min=0.0),
        lambda: Karras(sigma_min=3.0, sigma_max=1.0),
        lambda: Cosine(offset=2.0),
        lambda: Linear(t_low=0.9, t_high=0.1),
        lambda: Karras(sigma_max=float("nan")),
        lambda: Tabulated.from_betas(torch.tensor([0.1, 1.2])),
        lambda: Tabulated.from_betas(torch.tensor([0.1])),
        lambda: Tabulated.from_sigmas(torch.tensor([3.0, 1.0])),
    ],
)
def test_wrong_schedules_are_refused(make):
    with pytest.raises(ArgumentError):
        make()


@every_path
def test_times_outside_the_path_are_refused(path):
    x = torch.zeros(2, 3)
    for t in (path.t_min - 0.1, path.t_max + 0.1, float("nan")):
        with pytest.raises(ArgumentError, match="outside the path"):
            path.perturb(x, torch.tensor(t), x)
    middle = torch.tensor(0.5 * path.t_max)
    with pytest.raises(ArgumentError, match="s < t"):
        path.transition(middle, middle)


class Unit(Streams):
    """Draw k is 1 in row k + 1 and 0 elsewhere; row 0 draws nothing: what is made of them is read off row by row."""

    def normal(self, shape, *, dtype=torch.float32, device=None):
        self.draw += 1
        return torch.eye(shape[0], dtype=dtype)[self.draw].reshape(shape)


@every_path
def test_simulated_paths_have_the_covariance_of_the_process(path):
    """The states are linear in x_0 and the draws: unit draws give their joint covariance, without sampling.

    Row 0 has x_0 = 1. Given x_0, the covariance of x_s and x_t is `alpha_t / alpha_s sigma_s^2` (Lemma 4.4.1).
    """
    times = path.t_min + (path.t_max - path.t_min) * torch.tensor([0.0, 0.13, 0.4017, 0.8, 1.0], dtype=F64)
    x_0 = torch.zeros(6, 1, dtype=F64)
    x_0[0] = 1
    states = path.simulate(x_0, times, Unit.of(0, 6))[:, :, 0]
    alpha, sigma = path.alpha(times), path.sigma(times)
    close(states[:, 0], alpha)
    covariance = states[:, 1:] @ states[:, 1:].T
    for i in range(5):
        for j in range(i, 5):
            kept = alpha[j] / alpha[i] if j > i else torch.ones((), dtype=F64)
            close(covariance[i, j], kept * sigma[i].square())


@pytest.mark.parametrize("times", [[0.5, 0.5], [0.5, 0.2], []])
def test_times_of_a_simulation_must_increase(times):
    with pytest.raises(ArgumentError, match="strictly increasing"):
        Linear().simulate(torch.zeros(2, 1), torch.tensor(times))
    with pytest.raises(ArgumentError, match="outside the path"):
        Linear().simulate(torch.zeros(2, 1), torch.tensor([0.5, 1.2]))
