"""Guidance with the exact classifier is the conditional law."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import undiffuse as ud
from undiffuse.core.errors import ArgumentError
from worlds import PATHS

F64 = torch.float64
LAW = ud.GaussianMixture(
    torch.tensor([[-1.2, 0.3], [0.2, 1.1], [0.9, -0.8], [1.4, 0.7]], dtype=F64),
    torch.tensor([0.5, 0.3, 0.4, 0.6], dtype=F64),
    weights=torch.tensor([1.0, 2.0, 1.5, 0.5], dtype=F64),
    labels=torch.tensor([0, 1, 0, 2]),
)


def guided(path: ud.Path, scale: float = 1.0) -> ud.ClassifierGuidance:
    return ud.ClassifierGuidance(LAW.denoiser(path), LAW.classifier(path), scale)


def states(path: ud.Path, rows: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t on all of [t_min, t_high], both ends included, and labels."""
    generator = torch.Generator().manual_seed(4)
    t = torch.linspace(path.t_min, path.t_high, rows, dtype=F64)
    noise = torch.randn(rows, 2, dtype=F64, generator=generator)
    labels = torch.arange(rows) % 3
    return path.perturb(LAW.sample(rows, generator, labels), t, noise), t, labels


@pytest.mark.parametrize("name", PATHS)
def test_with_the_exact_classifier_it_is_the_conditional_denoiser(name):
    path = PATHS[name]
    x, t, labels = states(path)
    model, exact = guided(path), LAW.denoiser(path)
    wanted = exact.estimate(x, t, labels)
    for got, want in zip(model.estimate(x, t, labels), wanted):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(model(x, t, labels), wanted[0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(model.score(x, t, labels), exact.score(x, t, labels), rtol=1e-9, atol=1e-9)
    # 1 % more is noticed, in each of the three.
    more = guided(path, 1.01)
    assert not torch.allclose(more(x, t, labels), wanted[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(more.noise(x, t, labels), wanted[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(more.score(x, t, labels), exact.score(x, t, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [ud.Linear(), ud.Cosine(), PATHS["zero-snr-table"]], ids=["linear", "cosine", "table"])
def test_where_the_signal_is_gone_it_is_the_mean_of_the_class(path):
    x, _, labels = states(path)
    end = torch.tensor(path.t_max, dtype=F64)
    x_0, noise = guided(path).estimate(x, end, labels)
    means = torch.stack([ud.GaussianMixture.denoiser(LAW, path)(x[:1], end, torch.tensor([y]))[0] for y in range(3)])
    # The classifier is asked where alpha / sigma is 1e-3, where it is wrong by as much.
    assert torch.allclose(x_0, means[labels], atol=1e-2)
    assert torch.allclose(noise, x, atol=1e-12)
    assert torch.allclose(guided(path).score(x, end, labels), -x, atol=1e-12)


def test_past_t_high_the_three_faces_still_are_of_one_state():
    path = ud.Linear()
    x, _, labels = states(path)
    t = torch.linspace(path.t_high, 1 - 1e-6, len(x), dtype=F64)
    x_0, noise = guided(path).estimate(x, t, labels)
    assert torch.allclose((1 - t)[:, None] * x_0 + t[:, None] * noise, x, atol=1e-12)
    assert torch.allclose(guided(path).score(x, t, labels), -noise / t[:, None], atol=1e-12)


def test_without_a_class_it_is_the_denoiser_and_a_row_does_not_depend_on_others():
    path = ud.VP()
    x, t, labels = states(path)
    model = guided(path, 2.5)
    plain = LAW.denoiser(path)(x, t)
    assert torch.equal(model(x, t), plain)
    mixed = torch.where(labels == 1, torch.full_like(labels, -1), labels)
    got = model(x, t, mixed)
    assert torch.equal(got[mixed < 0], plain[mixed < 0])
    assert torch.allclose(got[mixed >= 0], model(x, t, labels)[mixed >= 0], atol=1e-14)
    assert torch.allclose(model(x[7:8], t[7:8], mixed[7:8]), got[7:8], atol=1e-12)


def energy_distance_test(x: torch.Tensor, y: torch.Tensor, permutations: int = 400) -> tuple[float, float]:
    """The energy distance of two samples of one size, and the 99 % quantile of it when they are shuffled."""
    both = torch.cat([x, y])
    between = torch.cdist(both, both)
    signs = torch.ones(len(both), permutations + 1, dtype=both.dtype)
    signs[len(x) :] = -1
    generator = torch.Generator().manual_seed(0)
    for column in range(1, permutations + 1):
        signs[:, column] = signs[torch.randperm(len(both), generator=generator), 0]
    values = -(signs * (between @ signs)).sum(0) / len(x) ** 2
    return float(values[0]), float(values[1:].quantile(0.99))


@pytest.mark.parametrize("path", [ud.VP(), ud.Linear(), ud.VE()], ids=["vp", "linear", "ve"])
def test_the_conditional_reverse_sde_draws_from_the_class(path):
    """False alarms: 1 % in each of the nine, over seeds; these are fixed."""
    n = 1000
    for label in range(3):
        cond = torch.full((n,), label)
        x = ud.sample(guided(path), (n, 2), solver="ddpm", steps=300, cond=cond, seed=label, dtype=F64)
        truth = LAW.sample(n, ud.Streams.of(100 + label, n), cond)
        distance, bound = energy_distance_test(x, truth)
        assert distance < bound
        # The test has power: neither all classes nor a scale of 1.5 pass for this one.
        assert energy_distance_test(LAW.sample(n, ud.Streams.of(200 + label, n)), truth)[0] > bound


def test_its_likelihood_is_that_of_the_class():
    """Through the flow: the guided velocity and its divergence, so the classifier is differentiated twice."""
    x, labels = LAW.sample(6, ud.Streams.of(3, 6)), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"divergence": "exact", "rtol": 1e-7, "atol": 1e-7, "cond": labels}
    got, exact = (ud.log_likelihood(model, x, **options).nats for model in (guided(ud.VP()), LAW.denoiser(ud.VP())))
    assert torch.allclose(got, exact, atol=1e-6)
    assert torch.allclose(got, LAW.log_prob(x, labels), atol=0.1)  # the path's own end is not quite noise


class Logits(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x, t):
        return x.sum() * torch.ones(self.shape, dtype=x.dtype)


def test_wrong_arguments_are_explained():
    path, x = ud.VP(), torch.zeros(4, 2, dtype=F64)
    with pytest.raises(ArgumentError, match="a classifier trained on another path"):
        ud.ClassifierGuidance(LAW.denoiser(path), LAW.classifier(ud.VP(beta_max=19.0)))
    with pytest.raises(ArgumentError, match="scale is nan"):
        guided(path, float("nan"))
    with pytest.raises(ArgumentError, match=r"returned shape \(4,\) for 4 samples"):
        ud.ClassifierGuidance(LAW.denoiser(path), Logits((4,)))(x, 0.5, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"knows 0 \.\.\. 2"):
        guided(path)(x, 0.5, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ArgumentError, match=r"cond is shape \(3,\)"):
        guided(path)(x, 0.5, torch.tensor([0, 1, 2]))
    with pytest.raises(ArgumentError, match=r"labels 0 \.\.\. K - 1"):
        ud.GaussianMixture(torch.zeros(2, 2), torch.ones(2), labels=torch.tensor([0, 2])).classifier(path)
    with pytest.raises(ArgumentError, match=r"labels 0 \.\.\. K - 1"):
        ud.GaussianMixture(torch.zeros(2, 2), torch.ones(2)).classifier(path)


def test_it_works_in_inference_mode():
    path = PATHS["vp"]
    x, t, labels = states(path)
    model, wanted = guided(path), guided(path)(x, t, labels)
    with torch.inference_mode():
        assert torch.equal(model(x, t, labels), wanted)
        assert torch.equal(model(x + 0, t + 0, labels + 0), wanted)  # made there
