"""Paths that every test of the axes runs over."""

import torch

from undiffuse.paths import VE, VP, Cosine, Karras, Linear, Path, SubVP, Tabulated, Trig

_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

PATHS: dict[str, Path] = {
    "vp": VP(),
    "ve": VE(),
    "sub-vp": SubVP(),
    "cosine": Cosine(),
    "linear": Linear(),
    "trig": Trig(),
    "karras": Karras(),
    "ddpm-table": Tabulated.from_betas(_BETAS),
    "zero-snr-table": Tabulated.from_betas(torch.cat([_BETAS[::10], torch.ones(1, dtype=torch.float64)])),
    "ncsn-table": Tabulated.from_sigmas(torch.logspace(-2, 1.5, 30, dtype=torch.float64)),
}
