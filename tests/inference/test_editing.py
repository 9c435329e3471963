"""Editing against what is exact in it: the known part, independent parts, and the law on a Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import undiffuse as ud
from undiffuse.core.errors import ArgumentError
from undiffuse.inference import BlockMeans, ChannelMix, Entries

F64 = torch.float64
EVENT = (3, 4, 4)
MASK = torch.rand(EVENT, generator=torch.Generator().manual_seed(1)) < 0.4
PROJECTORS = {
    "entries": Entries(MASK),
    "grey": ChannelMix((1 / 3, 1 / 3, 1 / 3)),
    "luma": ChannelMix((0.299, 0.587, 0.114)),
    "blocks": BlockMeans(2),
}
RANKS = {"entries": int(MASK.sum()), "grey": 16, "luma": 16, "blocks": 12}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_are_orthogonal(name):
    size = math.prod(EVENT)
    basis = torch.eye(size, dtype=F64).reshape(size, *EVENT)
    matrix = PROJECTORS[name](basis).reshape(size, size)
    assert torch.allclose(matrix, matrix.mT, atol=1e-12)
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-12)
    assert abs(float(matrix.trace()) - RANKS[name]) < 1e-12


def test_what_projectors_keep():
    x = numbers(2, *EVENT)
    luma = PROJECTORS["luma"]
    assert torch.allclose(luma.mixed(luma(x)), 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:], atol=1e-12)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    assert torch.allclose(BlockMeans(2).means(x), pooled, atol=1e-12)
    assert torch.allclose(BlockMeans(2)(x)[:, :, 1, 2], pooled[:, :, 0, 1], atol=1e-12)


def white() -> ud.Gaussian:
    """One std everywhere, so that whatever P keeps is independent of what it drops."""
    return ud.Gaussian(numbers(*EVENT, seed=2), std=0.7)


def edited(task: str, x: torch.Tensor, field: ud.Denoiser, **options) -> torch.Tensor:
    project = PROJECTORS[task]
    if task == "entries":
        return ud.inpaint(field, torch.where(MASK, x, torch.nan), MASK, **options)
    if task == "blocks":
        return ud.super_resolve(field, project.means(x), 2, **options)
    return ud.colourise(field, project.mixed(x), project.weights, **options)


@pytest.mark.parametrize("path", [ud.VP(), ud.VE(), ud.Linear()], ids=["vp", "ve", "linear"])
@pytest.mark.parametrize("task", PROJECTORS)
def test_known_is_exact_and_what_is_independent_of_it_is_as_if_nothing_were_known(task, path):
    law = white()
    field, x, project = law.denoiser(path), law.sample(3, ud.Streams.of(5, 3)), PROJECTORS[task]
    got = edited(task, x, field, solver="heun", steps=8, seed=11)
    assert torch.allclose(project(got), project(x), atol=1e-13)
    if task == "entries":
        assert torch.equal(got[:, MASK], x[:, MASK])
    free = ud.sample(field, x.shape, solver="heun", steps=8, seed=11, dtype=F64)
    assert torch.allclose(got - project(got), free - project(free), atol=1e-11)
    single = edited(task, x.float(), field.float(), solver="heun", steps=8, seed=11)
    assert single.dtype == torch.float32
    assert torch.allclose(project(single), project(x.float()), atol=1e-6)


class Watched(ud.Denoiser):
    """Remembers what it was asked."""

    def __init__(self, denoiser: ud.Denoiser):
        super().__init__(denoiser.path)
        self.denoiser = denoiser
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x_t, t, cond=None):
        self.asked.append((x_t, t))
        return self.denoiser(x_t, t, cond)


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear(), ud.VE(0.01, 4.0)], ids=["vp", "linear", "ve"])
@pytest.mark.parametrize("resample", [1, 3])
def test_on_the_way_the_known_part_has_its_law_given_the_data(path, resample):
    """At every call of the model, first and resampled ones too, it is `N(alpha x_0, sigma^2)` in each known entry."""
    n, steps = 40_000, 6
    law = ud.Gaussian(torch.zeros(3, dtype=F64), std=0.7)
    x, mask = torch.tensor([0.9, -0.4, 0.0], dtype=F64), torch.tensor([True, True, False])
    field, other = Watched(law.denoiser(path)), Watched(law.denoiser(path))
    ud.inpaint(field, x.expand(n, 3), mask, steps=steps, resample=resample, seed=2)
    ud.inpaint(other, (-x).expand(n, 3), mask, steps=steps, resample=resample, seed=2)
    ends_in_noise = float(path.sigma(torch.tensor(path.t_min))) > 0
    assert len(field.asked) == (steps * resample if ends_in_noise else 1 + (steps - 1) * resample)
    squares: dict[bool, list[float]] = {True: [], False: []}
    for call, ((x_t, t), (opposite, _)) in enumerate(zip(field.asked, other.asked)):
        # The same noise around either image.
        assert torch.allclose((x_t - opposite)[:, mask], 2 * path.alpha(t) * x[mask].expand(n, 2), atol=1e-12)
        noise = (x_t + opposite)[:, mask] / (2 * path.sigma(t))
        squares[call % resample > 0].append(float(noise.square().mean()))
    # 4 standard errors of the means are 0.0082 and, of the resampled, 0.0064; 1 % in sigma moves the first by 0.02.
    # In the way back the added noise is a part of the whole: 1 % in it moves the second by 0.01 or more.
    for each in filter(None, squares.values()):
        assert abs(sum(each) / len(each) - 1) < 4 * math.sqrt(2 / (2 * n * len(each)))


COVARIANCE = torch.tensor([[1.0, 0.72], [0.72, 0.64]], dtype=F64)  # correlation 0.9
MEAN = torch.tensor([0.3, -0.2], dtype=F64)
SEEN = 1.8


def law_of_imputation(path: ud.Path, grid: torch.Tensor, resample: int) -> tuple[float, float]:
    """Mean and variance of the second entry when the first is imposed: every step is linear in Gaussians.

    The unknown entry u and the imposed one are independent given the data, at every time.
    """
    mean, variance = 0.0, float(path.sigma(grid[0])) ** 2
    for place, (t, s) in enumerate(pairwise(grid)):
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        inverse = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=F64))
        gain = alpha * COVARIANCE @ inverse
        offset = MEAN - alpha * gain @ MEAN
        one = torch.ones(1, 1, dtype=F64)
        on_x, _ = path.posterior(one, 0 * one, t, s)
        on_x_0, std = path.posterior(0 * one, one, t, s)
        on_u = float(on_x + on_x_0 * gain[1, 1])
        on_seen = float(on_x_0 * gain[1, 0])
        last = place == len(grid) - 2
        for again in range(1 if last else resample):
            if again:
                scale, back = (float(v) for v in path.transition(s, t))
                mean, variance = scale * mean, scale**2 * variance + back**2
            mean = on_u * mean + on_seen * alpha * SEEN + float(on_x_0) * float(offset[1])
            variance = on_u**2 * variance + on_seen**2 * sigma**2 + float(std) ** 2
    return mean, variance


def conditional() -> tuple[float, float]:
    slope = float(COVARIANCE[1, 0] / COVARIANCE[0, 0])
    return float(MEAN[1]) + slope * (SEEN - float(MEAN[0])), float(COVARIANCE[1, 1] - slope * COVARIANCE[0, 1])


def drawn(path: ud.Path, resample: int, n: int, steps: int = 30) -> torch.Tensor:
    field = ud.Gaussian(MEAN, covariance=COVARIANCE).denoiser(path)
    image = torch.tensor([[SEEN, 0.0]], dtype=F64).expand(n, 2)
    mask = torch.tensor([True, False])
    return ud.inpaint(field, image, mask, steps=steps, resample=resample, seed=0)[:, 1]


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear()], ids=["vp", "linear"])
@pytest.mark.parametrize("resample", [1, 4])
def test_on_a_gaussian_the_law_is_that_of_the_recursion(path, resample):
    n = 40_000
    u = drawn(path, resample, n)
    mean, variance = law_of_imputation(path, ud.make_grid(path, 30, "canonical"), resample)
    assert abs(float(u.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(u.var()) / variance - 1) < 4 * math.sqrt(2 / n)


def test_resampling_lessens_the_error_that_more_steps_do_not():
    path, (mean, _) = ud.VP(), conditional()
    wrong = {r: abs(law_of_imputation(path, ud.make_grid(path, 100, "canonical"), r)[0] - mean) for r in (1, 2, 5, 20)}
    finer = abs(law_of_imputation(path, ud.make_grid(path, 2000, "canonical"), 1)[0] - mean)
    assert wrong[1] > wrong[2] > wrong[5] > wrong[20]
    assert wrong[20] < 0.1 * wrong[1]
    assert finer > 0.5 * wrong[1]
    few, many = (abs(float(drawn(path, r, 4000).mean()) - mean) for r in (1, 10))
    assert many < 0.3 * few


def test_a_row_does_not_depend_on_its_batch():
    law = white()
    field, x = law.denoiser(ud.VP()), law.sample(5, ud.Streams.of(5, 5))
    for task in PROJECTORS:
        options = {"steps": 4, "resample": 2}
        many = edited(task, x, field, seed=[7, 8, 9, 10, 11], **options)
        assert torch.allclose(edited(task, x[3:4], field, seed=[10], **options), many[3:4], atol=1e-12)
        assert torch.equal(edited(task, x, field, seed=7, **options)[0], many[0])
        assert not torch.allclose(edited(task, x[3:4], field, seed=[12], **options), many[3:4], atol=1e-2)


def test_masks_of_one_channel_and_of_each_image():
    law = white()
    field, x = law.denoiser(ud.VP()), law.sample(2, ud.Streams.of(5, 2))
    one = torch.zeros(1, 4, 4, dtype=torch.bool)
    one[:, :2] = True
    whole = one.expand(2, 3, 4, 4)
    options = {"steps": 4, "seed": 1}
    wanted = ud.inpaint(field, x, whole, **options)
    for mask in (one, one.expand(3, 4, 4), one.expand(2, 1, 4, 4)):
        assert torch.equal(ud.inpaint(field, x, mask, **options), wanted)
    flipped = torch.stack([one, ~one])
    got = ud.inpaint(field, x, flipped, **options)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1, :, 2:], x[1, :, 2:])


def test_wrong_arguments_are_explained():
    law = white()
    field, x = law.denoiser(ud.VP()), law.sample(2, ud.Streams.of(5, 2))
    some = torch.zeros(EVENT, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="mask is empty in image 0"):
        ud.inpaint(field, x, some)
    with pytest.raises(ArgumentError, match="mask is full in image 1"):
        ud.inpaint(field, x, torch.stack([MASK, torch.ones_like(MASK)]))
    with pytest.raises(ArgumentError, match=r"mask has shape \(3, 4, 5\)"):
        ud.inpaint(field, x, torch.zeros(3, 4, 5, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"mask has shape \(4, 4\)"):
        ud.inpaint(field, x, torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"mask > 0\.5"):
        ud.inpaint(field, x, MASK.float())
    with pytest.raises(ArgumentError, match="NaN in 2 of 2"):
        ud.inpaint(field, torch.where(MASK, torch.nan, x), MASK)
    with pytest.raises(ArgumentError, match="one channel"):
        ud.colourise(field, x)
    with pytest.raises(ArgumentError, match="not all 0"):
        ud.colourise(field, x[:, :1], (0.0, 0.0, 0.0))
    with pytest.raises(ArgumentError, match="at least 2"):
        ud.super_resolve(field, x, 1)
    with pytest.raises(ArgumentError, match="factor 3 does not divide images of 4 x 4"):
        BlockMeans(3).means(x)
    with pytest.raises(ArgumentError, match="resample is 0"):
        ud.inpaint(field, x, MASK, resample=0)
    with pytest.raises(ArgumentError, match="unknown solver 'langevin'"):
        ud.inpaint(field, x, MASK, solver="langevin")


def test_minus_zero_is_kept_bit_for_bit():
    law = ud.GaussianMixture(torch.zeros(1, 4, dtype=F64), torch.ones(1, dtype=F64))
    image, mask = torch.tensor([[-0.0, 0.0, 9.0, 9.0]], dtype=F64), torch.tensor([True, True, False, False])
    x = ud.inpaint(law.denoiser(ud.VP()), image, mask, steps=3, seed=0)
    assert torch.equal(x[:, :2].view(torch.int64), image[:, :2].view(torch.int64))


@pytest.mark.parametrize("solver", ["picard", ud.Picard()])
def test_a_solver_of_all_steps_at_once_is_refused(solver):
    law = ud.GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64))
    with pytest.raises(ArgumentError, match="all steps at once, and editing imposes"):
        ud.inpaint(law.denoiser(ud.Linear()), numbers(3, 2), torch.tensor([True, False]), solver=solver)
