"""Guidance at scale 7.5 in 10 calls: no deterministic solver runs away (issue: "does not blow up")."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import undiffuse as ud
from undiffuse.solvers import SOLVERS

F64 = torch.float64
SCALE, CALLS, ROWS = 7.5, 10, 32
PATHS = {"vp": ud.VP(), "linear": ud.Linear(), "cosine": ud.Cosine(), "karras": ud.Karras()}
# Picard's iteration is no method for ten calls.
NAMES = [name for name, made in SOLVERS.items() if name not in ("stay", "picard") and not made().stochastic]


class ClassifierFree(ud.Denoiser):
    """`D(x, t) + scale (D(x, t, y) - D(x, t))` of an exact denoiser: its noise is the same line in the noises."""

    def __init__(self, denoiser, scale):
        super().__init__(denoiser.path)
        self.denoiser, self.scale = denoiser, scale

    def forward(self, x_t, t, cond=None):
        return self.estimate(x_t, t, cond)[0]

    def estimate(self, x_t, t, cond=None):
        both = zip(self.denoiser.estimate(x_t, t), self.denoiser.estimate(x_t, t, cond))
        return tuple(torch.lerp(plain, given, self.scale) for plain, given in both)


def ring():
    """Eight narrow modes in the plane, four classes of two opposite ones."""
    angle = torch.arange(8, dtype=F64) * math.pi / 4
    means = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
    return ud.GaussianMixture(means, torch.full((8,), 0.094, dtype=F64), labels=torch.arange(8) % 4)


def pictures():
    """Twenty pictures of 64 pixels, four classes of five."""
    means = 0.8 * torch.randn(20, 64, dtype=F64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return ud.GaussianMixture(means, torch.full((20,), 0.3, dtype=F64), labels=torch.arange(20) % 4)


LAWS = {"ring": (ring(), 2), "pictures": (pictures(), 64)}
COND = torch.arange(ROWS) % 4


def start(law: str, path: ud.Path) -> torch.Tensor:
    shape = (ROWS, LAWS[law][1])
    return path.prior_std * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def guided(law: str, path: ud.Path) -> ud.Denoiser:
    return ClassifierFree(LAWS[law][0].denoiser(path), SCALE)


@cache
def exact(law: str, name: str) -> torch.Tensor:
    path = PATHS[name]
    return ud.exact_flow(guided(law, path), start(law, path), path.t_max, path.t_min, rtol=1e-5, cond=COND)


def in_ten_calls(field: ud.Denoiser, x: torch.Tensor, name: str) -> torch.Tensor:
    """The result with as many steps as 10 calls pay for; an adaptive solver takes what it takes."""
    for steps in range(CALLS, 0, -1):
        info = ud.sample(field, noise=x, solver=name, steps=steps, cond=COND, return_info=True)
        if info.nfe <= CALLS or SOLVERS[name]().adaptive:
            return info.x
    raise AssertionError(name)


# How many times the largest entry of the exact samples a solver's may be, measured and a tenth more, and the relative
# error of the whole. The higher the order the worse, on the narrow ring, but for `abm-4`, which notices (`miss`).
# Without that it has 3.9 and 3.03.
MEASURED = {
    "ddim": (1.7, 0.26),
    "euler": (1.7, 0.26),
    "heun": (5.2, 3.64),
    "midpoint": (2.5, 0.81),
    "rk4": (6.4, 4.96),
    "edm": (9.1, 6.72),
    "dpm-1": (1.7, 0.26),
    "dpm-2": (2.6, 0.77),
    "dpm-3": (4.6, 2.6),
    "dpmpp-2s": (2.2, 0.35),
    "dpmpp-2m": (2.1, 0.31),
    "dpmpp-3m": (3.9, 2.1),
    "unipc-2": (2.5, 1.27),
    "unipc-3": (4.1, 2.72),
    "deis-2": (1.7, 0.25),
    "deis-3": (2.0, 0.8),
    "ipndm": (9.0, 8.5),
    "ab2": (1.9, 0.28),
    "ab3": (2.3, 0.7),
    "ab4": (3.9, 1.64),
    "abm-4": (1.8, 0.26),
}
# Their last step is an extrapolation, of answers that are all in range.
EXTRAPOLATING = ("midpoint", "rk4", "ab2", "ab3", "ab4", "deis-2", "deis-3", "abm-4")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("law", LAWS)
def test_ten_calls_at_scale_7_5_do_not_run_away(law, path):
    wanted = exact(law, path)
    for name in NAMES:
        x = in_ten_calls(guided(law, PATHS[path]), start(law, PATHS[path]), name)
        reach, error = MEASURED.get(name, (0.92, 0.009))  # an adaptive one is right
        assert float(x.abs().max() / wanted.abs().max()) < 1.1 * reach, name
        assert float((x - wanted).norm() / wanted.norm()) < 1.1 * error, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bound", [ud.Clipped, ud.DynamicThreshold])
def test_with_a_threshold_they_stay_in_range(bound, path):
    x = start("pictures", PATHS[path])
    assert float(exact("pictures", path).abs().max()) > 1.9
    for name in NAMES:
        if SOLVERS[name]().adaptive:  # a threshold has kinks: not for a control by error
            continue
        out = in_ten_calls(bound(guided("pictures", PATHS[path])), x, name)
        assert float(out.abs().max()) < (2.0 if name in EXTRAPOLATING else 1 + 1e-9), name


def test_the_default_notices_sample_by_sample():
    """Rows that are guided, and rows that are not, alone and together."""
    law, path, x = LAWS["ring"][0], PATHS["linear"], start("ring", PATHS["linear"])

    def run(rows):
        scale = torch.where(torch.arange(ROWS) % 3 == 0, 1.0, SCALE)[rows, None].double()
        field = ClassifierFree(law.denoiser(path), scale)
        return ud.sample(field, noise=x[rows], solver="abm-4", steps=CALLS, cond=COND[rows])

    together = run(torch.arange(ROWS))
    for row in range(0, ROWS, 5):
        assert torch.allclose(run(torch.tensor([row]))[0], together[row], rtol=1e-10, atol=1e-10)


def test_what_the_default_notices_costs_no_precision_under_autocast():
    law, path, x = LAWS["ring"][0].float(), PATHS["linear"], start("ring", PATHS["linear"]).float()
    field = ClassifierFree(law.denoiser(path), SCALE)
    plain = ud.sample(field, noise=x, solver="abm-4", steps=CALLS, cond=COND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ud.sample(Plainly(field), noise=x, solver="abm-4", steps=CALLS, cond=COND)
    assert cast.dtype == torch.float32
    assert torch.allclose(cast, plain, rtol=1e-4, atol=1e-4)


class Plainly(ud.Denoiser):
    """Another's answers, outside autocast."""

    def __init__(self, denoiser):
        super().__init__(denoiser.path)
        self.denoiser = denoiser

    def forward(self, x_t, t, cond=None):
        with torch.autocast("cpu", enabled=False):
            return self.denoiser(x_t, t, cond)


def test_guidance_by_the_exact_classifier_is_the_same_field():
    """The two forms of guidance agree where both are exact, and so do samples of them."""
    law, path = LAWS["ring"][0], PATHS["vp"]
    other = ud.ClassifierGuidance(law.denoiser(path), law.classifier(path), SCALE)
    for name in ("ddim", "dpmpp-2m", "abm-4"):
        a, b = (in_ten_calls(f, start("ring", path), name) for f in (guided("ring", path), other))
        assert torch.allclose(a, b, atol=1e-6)
