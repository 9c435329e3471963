"""Numbers measured in unlike ways refuse to be compared, and say in what they differ."""

import dataclasses
import json
import math

import pytest

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import Protocol, Result, compare, spread

BASE = Protocol(
    n=50_000,
    reference="cifar10",
    split="train",
    reference_n=50_000,
    reference_fingerprint="ab12",
    features="inception",
    features_hash="cd34",
    data_range=(-1, 1),
    solver="heun",
    steps=18,
    nfe=35,
    grid="karras",
    precision="fp32",
    guidance=None,
    seeds="0-49999",
    ema="0.5M",
    path="Karras",
    model="small",
    run="runs/one",
    step=1000,
)

# One other value for every field; a new field has to be added here.
OTHER = {
    "n": 2000,
    "reference": "cifar100",
    "split": "held-out",
    "reference_n": 10_000,
    "reference_fingerprint": "ef",
    "features": "pixels",
    "features_hash": "",
    "data_range": (0.0, 1.0),
    "solver": "euler",
    "steps": 20,
    "nfe": 20,
    "grid": "time",
    "precision": "bf16",
    "guidance": 1.5,
    "seeds": "1-50000",
    "ema": None,
    "path": "VP",
    "model": "large",
    "run": "runs/two",
    "step": 2000,
}
IDENTITY = {"model", "run", "step"}


def result(value=2.0, protocol=BASE, **kwargs):
    return Result("frechet", value, protocol, **kwargs)


def test_every_field_has_another_value_here():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Protocol)}


@pytest.mark.parametrize("name", OTHER)
def test_each_difference_in_how_is_refused_by_name_and_in_which_model_is_not(name):
    other = result(protocol=dataclasses.replace(BASE, **{name: OTHER[name]}))
    if name in IDENTITY:
        assert compare(result(), other).ratio == 1.0
        return
    with pytest.raises(ArgumentError) as refusal:
        compare(result(), other)
    text = str(refusal.value)
    assert f"{name}: {getattr(BASE, name)!r} and {OTHER[name]!r}" in text
    assert not any(f" {field}: " in text for field in OTHER if field != name)
    assert compare(result(), other, allow=(name,)).difference == 0.0


def test_all_differences_are_named_at_once():
    other = dataclasses.replace(BASE, n=2000, split="held-out", run="runs/two")
    assert BASE.differences(other) == {"n": (50_000, 2000), "split": ("train", "held-out")}
    with pytest.raises(ArgumentError, match=r"n: 50000 and 2000; split: 'train' and 'held-out'"):
        compare(result(), result(protocol=other))


def test_a_comparison_is_a_difference_and_a_ratio():
    found = compare(result(3.0), result(2.0))
    assert (found.a, found.b, found.difference, found.ratio) == (3.0, 2.0, 1.0, 1.5)
    assert compare(result(3.0), result(0.0)).ratio is None


def test_unlike_quantities_and_settings_are_refused():
    with pytest.raises(ArgumentError, match="'frechet' and 'kernel' are different quantities"):
        compare(result(), Result("kernel", 1.0, BASE))
    with pytest.raises(ArgumentError, match=r"settings\.k: 3 and 5"):
        compare(result(settings={"k": 3}), result(settings={"k": 5}))
    with pytest.raises(ArgumentError, match=r"settings\.k: 3 and None"):
        compare(result(settings={"k": 3}), result())
    # What came out beside the value is no part of how it was measured.
    compare(result(extra={"closest": [1]}, std=0.1), result(extra={"closest": [2]}, std=0.2))


def test_allowing_an_unknown_field_names_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'solver'"):
        compare(result(), result(), allow=("solvr",))


def test_json_there_and_back_is_the_same():
    full = result(
        1 / 3,
        std=0.1 + 0.2,
        settings={"subsets": 100, "factors": [0.25, 4.0], "size": None},
        extra={"closest": [3, 1], "per_class": {"0": 0.5}},
        warnings=("few samples", "other"),
    )
    assert Result.from_json(full.to_json()) == full
    assert Result.from_dict(full.to_dict()) == full
    assert Protocol.from_dict(json.loads(json.dumps(dataclasses.asdict(BASE)))) == BASE
    bare = Result("frechet", 1.0, dataclasses.replace(BASE, data_range=None, solver=None))
    assert Result.from_json(bare.to_json()) == bare
    compare(Result.from_json(full.to_json()), full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(valeu=1), "unknown result field 'valeu'.*Did you mean 'value'"),
        (lambda d: d.pop("value"), "a result lacks value"),
        (lambda d: d["protocol"].pop("split"), "a protocol lacks split"),
        (lambda d: d["protocol"].update(solvr="x"), "Did you mean 'solver'"),
        (lambda d: d["protocol"].update(n="many"), "n = 'many': expected an integer"),
        (lambda d: d.update(protocol=[1]), "a protocol must be a mapping.*list"),
    ],
)
def test_json_that_is_no_result_is_refused(change, message):
    values = result().to_dict()
    change(values)
    with pytest.raises(ArgumentError, match=message):
        Result.from_json(json.dumps(values))


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ArgumentError, match="must be JSON"):
        Result.from_json("{")
    with pytest.raises(ArgumentError, match="must be a mapping"):
        Result.from_json("3")


@pytest.mark.parametrize("value", [math.nan, {1, 2}])
def test_what_json_has_no_place_for_is_not_written(value):
    with pytest.raises(ArgumentError, match="'frechet' cannot be written as JSON"):
        result(extra={"odd": value}).to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_result_is_finite(value):
    with pytest.raises(ArgumentError, match="must be finite"):
        result(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n = 0"),
        ({"reference_n": -1}, "reference_n = -1"),
        ({"steps": 0}, "steps = 0"),
        ({"nfe": 0}, "nfe = 0"),
        ({"split": ""}, "split is empty"),
        ({"reference": ""}, "reference is empty"),
        ({"data_range": (1.0, -1.0)}, "low < high"),
        ({"data_range": (0.0, math.nan)}, "low < high"),
    ],
)
def test_protocols_that_cannot_be_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(BASE, **change)


def test_a_protocol_is_frozen_and_has_no_default_split():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.n = 1  # pyright: ignore
    with pytest.raises(TypeError, match="split"):
        Protocol(n=1, reference="x", reference_n=1, reference_fingerprint="")  # pyright: ignore


def test_a_spread_over_seeds_keeps_the_minimum_apart_from_the_mean():
    runs = [result(v, dataclasses.replace(BASE, seeds=f"{i}")) for i, v in enumerate([2.0, 1.0, 6.0])]
    found = spread(runs)
    assert (found.mean, found.minimum, found.maximum, found.count) == (3.0, 1.0, 6.0, 3)
    assert found.std == pytest.approx(math.sqrt((1 + 4 + 9) / 2), rel=1e-14)
    with pytest.raises(ArgumentError, match="at least 2"):
        spread(runs[:1])
    with pytest.raises(ArgumentError, match="solver"):
        spread([runs[0], result(1.0, dataclasses.replace(BASE, solver="euler"))])
