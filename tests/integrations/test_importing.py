"""Imported networks say what the originals said: stored answers, of tiny networks with planted weights.

Beside the originals, at random weights: score_sde's ten kinds of configuration within 1.5e-6 relative (CIFAR-10's at
full size: 1.1e-6), guided-diffusion 3e-6, EDM 5e-6, diffusers 3e-6, all in float32.
"""

import math

import pytest
import torch

from integrations import planted
from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.fields import NetworkDenoiser
from undiffuse.integrations.diffusers import diffusers
from undiffuse.integrations.edm import edm
from undiffuse.integrations.guided_diffusion import guided_diffusion, read_flags
from undiffuse.integrations.score_sde import CONFIGS, score_sde
from undiffuse.recipes.paths import ALL_PATHS

SIGMAS = torch.tensor([0.3, 20.0])
STEPS = torch.tensor([3, 997])
OURS = {
    "shape": [3, planted.SIZE, planted.SIZE],
    "width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": [8],
    "noise_features": 8,
}
CHANGES = {  # what planted.SCORE_SDE changes in their configurations, in our words
    "ncsnpp": {**OURS, "noise_features": 16},
    "ncsnpp-discrete": OURS,
    "ncsnpp-large": {**OURS, "multipliers": [1, 1, 2], "noise_features": 16},
    "ddpmpp": OURS,
    "ddpm": {**OURS, "width": 32, "noise_features": 32, "norm_groups": 32},
}


def denoiser(imported) -> NetworkDenoiser:
    path = dict(imported.path)
    return NetworkDenoiser(
        imported.network(), ALL_PATHS[path.pop("name")](**path), imported.prediction, imported.sigma_data
    )


def close(ours, theirs, within=1e-5):
    """Relative to the whole answer, as a norm."""
    assert ((ours - theirs).norm() / theirs.norm()).item() < within


def song(case):
    return score_sde(planted.weights(case), planted.SCORE_SDE[case][0], **CHANGES[case])


@pytest.mark.parametrize("case", ["ncsnpp", "ncsnpp-large", "ncsnpp-discrete"])
def test_the_score_of_score_sdes_exploding_networks(case):
    """Theirs: h / sigma of images in [0, 1]. Ours of 2 x - 1, with twice the noise: the score is half of theirs."""
    x, theirs = planted.image(), planted.answer(case)
    ends = {"ncsnpp-large": 348.0}  # of their sigmas; 50 is their default
    sigmas = SIGMAS if case != "ncsnpp-discrete" else (50 * (0.01 / 50) ** (STEPS / 999)).float()
    model = denoiser(song(case))
    assert (model.path.sigma_min, model.path.sigma_max) == pytest.approx((2 * 0.01, 2 * ends.get(case, 50.0)))
    t = model.path.time_of(-torch.log(2 * sigmas))
    with torch.no_grad():
        close(model.score(2 * x - 1, t), theirs / 2)


@pytest.mark.parametrize("case", ["ddpmpp", "ddpm"])
def test_the_noise_of_score_sdes_preserving_networks(case):
    t = torch.tensor([0.02, 0.7]) if case == "ddpmpp" else (STEPS + 1) / 1000
    with torch.no_grad():
        close(denoiser(song(case)).noise(planted.image(), t), planted.answer(case))


@pytest.mark.parametrize("case", planted.GUIDED)
def test_the_noise_of_guided_diffusion(case):
    imported = guided_diffusion(planted.weights(case), planted.GUIDED[case])
    with torch.no_grad():
        noise = denoiser(imported).noise(planted.image(), (STEPS + 1) / 1000, planted.LABELS)
    close(noise, planted.answer(case)[:, :3])


@pytest.mark.parametrize("case", planted.EDM)
def test_the_denoiser_of_edm(case):
    kind, arguments = planted.EDM[case]
    model = denoiser(edm({"class": kind, "arguments": arguments, "weights": planted.weights(case)}))
    labels = planted.LABELS if arguments.get("label_dim") else None
    # Theirs is a function of x / alpha and sigma / alpha.
    t = model.path.time_of(-SIGMAS.double().log()).float()
    alpha = model.path.alpha(t)[:, None, None, None]
    x, skip = planted.image(), (0.25 / (SIGMAS**2 + 0.25) if kind == "EDMPrecond" else torch.ones(2))
    skipped = skip[:, None, None, None] * x
    with torch.no_grad():
        close(model(alpha * x, t, labels) - skipped, planted.answer(case) - skipped)


@pytest.mark.parametrize("case", planted.DIFFUSERS)
def test_the_noise_of_diffusers(case):
    arguments = planted.DIFFUSERS[case]
    labels = planted.LABELS if "num_class_embeds" in arguments else None
    for scheduler in (None, {"prediction_type": "epsilon", "beta_schedule": "linear"}):
        model = denoiser(diffusers(planted.weights(case), arguments, scheduler))
        with torch.no_grad():
            close(model.noise(planted.image(), (STEPS + 1) / 1000, labels), planted.answer(case))


def test_a_percent_is_noticed():
    """Every tensor matters: each, changed by 1 %, changes the answer by more than the tolerance of these tests."""
    imported = song("ncsnpp")
    net, x, c = imported.network(), planted.image(), torch.tensor([0.3, 2.0])
    with torch.no_grad():
        answer = net(x, c)
        for name, tensor in [*net.named_parameters(), ("embedding.noise.frequencies", net.embedding.noise.frequencies)]:
            before = tensor.clone()
            tensor.mul_(1.01)
            change = ((net(x, c) - answer).norm() / answer.norm()).item()
            tensor.copy_(before)
            if name.endswith("qkv.bias"):  # a third of it, the keys', does nothing to a softmax
                continue
            assert change > 1e-5, name


def test_the_moving_average_takes_the_place_of_the_weights():
    state = {f"module.{name}": tensor for name, tensor in planted.weights("ncsnpp").items()}
    trained = [tensor for name, tensor in state.items() if name != "module.all_modules.0.W"]
    blank = {name: tensor if name.endswith(".0.W") else torch.zeros_like(tensor) for name, tensor in state.items()}
    blank["module.sigmas"] = torch.zeros(1000)
    checkpoint = {"model": blank, "ema": {"decay": 0.999, "num_updates": 1, "shadow_params": trained}, "step": 7}
    config = planted.SCORE_SDE["ncsnpp"][0]
    imported = score_sde(checkpoint, config, **CHANGES["ncsnpp"])
    plain = song("ncsnpp")
    assert all(torch.equal(imported.weights[name], tensor) for name, tensor in plain.weights.items())
    assert "0.999" in imported.notes[0]
    checkpoint["ema"]["shadow_params"] = trained[:-1]
    with pytest.raises(CheckpointError, match="moving average has 155 tensors"):
        score_sde(checkpoint, config, **CHANGES["ncsnpp"])


def test_no_label_is_edms_empty_vector():
    """A network of EDM without a label is the one whose label is 0: the bias of the labels' layer alone."""
    kind, arguments = planted.EDM["edm-ddpmpp"]
    state = planted.weights("edm-ddpmpp")
    model = denoiser(edm({"class": kind, "arguments": arguments, "weights": state}))
    unlabelled = {name: tensor for name, tensor in state.items() if not name.startswith("model.map_label.")}
    unlabelled["model.map_layer0.bias"] = (
        state["model.map_layer0.bias"] + state["model.map_layer0.weight"] @ state["model.map_label.bias"]
    )
    plain = denoiser(edm({"class": kind, "arguments": {**arguments, "label_dim": 0}, "weights": unlabelled}))
    with torch.no_grad():
        close(model(planted.image(), SIGMAS), plain(planted.image(), SIGMAS))


def test_the_cosine_chain_is_nichol_and_dhariwals():
    path = ALL_PATHS["tabulated-cosine"](levels=1000)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def signal(u):
        return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    torch.testing.assert_close(path.alpha(t).square(), signal(t) / signal(torch.zeros_like(t)), rtol=1e-9, atol=0)
    # The last step would have variance 1: it is cut at 0.999.
    end = path.alpha(torch.tensor([0.999, 1.0], dtype=torch.float64)).square()
    assert (end[1] / end[0]).item() == pytest.approx(0.001, rel=1e-6)


# ---------------------------------------------------------------- what is refused


def test_names_that_are_missing_and_unknown_are_paired():
    state = planted.weights("ncsnpp")
    state["all_modules.4.GroupNorm_0.weights"] = state.pop("all_modules.4.GroupNorm_0.weight")
    state["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        score_sde(state, planted.SCORE_SDE["ncsnpp"][0], **CHANGES["ncsnpp"])
    said = str(caught.value)
    near = "'all_modules.4.GroupNorm_0.weight' (it has 'all_modules.4.GroupNorm_0.weights')"
    assert f"1 missing: {near}" in said
    assert "2 unknown: 'all_modules.4.GroupNorm_0.weights', 'stray'" in said


def test_another_size_names_the_tensor():
    with pytest.raises(CheckpointError, match=r"'all_modules.0.W' of shape \(8,\) gives .*\(128,\)"):
        score_sde(
            planted.weights("ncsnpp"), "ve/cifar10_ncsnpp_continuous", blocks=1, multipliers=[1, 2], attention=[32]
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_sde({}, "ve/cifar10_ncsnp_continuous"), "Did you mean 've/cifar10_ncsnpp_continuous'"),
        (lambda: guided_diffusion({}, {"image_sise": 64}), "Did you mean 'image_size'"),
        (lambda: guided_diffusion({}, {"image_size": 48}), "image_size=48 has no multipliers"),
        (lambda: guided_diffusion({}, {"class_cond": "maybe"}), "'maybe': expected true or false"),
        (lambda: guided_diffusion({}, {"noise_schedule": "sqrt"}), "noise_schedule=sqrt"),
        (lambda: guided_diffusion({}, {"channel_mult": "2,3"}), "multiples of the first"),
        (lambda: read_flags("--image_size 64 --class_cond"), "pairs"),
        (lambda: edm({"class": "iDDPMPrecond", "weights": {}}), "'iDDPMPrecond': expected EDMPrecond"),
        (
            lambda: edm(
                {"class": "EDMPrecond", "arguments": {"img_resolution": 32, "chanel_mult": [1]}, "weights": {}}
            ),
            "Did you mean 'channel_mult'",
        ),
        (lambda: edm({"class": "EDMPrecond", "arguments": {}, "weights": {}}), "no img_resolution"),
        (
            lambda: diffusers(
                {}, {**planted.DIFFUSERS["diffusers"], "down_block_types": ["SkipDownBlock2D"] * 2}, None
            ),
            "only DownBlock2D, AttnDownBlock2D",
        ),
        (
            lambda: diffusers({}, {**planted.DIFFUSERS["diffusers"], "downsample_type": "resnet"}, None),
            "downsample_type",
        ),
        (
            lambda: diffusers({}, planted.DIFFUSERS["diffusers"], {"beta_schedule": "scaled_linear"}),
            "beta_schedule is 'scaled_linear'",
        ),
        (
            lambda: diffusers({}, {**planted.DIFFUSERS["diffusers"], "resnet_time_scale_shift": "scale_shift"}, None),
            "attn_norm_num_groups is None",
        ),
    ],
)
def test_settings_that_cannot_be_imported_are_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_every_configuration_of_score_sde_builds():
    from undiffuse.integrations.imported import empty
    from undiffuse.nets.presets import preset

    for name, changes, path in CONFIGS.values():
        empty({**preset(name), **changes})
        own = dict(path)
        assert ALL_PATHS[own.pop("name")](**own).t_max == 1
