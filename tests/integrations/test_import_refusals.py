"""What an import refuses, and what it says: settings that are wrong or unclear, values that are no weights."""

import pytest
import torch

from integrations import planted
from undiffuse.core.errors import ArgumentError, CheckpointError
from undiffuse.integrations.guided_diffusion import guided_diffusion


def test_another_number_of_steps_asks_how_times_were_counted():
    flags = {**planted.GUIDED["improved"], "diffusion_steps": 4000}
    with pytest.raises(ArgumentError, match="--rescale_timesteps True or False"):
        guided_diffusion(planted.weights("improved"), flags)
    scales = [
        guided_diffusion(planted.weights("improved"), {**flags, "rescale_timesteps": given}).net["noise_scale"]
        for given in ("True", False)
    ]
    assert scales == [1000, 4000]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_blocks.3.1.qkv.weight", (100, 64, 1)),  # its rows do not divide by head
        ("input_blocks.3.1.proj_out.weight", ()),
        ("time_embed.0.weight", (128, 48)),
    ],
)
def test_weights_that_do_not_fit_name_both_shapes(name, shape):
    flags, state = planted.GUIDED["improved"], dict(planted.weights("improved"))
    assert name in state
    state[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError) as caught:
        guided_diffusion(state, flags)
    said = str(caught.value)
    assert f"'{name}' of shape {shape}" in said
    assert "where this network's" in said
