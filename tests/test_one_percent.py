"""The suite notices a coefficient that is off by 1 %: each mutation must make its test fail."""

from unittest import mock

import pytest
import torch

from fields import test_denoiser, test_prediction
from objectives import test_denoising
from paths import test_paths
from undiffuse.fields import prediction
from undiffuse.objectives import weights
from undiffuse.paths import VP, Cosine, Karras, Linear, SubVP, Trig


def scaled(method):
    """The method, its result 1 % too large."""
    return lambda *args, **kwargs: 1.01 * method(*args, **kwargs)


def must_fail(test, *args):
    with pytest.raises(AssertionError):
        test(*args)


@pytest.mark.parametrize("path", [VP, SubVP, Cosine, Linear, Trig, Karras], ids=lambda p: p.__name__)
@pytest.mark.parametrize("method", ["sigma_dot", "alpha_dot"])
def test_a_path_s_derivative(path, method):
    if path is Karras and method == "alpha_dot":
        pytest.skip("alpha' = 0")
    with mock.patch.object(path, method, scaled(getattr(path, method))):
        must_fail(test_paths.test_declared_derivatives_equal_autograd, path())
    test_paths.test_declared_derivatives_equal_autograd(path())


@pytest.mark.parametrize("path", [VP, SubVP], ids=lambda p: p.__name__)
@pytest.mark.parametrize("method", ["drift", "diffusion"])
def test_a_path_s_sde(path, method):
    with mock.patch.object(path, method, scaled(getattr(path, method))):
        must_fail(test_paths.test_the_linear_sde_has_the_marginals, path())


@pytest.mark.parametrize("name", prediction.PREDICTIONS)
@pytest.mark.parametrize("entry", ["c_skip", "c_out", "e_skip", "e_out", "a", "b"])
def test_a_prediction_s_conversion(name, entry):
    original = prediction.Prediction.coefficients

    def mutated(self, path, t, sigma_data=0.5):
        c = original(self, path, t, sigma_data)
        if self.name != name:
            return c
        values = {**vars(c), entry: 1.01 * getattr(c, entry)}
        return prediction.Coefficients(**values)

    t = torch.tensor(0.5, dtype=torch.float64)
    value = getattr(prediction.PREDICTIONS[name].coefficients(Linear(), t), entry)
    if value == 0:
        pytest.skip("the coefficient is 0")
    with mock.patch.object(prediction.Prediction, "coefficients", mutated):
        noticed = 0
        for test, args in (
            (test_prediction.test_data_and_noise_from_every_output, (Linear(),)),
            (test_prediction.test_data_and_noise_from_every_output, (VP(),)),
            (test_denoiser.test_denoiser_noise_score_velocity, (VP(), name)),
        ):
            try:
                test(*args)
            except AssertionError:
                noticed += 1
    assert noticed


@pytest.mark.parametrize("weight", [weights.SNR, weights.MinSNR, weights.TruncatedSNR, weights.Likelihood, weights.EDM])
def test_a_weight(weight):
    with mock.patch.object(weight, "on_data", scaled(weight.on_data)):
        name = next(k for k, v in weights.WEIGHTS.items() if v is weight)
        must_fail(test_denoising.test_every_weight_on_every_prediction, VP(), name, "noise")


def test_the_simple_weight():
    with mock.patch.object(weights.Simple, "on_output", scaled(weights.Simple.on_output)):
        must_fail(test_denoising.test_simple_is_the_error_of_the_output, "noise")


def test_a_time_distribution():
    from undiffuse.objectives import times

    with mock.patch.object(times.LogNormal, "quantile", scaled(times.LogNormal.quantile)):
        must_fail(test_denoising.test_time_distributions_have_their_quantiles)
