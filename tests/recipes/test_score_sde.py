"""The rows of Song et al. 2021 as recipes, against the numbers of score_sde_pytorch's configurations."""

import math
from typing import NamedTuple

import pytest
import torch

import undiffuse as ud
from undiffuse.integrations.score_sde import CONFIGS
from undiffuse.nets import NETS
from undiffuse.nets.presets import preset
from undiffuse.objectives.weights import Likelihood
from undiffuse.paths import geometric_levels
from undiffuse.recipes import build, list_recipes
from undiffuse.recipes.generate import Sampler
from undiffuse.recipes.paths import ALL_PATHS
from undiffuse.recipes.schema import FactsSection
from undiffuse.recipes.tables import make, resolve
from undiffuse.solvers import make_grid
from undiffuse.training.config import TrainConfig
from undiffuse.training.ema import HalfLife
from undiffuse.training.optim import clip_gradients, make_optimizers, move


class Row(NamedTuple):
    """What their configuration says, and the trainable parameters counted on their code."""

    config: str
    parameters: int
    steps: int = 1_300_000
    solver: str = "euler-maruyama"
    calls: int = 1000
    batch: int = 128
    rate: float = 0.9999
    snr: float | None = None
    size: int = 32


def exploding(config, parameters, steps=1_300_000, calls=1999, rate=0.999, snr=0.16, **more):
    return Row(config, parameters, steps, "reverse-diffusion", calls, rate=rate, snr=snr, **more)


LEVELS = {"solver": "reverse-diffusion"}
# The deep net of VE has 256 features of the noise level, that of VP 128: 128 x 512 weights less.
DEEP_VP = 107_586_947 - 128 * 512
ROWS = {
    "cifar10-ddpm-vp-discrete": Row("vp/ddpm/cifar10", 35_218_947, **LEVELS),
    "cifar10-ddpm-vp": Row("vp/ddpm/cifar10_continuous", 35_218_947),
    "cifar10-ddpm-subvp": Row("subvp/cifar10_ddpm_continuous", 35_218_947),
    "cifar10-ddpmpp-vp-discrete": Row("vp/cifar10_ddpmpp", 61_804_419, **LEVELS),
    "cifar10-ddpmpp-vp": Row("vp/cifar10_ddpmpp_continuous", 61_804_419),
    "cifar10-ddpmpp-vp-deep": Row("vp/cifar10_ddpmpp_deep_continuous", 106_632_579, 950_000),
    "cifar10-ddpmpp-subvp": Row("subvp/cifar10_ddpmpp_continuous", 61_804_419),
    "cifar10-ddpmpp-subvp-deep": Row("subvp/cifar10_ddpmpp_deep_continuous", 106_632_579, 950_000),
    "cifar10-ncsnpp-vp-discrete": Row("vp/cifar10_ncsnpp", 62_693_251, **LEVELS),
    "cifar10-ncsnpp-vp": Row("vp/cifar10_ncsnpp_continuous", 62_693_251),
    "cifar10-ncsnpp-vp-deep": Row("vp/cifar10_ncsnpp_deep_continuous", DEEP_VP, 950_000),
    "cifar10-ncsnpp-subvp": Row("subvp/cifar10_ncsnpp_continuous", 62_693_251),
    "cifar10-ncsnpp-subvp-deep": Row("subvp/cifar10_ncsnpp_deep_continuous", DEEP_VP, 950_000),
    "cifar10-ncsnpp-ve-discrete": exploding("ve/cifar10_ncsnpp", 62_693_251),
    "cifar10-ncsnpp-ve": exploding("ve/cifar10_ncsnpp_continuous", 62_758_787),
    "cifar10-ncsnpp-ve-deep": exploding("ve/cifar10_ncsnpp_deep_continuous", 107_586_947, 950_000),
    "celebahq256-ncsnpp-ve": exploding(
        "ve/celebahq_256_ncsnpp_continuous", 65_574_421, 2_400_000, 3999, snr=0.075, batch=64, size=256
    ),
    "celebahq1024-ncsnpp-ve": exploding(
        "ve/celebahq_ncsnpp_continuous", 105_785_880, 2_400_000, 3999, 0.9999, 0.15, batch=8, size=1024
    ),
}
VE = [name for name in ROWS if "-ve" in name]


def load(name):
    return ud.load_recipe(f"score-sde-{name}")


def facts_of(name):
    shape = [3, ROWS[name].size, ROWS[name].size]
    return FactsSection(shape=shape, num_classes=None, image=True, data="none", fingerprint="none")


def net_of(name):
    """The network's choice once the data have said their shape."""
    return build.net_arguments(load(name).settings, facts_of(name))


def test_every_row_is_here():
    full = [name.removeprefix("score-sde-") for name in list_recipes() if name.startswith("score-sde-c")]
    assert set(full) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_trainable_parameters(name):
    arguments = net_of(name)
    with torch.device("meta"):
        net = make(NETS, arguments, "network", "model.net")
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == ROWS[name].parameters


@pytest.mark.parametrize("name", ROWS)
def test_the_model_is_that_of_imported_weights(name):
    """A run of the recipe and `undiffuse import` of their checkpoint: one network, told the same."""
    base, changes, path = CONFIGS[ROWS[name].config]
    theirs = {**preset(base), **changes}
    if theirs["embedding"] == "fourier":
        theirs["noise_offset"] = -math.log(2)  # log sigma of images in [0, 1]
    told = resolve(NETS, {"name": "unet", **theirs}, "network", "model.net")
    ours = resolve(NETS, net_of(name), "network", "model.net")
    for key in ("noise_scale", "noise_offset"):
        assert ours.pop(key) == pytest.approx(told.pop(key), rel=1e-12)
    assert ours == told
    assert load(name).settings.model.prediction == ("noise-unscaled" if name in VE else "noise")
    if name == "cifar10-ncsnpp-ve-discrete":
        return  # its path is the chain, not the SDE: see below
    t = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
    mine, imported = load(name).path(), make(ALL_PATHS, path, "path", "path")
    torch.testing.assert_close(mine.alpha(t), imported.alpha(t))
    torch.testing.assert_close(mine.sigma(t), imported.sigma(t))


@pytest.mark.parametrize("name", ROWS)
def test_training_is_theirs(name):
    recipe, row = load(name), ROWS[name]
    config, settings = recipe.train_config(), recipe.settings
    assert (config.steps, config.batch, config.lr, config.warmup) == (row.steps, row.batch, 2e-4, 5000)
    assert (config.optimizer, config.schedule, config.weight_decay) == ("adam", "constant", 0)
    assert config.betas == (0.9, 0.999)
    # Their loss of VE is half the sum over the event (`reduce_mean` is false), ours the mean.
    ratio = 0.5 * 3 * row.size**2 if name in VE else 1.0
    assert config.clip * ratio == pytest.approx(1.0)
    assert config.eps * ratio == pytest.approx(1e-8)
    assert 0.5 ** (1 / config.ema[0]) == pytest.approx(row.rate, abs=(1 - row.rate) * 1e-3)
    assert settings.model.net["dropout"] == (0.1 if row.size == 32 else 0.0)
    assert settings.data["flip"]
    assert not settings.model.conditional


def test_the_average_forgets_the_start_as_theirs_does():
    """The rate of theirs after k updates is at most (1 + k) / (10 + k)."""
    config = load("cifar10-ddpmpp-vp").train_config()
    average = HalfLife(config.ema[0], config.ema_ramp)
    for k in (1000, 10_000, 80_000):
        assert average.new_weight(k) == pytest.approx(9 / (10 + k), rel=0.01)
    assert average.new_weight(200_000) == pytest.approx(1e-4, rel=1e-3)


def test_half_the_sum_and_the_mean_make_the_same_steps():
    """Adam does not know the scale of a loss, where the gradient's bound and eps have it too."""
    config = load("cifar10-ncsnpp-ve").train_config()

    def end(share, clip, eps):
        model = torch.nn.Linear(3, 2).double()
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizers = make_optimizers(model, TrainConfig(optimizer="adam", eps=eps))
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
        for step in range(8):
            (share * (model(x) * 4**step - 1).square().sum()).backward()
            clip_gradients(list(model.parameters()), clip)
            move(optimizers, 0.1)
        return model.weight.detach()

    theirs = end(1.0, 1.0, 1e-8)
    torch.testing.assert_close(end(1 / 1536, config.clip, config.eps), theirs, rtol=0, atol=1e-3)
    # A bound that is not scaled does not bind: other steps.
    assert (end(1 / 1536, 1.0, 1e-8) - theirs).abs().max() > 0.05


@pytest.mark.parametrize("name", ROWS)
def test_training_looks_where_theirs_does(name):
    """t ~ U(1e-5, 1), or one of 1000 levels. On VE their 1e-5 is a share of 8.5e-5 of sigma, and is left out."""
    recipe = load(name)
    path, discrete = recipe.path(), name.endswith("discrete")
    u = torch.tensor([1e-9, 0.2004, 1 - 1e-9], dtype=torch.float64)
    time = recipe.objective().time.quantile(path, u)
    least = 1e-3 if discrete else 0.0 if name in VE else 1e-5
    expected = [least, 0.201 if discrete else 0.2004, 1.0]
    torch.testing.assert_close(time, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-8)
    # The squared error of the noise at every level.
    model = recipe.objective()
    output = ud.predictions.get(recipe.settings.model.prediction).coefficients(path, time)
    torch.testing.assert_close(model.weight.on_output(path, time, output) * output.b.square(), torch.ones(3).double())


def calls(path, section, grid):
    """One a step, one behind each that ends in noise where there is a corrector, one to denoise what is noisy."""
    noisy = path.sigma(grid[1:]) > 0
    corrected = int(noisy.sum()) if section.corrector else 0
    return len(noisy) + corrected + int(section.denoise and bool(noisy[-1]))


@pytest.mark.parametrize("name", ROWS)
def test_sampling_calls_the_network_where_theirs_does(name):
    """VE: at all levels, and at the end without noise. VP: at 1000 times from 1 to 1e-3."""
    recipe, row = load(name), ROWS[name]
    section, path = recipe.settings.sampling, recipe.path()
    assert section.solver["name"] == row.solver
    grid = make_grid(path, section.steps, section.grid)
    if name in VE:
        most = {32: 100.0, 256: 696.0, 1024: 2696.0}[row.size]
        levels = geometric_levels(0.02, most, row.calls // 2 + 1).flip(0)
        torch.testing.assert_close(path.sigma(grid)[: len(levels)], levels)
        assert section.corrector == {"name": "langevin", "snr": row.snr, "steps": 1, "rule": "score"}
        assert section.denoise or float(path.sigma(grid[-1])) == 0
    else:
        torch.testing.assert_close(grid[:-1], torch.linspace(1, 1e-3, 1000, dtype=torch.float64))
        assert float(grid[-1]) == 0
        assert section.corrector is None
    assert calls(path, section, grid) == row.calls
    few = Sampler.of(ud.NetworkDenoiser(torch.nn.Identity(), path), facts_of(name), section, steps=4)
    assert few.nfe == calls(path, section, make_grid(path, 4, section.grid))


def test_levels_are_told_by_their_numbers():
    """VE counts from the noisiest level, VP from the cleanest; both from 0 to 999."""
    for name, numbers in (("cifar10-ncsnpp-ve-discrete", [999, 500, 0]), ("cifar10-ddpmpp-vp-discrete", [0, 499, 999])):
        recipe, net = load(name), net_of(name)
        t = torch.tensor([1, 500, 1000], dtype=torch.float64) / 1000
        label = ud.predictions.get(recipe.settings.model.prediction).coefficients(recipe.path(), t).c_noise
        counted = net["noise_scale"] * (label + net["noise_offset"])
        torch.testing.assert_close(counted, torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=1e-6)


def test_uniform_levels_are_the_likelihood_s_importance_sampling():
    """`int g^2 / sigma^2 e(t) dt = 2 (lambda_low - lambda_high) E e(t)` for times uniform in the half log-SNR."""
    recipe = ud.load_recipe("score-sde-digits-subvp")
    path, objective = recipe.path(), recipe.objective()
    error = ud.predictions.get("noise").coefficients
    n = 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def mean_of_noise(t):
        return torch.exp(-3 * t)  # any function of time stands for the error of the noise

    drawn = objective.time.quantile(path, u)
    ours = (objective.weight.on_output(path, drawn, error(path, drawn)) * mean_of_noise(drawn)).mean()
    # By t = t_low^(1 - u), since the integrand grows like 1 / t.
    t = path.t_low ** (1 - u)
    density = -t * math.log(path.t_low)
    weight = Likelihood().on_output(path, t, error(path, t))
    low, high = path.half_log_snr(torch.tensor([path.t_low, path.t_high], dtype=torch.float64))
    whole = (weight * mean_of_noise(t) * density).mean()
    assert float(whole) == pytest.approx(float(2 * (low - high) * ours), rel=1e-4)


def test_the_digits_reach_from_half_a_grey_level_to_their_largest_distance():
    recipe = ud.load_recipe("score-sde-digits-ve")
    dataset = recipe.data()
    x = dataset.batch(torch.arange(len(dataset)))[0].flatten(1)
    assert recipe.settings.path == {"name": "ve", "sigma_min": 0.02, "sigma_max": 9.63}
    assert float(torch.cdist(x, x).max()) == pytest.approx(9.63, rel=1e-3)
