"""What an import refuses, and what it says: settings that are wrong or unclear, values that are no weights."""

import pytest

from integrations import planted
from undiffuse.core.errors import ArgumentError
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
