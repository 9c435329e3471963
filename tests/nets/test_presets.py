"""Published networks have the published number of trainable parameters."""

import pytest
import torch

from undiffuse.core.errors import ArgumentError
from undiffuse.nets import DiT, UNet
from undiffuse.nets.presets import PRESETS, preset, sinusoids

SCORE_SDE = {  # counted on score_sde_pytorch, tables 2 and 3 of Song et al. 2021
    "ncsnpp": 62_693_251,
    "ncsnpp-continuous": 62_758_787,
    "ncsnpp-continuous-deep": 107_586_947,
    "ddpmpp": 61_804_419,
    "ddpmpp-deep": 106_632_579,
    "ddpm": 35_218_947,
    "ncsnpp-256": 65_574_421,
    "ncsnpp-1024": 105_785_880,
}
# Counted on guided-diffusion with --class_cond True --learn_sigma True; table 4 of Dhariwal and Nichol 2021.
ADM = {"adm-64": 295_904_454, "adm-128": 421_529_606, "adm-256": 553_838_086, "adm-512": 558_997_638}
# facebookresearch/DiT, without its fixed positions (256 x width); 33, 130, 458, 675 M in table 4 of Peebles and Xie.
DIT = {"dit-s-2": 32_865_056, "dit-b-2": 130_315_808, "dit-l-2": 457_840_672, "dit-xl-2": 674_834_720}


def count(arguments, net=UNet) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in net(**arguments).parameters() if p.requires_grad)


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde(name):
    assert count(preset(name)) == SCORE_SDE[name]


@pytest.mark.parametrize("name", ADM)
def test_adm_with_its_variances_and_without_our_embedding_of_no_label(name):
    arguments = preset(name)
    no_label = arguments.get("embedding_width", 4 * arguments["width"])
    assert count({**arguments, "out_channels": 6}) - no_label == ADM[name]


@pytest.mark.parametrize("name", DIT)
def test_dit_with_its_variances(name):
    assert count({**preset(name), "out_channels": 8}, DiT) == DIT[name]


def test_every_preset_is_counted():
    assert set(PRESETS) == set(SCORE_SDE) | set(ADM) | set(DIT)


def test_a_preset_is_a_copy():
    preset("ncsnpp")["multipliers"].append(4)
    assert preset("ncsnpp")["multipliers"] == [1, 2, 2, 2]


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'ncsnpp-continuous'"):
        preset("ncsnpp-continous")


def test_step_features_are_those_of_the_papers():
    """f_k = 10000^(-k / (n - 1)) or 10000^(-k / n), of steps 0 ... 999."""
    arguments = {"shape": [1, 4, 4], "width": 4, "multipliers": [1], "blocks": 1}
    for endpoint in (True, False):
        net = UNet(**arguments, **sinusoids(8, endpoint=endpoint, scale=1000.0, offset=-0.001))
        step = torch.tensor([0.0, 7.0, 999.0], dtype=torch.float64)
        rates = 10000.0 ** (-torch.arange(4) / (3 if endpoint else 4))
        angle = step[:, None] * rates
        c = (step + 1) / 1000
        features = net.embedding.noise((c + net.embedding.noise_offset) * net.embedding.noise_scale)
        expected = 2**0.5 * torch.cat([angle.cos(), angle.sin()], dim=1)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_fourier_features_are_of_sixteen_times_log_sigma():
    """cos(2 pi 16 z log sigma) for normal z, the scale that Song et al. 2021 fix (appendix H)."""
    arguments = {**preset("ncsnpp-continuous"), "shape": [1, 4, 4], "width": 4, "multipliers": [1], "attention": []}
    torch.manual_seed(7)
    embedding = UNet(**arguments).embedding
    torch.manual_seed(7)
    z = torch.randn(128)
    log_sigma = torch.tensor([-0.01, 0.02])
    angle = 2 * torch.pi * 16 * log_sigma[:, None] * z
    features = embedding.noise((log_sigma + embedding.noise_offset) * embedding.noise_scale)
    torch.testing.assert_close(features[:, :128], 2**0.5 * angle.cos(), rtol=0, atol=1e-4)


def test_discrete_ncsnpp_counts_from_the_noisiest_level():
    """Steps 0 and 999 of geometric levels from sigma = 50 down to 0.01, in images of twice the range."""
    embedding = UNet(**{**preset("ncsnpp"), "width": 4, "blocks": 1}).embedding
    log_sigma = torch.log(2 * torch.tensor([50.0, (50 * 0.01) ** 0.5, 0.01], dtype=torch.float64))
    steps = (log_sigma + embedding.noise_offset) * embedding.noise_scale
    torch.testing.assert_close(steps, torch.tensor([0, 499.5, 999], dtype=torch.float64))
