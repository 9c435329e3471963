"""One call for all metrics: values equal the functions', refusals come before the work."""

import dataclasses

import pytest
import torch

from undiffuse import metrics as m
from undiffuse.core.errors import ArgumentError
from undiffuse.metrics.registry import Frechet, Kernel, PrecisionRecall

NUMBERS = [
    "frechet",
    "kernel",
    "precision",
    "recall",
    "density",
    "coverage",
    "mmd",
    "sliced-wasserstein",
    "nearest",
    "class-accuracy",
]


def images(n, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 2, 3, generator=generator) * 0.2 + shift).clamp(-1, 1)


SAMPLES, REFERENCE, HELD_OUT = images(60, 0, 0.1), images(50, 1), images(40, 2)
LABELS = (torch.arange(60) % 3, torch.arange(50) % 3)
PROTOCOL = m.Protocol(
    n=60, reference="made", split="train", reference_n=50, reference_fingerprint="f", data_range=(-1, 1)
)


def evaluate(metrics, samples=SAMPLES, reference=REFERENCE, protocol=PROTOCOL, **options):
    return m.evaluate(samples, reference, metrics=metrics, protocol=protocol, **options)


def test_every_metric_by_name_gives_the_value_of_its_function():
    found = evaluate(list(m.METRICS), held_out=HELD_OUT, labels=LABELS)
    assert [one.name for one in found] == NUMBERS
    value = {one.name: one.value for one in found}
    assert value["frechet"] == m.frechet_distance(SAMPLES, REFERENCE)
    kernel = m.kernel_distance(SAMPLES, REFERENCE)
    assert (value["kernel"], found[1].std) == (kernel.mean, kernel.std)
    assert (value["precision"], value["recall"]) == m.precision_recall(SAMPLES, REFERENCE, k=3)
    assert (value["density"], value["coverage"]) == m.density_coverage(SAMPLES, REFERENCE, k=5)
    assert value["mmd"] == m.mmd(SAMPLES, REFERENCE)
    assert value["sliced-wasserstein"] == m.sliced_wasserstein(SAMPLES, REFERENCE)
    nearest = m.nearest_neighbour(SAMPLES, REFERENCE, HELD_OUT)
    assert value["nearest"] == nearest.ratio
    accuracy = m.class_accuracy(SAMPLES, LABELS[0], REFERENCE, LABELS[1])
    assert value["class-accuracy"] == accuracy.accuracy
    for one in found:
        assert one.protocol == PROTOCOL
        assert m.Result.from_json(one.to_json()) == one


def test_the_nearest_pairs_are_there_for_a_picture():
    copied = torch.cat([images(57, 5), REFERENCE[[7, 3, 9]]])
    found = evaluate(["nearest"], samples=copied, held_out=HELD_OUT)[0]
    assert sorted(found.extra["closest_samples"][:3]) == [57, 58, 59]
    pairs = dict(zip(found.extra["closest_samples"], found.extra["closest_training"]))
    assert (pairs[57], pairs[58], pairs[59]) == (7, 3, 9)
    assert found.extra["closest_distances"] == sorted(found.extra["closest_distances"])
    assert found.extra["duplicates"] == 3
    assert "3 samples are exact copies of training images" in found.warnings


def test_settings_of_a_metric_object_are_used_and_recorded():
    with_one, with_seven = (evaluate([PrecisionRecall(k=k)])[0] for k in (1, 7))
    assert with_one.settings == {"k": 1}
    assert with_one.value == m.precision_recall(SAMPLES, REFERENCE, k=1).precision
    with pytest.raises(ArgumentError, match=r"settings\.k: 1 and 7"):
        m.compare(with_one, with_seven)
    again = evaluate([Kernel(subsets=3, subset_size=20, seed=1)])[0]
    assert again.value == m.kernel_distance(SAMPLES, REFERENCE, subsets=3, subset_size=20, seed=1).mean


def test_few_samples_are_said_to_be_few_where_the_mean_depends_on_n():
    notes = {one.name: one.warnings for one in evaluate(list(m.METRICS), held_out=HELD_OUT, labels=LABELS)}
    for name in ("frechet", "precision", "recall", "density", "coverage", "sliced-wasserstein"):
        assert any("n = 60 samples" in note and "10000" in note for note in notes[name])
    assert notes["kernel"] == notes["mmd"] == ()
    many = torch.zeros(10_000, 2).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    protocol = dataclasses.replace(PROTOCOL, n=10_000)
    assert evaluate([Frechet()], samples=many, reference=many[:50], protocol=protocol)[0].warnings == ()
    wide = images(4, 3)
    small = evaluate(["frechet"], samples=wide, protocol=dataclasses.replace(PROTOCOL, n=4))[0]
    assert any("d + 1 = 7" in note for note in small.warnings)


class Halves(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 0.5


def test_features_replace_pixels_in_every_set_and_enter_the_protocol():
    net = Halves().eval()
    names = [name for name in m.METRICS if name != "class-accuracy"]
    found = evaluate(names, features=net, held_out=HELD_OUT)
    by_hand = evaluate(
        names,
        samples=net(SAMPLES),
        reference=net(REFERENCE),
        held_out=net(HELD_OUT),
        protocol=dataclasses.replace(PROTOCOL, data_range=None),
    )
    assert [one.value for one in found] == [one.value for one in by_hand]
    assert found[0].protocol.features == "Halves"
    assert found[0].protocol.features_hash == m.weights_hash(net)
    with pytest.raises(ArgumentError, match="features: 'Halves' and 'pixels'"):
        m.compare(found[0], evaluate(["frechet"])[0])


def test_features_without_a_hash_are_warned_about():
    found = evaluate(["frechet"], features=lambda x: x.flatten(1))[0]
    assert found.protocol.features_hash == "unhashed"
    assert any("have no hash" in note for note in found.warnings)


def test_a_protocol_that_states_other_features_is_refused():
    stated = dataclasses.replace(PROTOCOL, features="inception", features_hash="ab")
    with pytest.raises(ArgumentError, match=r"states features \('inception', 'ab'\).*\('pixels', ''\)"):
        evaluate(["frechet"], protocol=stated)
    net = Halves().eval()
    right = dataclasses.replace(PROTOCOL, features="Halves", features_hash=m.weights_hash(net))
    assert evaluate(["frechet"], protocol=right, features=net)[0].protocol == right


def refuses_to_work(_x):
    pytest.fail("features were computed before the arguments were checked")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["frechet", "frechett"]}, "unknown metric 'frechett'. Did you mean 'frechet'"),
        ({"metrics": []}, "no metric was asked for"),
        ({"metrics": ["nearest"]}, "'nearest' needs held out, and none were given"),
        ({"metrics": ["class-accuracy"]}, "'class-accuracy' needs labels"),
        ({"samples": SAMPLES[:59]}, "59 samples were given, and the protocol states 60"),
        ({"reference": REFERENCE[:49]}, "49 reference images were given, and the protocol states 50"),
        ({"samples": SAMPLES[:, :, :, :2]}, "event shape"),
        ({"held_out": HELD_OUT[:, :, :, :2]}, "held-out images have event shape"),
        ({"samples": SAMPLES * float("nan")}, "not finite"),
        ({"held_out": HELD_OUT * float("nan")}, "held-out images hold a value that is not finite"),
        ({"reference": (REFERENCE + 1) * 127.5}, r"the protocol states \(-1\.0, 1\.0\)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(change, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(**{"metrics": ["frechet"], "features": refuses_to_work, **change})


def test_progress_names_what_is_done():
    calls = []
    evaluate(["frechet", "mmd"], features=Halves().eval(), progress=lambda *call: calls.append(call))
    assert calls == [
        ("features Halves", 60, 60),
        ("features Halves", 50, 50),
        ("frechet", 0, 2),
        ("mmd", 1, 2),
        ("metrics", 2, 2),
    ]


def test_every_registered_metric_is_under_its_own_name():
    assert all(kind.name == name for name, kind in m.METRICS.items())
    assert m.metric("kernel") == Kernel()
