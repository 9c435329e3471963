"""Random streams: the bits belong to (seed, sample, draw, place), and nothing else; and they look random."""

import math
import random

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from undiffuse.core import random as streams
from undiffuse.core.errors import ArgumentError
from undiffuse.core.random import Streams, fresh_seed, hash_key, normal_quantile

F64 = torch.float64
EVENT = (3, 5)  # 15 numbers: no multiple of a vector register, so the scalar tail of a loop is used too
DRAWS = {
    "normal": lambda s, n: s.normal((n, *EVENT)),
    "normal-float64": lambda s, n: s.normal((n, *EVENT), dtype=F64),
    "normal-bfloat16": lambda s, n: s.normal((n, *EVENT), dtype=torch.bfloat16),
    "uniform": lambda s, n: s.uniform((n, *EVENT)),
    "integers": lambda s, n: s.integers(1000, (n, *EVENT)),
    "bits": lambda s, n: s.bits((n, *EVENT)),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


# ---------------------------------------------------------------- the generator itself

WORD = (1 << 64) - 1


def splitmix64(state):
    """Steele, Lea and Flood 2014, in integers of any size: the next word after `state`, and the next state."""
    state = (state + 0x9E3779B97F4A7C15) & WORD
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31), state


def unsigned(words):
    return [word & WORD for word in words.flatten().tolist()]


def test_the_published_sequence_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state, words = 1234567, []
    for _ in published:
        word, state = splitmix64(state)
        words.append(word)
    assert words == published


@pytest.mark.parametrize("seed", [0, 42, -5, 2**63 - 1])
def test_bits_are_splitmix64_of_a_key_made_by_splitmix64(seed):
    """Key of sample i: word i of the sequence that starts at the first word of the seed; a draw hashes once more."""
    owned = Streams.of(seed, 4, first=7)
    for draw in range(3):
        found = unsigned(owned.bits((4, 6)))
        expected = []
        for sample in range(7, 11):
            base, _ = splitmix64(seed & WORD)
            key, _ = splitmix64((base + sample * 0x9E3779B97F4A7C15) & WORD)
            state, _ = splitmix64((key + draw * 0x9E3779B97F4A7C15) & WORD)
            for _ in range(6):
                word, state = splitmix64(state)
                expected.append(word)
        assert found == expected


def test_golden_values():
    """Hard-coded: whoever changes the generator changes every sample of every seed, and has to say so."""
    assert Streams.of(42, 3).keys.tolist() == [6332618229526065668, -816328817471504299, 8971565426155258802]
    normals = Streams.of(42, 3).normal((3, 4), dtype=F64)
    assert [value.hex() for value in normals.flatten().tolist()] == [
        "0x1.62125b2f9e0d9p-1",
        "-0x1.14f9dc21343cfp-3",
        "-0x1.63f19f0fcf89dp-1",
        "0x1.2c4883fc0b11ap-1",
        "-0x1.b3f4516dd28c2p-1",
        "-0x1.85f7b07efdf3ap-1",
        "-0x1.7ccce6fb79dfbp-1",
        "0x1.600f5d18b5aadp-1",
        "0x1.b3f37025aad8ap-1",
        "0x1.7bf3b10f77194p-3",
        "-0x1.12425b6c48752p-4",
        "0x1.1a7dc08733aa0p+0",
    ]
    uniforms = Streams.of(42, 3).uniform((3, 2), dtype=F64)
    assert [value.hex() for value in uniforms.flatten().tolist()] == [
        "0x1.82c253d9a1b8bp-1",
        "0x1.c8eb532f5f26ep-2",
        "0x1.93f97f8e1a7f4p-3",
        "0x1.c8f9e267db0b4p-3",
        "0x1.9b016190860e1p-1",
        "0x1.25adaf531af5dp-1",
    ]
    assert Streams.of(42, 3).integers(1000, (3, 5)).tolist() == [
        [755, 446, 243, 721, 493],
        [197, 223, 228, 754, 489],
        [802, 573, 473, 865, 149],
    ]
    folded = Streams.of([5, 6]).fold("train").fold(7).normal((2, 2))
    assert folded.tolist() == [
        [0.8789353370666504, 0.5146191120147705],
        [-1.1091424226760864, -0.12011680006980896],
    ]


def test_golden_keys():
    assert hash_key() == 0
    assert hash_key("train") == -286667492501560372
    assert hash_key(3, "train", 5) == -3051990818439333984
    assert hash_key(0) == -2152535657050944081
    assert hash_key(-1) == -1956407806741107680


def test_a_key_depends_on_every_part_and_on_their_order():
    keys = [hash_key(*parts) for parts in ((1, 2), (2, 1), (1,), (2,), (1, 2, 0), ("1", 2), ("a", "b"), ("ab",))]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


# ---------------------------------------------------------------- what a row depends on


@every_draw
@pytest.mark.parametrize("split", [[64], [1] * 64, [7] * 9 + [1], [33, 31], [63, 1]])
def test_rows_are_bit_equal_for_every_split_of_the_batch(draw, split):
    whole = Streams.of(7, 64)
    rows = [draw(whole, 64) for _ in range(3)]
    first, parts = 0, []
    for n in split:
        part = Streams.of(7, n, first=first)
        parts.append([draw(part, n) for _ in range(3)])
        first += n
    for d in range(3):
        assert torch.equal(rows[d], torch.cat([part[d] for part in parts]))


@every_draw
def test_the_first_stream_of_each_seed_does_not_depend_on_its_neighbours(draw):
    seeds = [3, 17, 3, -4, 2**40]
    together = draw(Streams.of(seeds), 5)
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i : i + 1], draw(Streams.of(seed, 1), 1))
    assert torch.equal(together, draw(Streams.of(torch.tensor(seeds)), 5))
    third = draw(Streams.of(seeds, first=3), 5)
    assert torch.equal(third[1:2], draw(Streams.of(17, 1, first=3), 1))


@every_draw
def test_selected_and_folded_streams_keep_their_rows(draw):
    chosen = torch.tensor([5, 0, 3])
    whole = Streams.of(7, 8)
    draw(whole, 8)
    part = whole.select(chosen)
    assert torch.equal(draw(part, 3), draw(whole, 8)[chosen])
    assert len(whole.select(slice(2, 5))) == 3
    folded = Streams.of(7, 8).fold("churn").fold(3)
    assert torch.equal(draw(Streams.of(7, 8).select(chosen).fold("churn").fold(3), 3), draw(folded, 8)[chosen])


@every_draw
def test_a_draw_is_found_again_by_its_number(draw):
    one = Streams.of(7, 4)
    drawn = [draw(one, 4) for _ in range(5)]
    assert one.draw == 5
    again = Streams.of(7, 4)
    again.draw = 3
    assert torch.equal(draw(again, 4), drawn[3])
    assert torch.equal(draw(Streams(one.keys, draw=1), 4), drawn[1])
    assert torch.equal(draw(Streams.of(7, 4).at(2), 4), drawn[2])
    assert one.draw == 5
    assert len({str(values.tolist()) for values in drawn}) == 5


def test_a_number_does_not_depend_on_the_size_of_the_event():
    long = Streams.of(7, 4).normal((4, 1000), dtype=F64)
    for size in range(1, 40):
        assert torch.equal(Streams.of(7, 4).normal((4, size), dtype=F64), long[:, :size])
    assert torch.equal(Streams.of(7, 4).normal((4, 10, 100), dtype=F64).flatten(1), long)
    assert torch.equal(Streams.of(7, 4).normal((4,), dtype=F64), long[:, 0])


def test_narrow_types_are_roundings_of_the_same_numbers():
    wide = Streams.of(7, 4).normal((4, 999), dtype=F64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = Streams.of(7, 4).normal((4, 999), dtype=dtype)
        assert found.dtype is dtype
        assert torch.equal(found, wide.to(dtype))


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Streams.of(7, 3).normal((3, 100_003))
        torch.set_num_threads(2)
        assert torch.equal(Streams.of(7, 3).normal((3, 100_003)), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_draw
def test_another_device_draws_the_same_bits(draw):
    here, there = Streams.of(7, 64), Streams.of(7, 64, device="cuda")
    for _ in range(3):
        assert torch.equal(draw(here, 64), draw(there, 64).cpu())


def test_the_device_is_the_one_asked_for_and_else_that_of_the_keys():
    owned = Streams.of(7, 2, device="cpu")
    assert owned.normal((2, 3)).device.type == "cpu"
    assert owned.uniform((2, 3), device="meta").device.type == "meta"
    assert owned.draw == 2


def test_no_global_generator_is_read_or_moved():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = Streams.of(7, 4).normal((4, 5))
    Streams.of(7, 4).uniform((4, 5))
    Streams.of([1, 2]).fold("x").integers(9, (2, 5))
    hash_key("x", 3)
    fresh_seed()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.manual_seed(4)
    assert torch.equal(Streams.of(7, 4).normal((4, 5)), first)


def test_fresh_seeds_differ_and_fit():
    """The chance that two of 50 seeds of 31 bits agree is 6e-7."""
    seeds = [fresh_seed() for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


# ---------------------------------------------------------------- whether the numbers look random

ROWS, COLUMNS = 1000, 1000
# Correlations of a million pairs have standard error 1e-3; 5.5 of them are crossed with probability 4e-8, so all
# correlations of this file together raise a false alarm with probability below 2e-6.
LIMIT = 5.5e-3


def correlation(a, b):
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def block(source):
    return source.normal((ROWS, COLUMNS), dtype=F64)


PAIRS = {
    "draws": lambda: (block(Streams.of(1, ROWS)), block(Streams(Streams.of(1, ROWS).keys, draw=1))),
    "samples": lambda: (block(Streams.of(1, ROWS)), block(Streams.of(1, ROWS, first=1))),
    "seeds": lambda: (block(Streams.of(1, ROWS)), block(Streams.of(2, ROWS))),
    "seeds-in-a-row": lambda: (block(Streams.of(list(range(ROWS)))), block(Streams.of(list(range(1, ROWS + 1))))),
    "fold": lambda: (block(Streams.of(1, ROWS)), block(Streams.of(1, ROWS).fold("noise"))),
    "folds-by-name": lambda: (block(Streams.of(1, ROWS).fold("a")), block(Streams.of(1, ROWS).fold("b"))),
    "folds-by-number": lambda: (block(Streams.of(1, ROWS).fold(0)), block(Streams.of(1, ROWS).fold(1))),
    "fold-and-draw": lambda: (block(Streams.of(1, ROWS).fold(1)), block(Streams(Streams.of(1, ROWS).keys, draw=1))),
    "hashed-steps": lambda: (
        block(Streams.of(hash_key(0, "train", 5), ROWS)),
        block(Streams.of(hash_key(0, "train", 6), ROWS)),
    ),
    "neighbours": lambda: (
        (whole := Streams.of(1, ROWS).normal((ROWS, COLUMNS + 1), dtype=F64))[:, 1:],
        whole[:, :-1],
    ),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_streams_that_differ_in_one_respect_are_uncorrelated(pair):
    a, b = pair()
    assert abs(correlation(a, b)) < LIMIT
    assert abs(correlation(a.square(), b.square())) < LIMIT
    assert abs(correlation(a, b.square())) < LIMIT


def test_no_word_comes_twice():
    """Of 1.2 million words of 64 bits two agree with probability 4e-8; overlapping streams would share many."""
    sources = [Streams.of(seed, 100, first=first) for seed in (0, 1, 2) for first in (0, 100)]
    sources += [Streams.of(0, 100).fold(part) for part in (0, 1, "a", "b", "c", "d")]
    words = torch.cat([source.bits((100, 1000)).flatten() for source in sources])
    assert len(words.unique()) == len(words) == 1_200_000


def test_every_bit_is_a_fair_coin():
    """64 bits of a million words: 6 standard errors, false-alarm rate 1e-7."""
    words = Streams.of(11, 1000).bits((1000, 1000)).flatten()
    for place in range(64):
        share = float(((words >> place) & 1).double().mean())
        assert abs(share - 0.5) < 6 * 0.5e-3


@pytest.mark.parametrize(
    ("values", "law"),
    [
        (lambda s: s.normal((500, 400), dtype=F64), "norm"),
        (lambda s: s.uniform((500, 400), dtype=F64), "uniform"),
    ],
    ids=["normal", "uniform"],
)
@pytest.mark.parametrize("along", ["places", "samples", "draws"])
def test_kolmogorov_and_smirnov_find_no_other_law(values, law, along):
    """200,000 numbers, p above 1e-6 each: false-alarm rate 6e-6 together; a scale off by 1 % gives p below 1e-3."""
    if along == "places":
        found = values(Streams.of(3, 500))
    elif along == "samples":
        found = Streams.of(4, 200_000)
        found = getattr(found, "normal" if law == "norm" else "uniform")((200_000,), dtype=F64)
    else:
        source = Streams.of(5, 1000)
        draw = getattr(source, "normal" if law == "norm" else "uniform")
        found = torch.stack([draw((1000,), dtype=F64) for _ in range(200)])
    assert scipy.stats.kstest(found.flatten().numpy(), law).pvalue > 1e-6


def test_the_first_four_moments_of_a_million_normals():
    """5.5 standard errors (1, sqrt 2, sqrt 15, sqrt 96, over 1,000): false-alarm rate 2e-7."""
    z = Streams.of(6, 1000).normal((1000, 1000), dtype=F64)
    for power, mean, spread in ((1, 0.0, 1.0), (2, 1.0, 2**0.5), (3, 0.0, 15**0.5), (4, 3.0, 96**0.5)):
        assert abs(float((z**power).mean()) - mean) < 5.5e-3 * spread


def test_integers_are_uniform_over_their_range():
    """Chi-square over 7 values and 700,000 draws, p above 1e-6."""
    counts = Streams.of(8, 700).integers(7, (700, 1000)).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-6
    assert Streams.of(8, 2).integers(1, (2, 50)).unique().tolist() == [0]


# ---------------------------------------------------------------- the ends


@pytest.fixture
def extremes(monkeypatch):
    """A stream whose words are the smallest and the largest that there are."""
    source = Streams.of(1, 1)
    monkeypatch.setattr(source, "bits", lambda shape, device=None: torch.tensor([[0, -1]]))
    return source


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_is_never_zero_or_one(extremes, dtype):
    low, high = extremes.uniform((1, 2), dtype=dtype)[0].double().tolist()
    assert low == 2.0**-53
    assert high == 1 - torch.finfo(dtype).eps / 2 < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_uniforms_stay_inside(dtype):
    found = Streams.of(9, 1000).uniform((1000, 1000), dtype=dtype)
    assert float(found.min()) > 0.0
    assert float(found.max()) < 1.0


def test_normals_are_finite_and_symmetric_at_the_ends(extremes):
    low, high = extremes.normal((1, 2), dtype=F64)[0].tolist()
    assert high == -low == pytest.approx(-scipy.special.ndtri(2.0**-53), rel=1e-14)


def test_integers_stay_below_their_bound_at_the_ends(extremes):
    for high in (1, 7, 2**31):
        assert extremes.integers(high, (1, 2)).tolist() == [[0, high - 1]]


# ---------------------------------------------------------------- the normal quantile


def test_normal_quantile_equals_scipys_within_1e_14():
    """All three branches, the joints between them (|p - 1/2| = 0.425 and sqrt(-log p) = 5), both tails."""
    joints = torch.tensor([0.075, 0.925, math.exp(-25.0)], dtype=F64)
    near = torch.linspace(-1e-9, 1e-9, 101, dtype=F64)
    p = torch.cat(
        [
            torch.logspace(-300, -1e-9, 100_001, dtype=F64),
            torch.linspace(1e-6, 1 - 1e-6, 200_000, dtype=F64),
            1 - torch.logspace(-15.9, -1, 10_001, dtype=F64),
            (joints[:, None] * (1 + near)).flatten(),
            0.5 + torch.logspace(-15, -2, 1001, dtype=F64),
            torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=F64),
        ]
    )
    expected = torch.from_numpy(scipy.special.ndtri(p.numpy()))
    torch.testing.assert_close(normal_quantile(p), expected, rtol=1e-14, atol=0)


def test_normal_quantile_is_odd_about_one_half_and_increases():
    p = torch.arange(1, 4096, dtype=F64) / 4096  # 1 - p is exact
    z = normal_quantile(p)
    assert torch.equal(z, -z.flip(0))
    assert z[2047] == 0.0
    assert (z.diff() > 0).all()


def test_one_number_alone_has_the_bits_it_has_among_many():
    p = torch.cat([torch.logspace(-17, -0.01, 500, dtype=F64), torch.linspace(0.01, 0.99, 531, dtype=F64)])
    together = normal_quantile(p)
    assert torch.equal(torch.cat([normal_quantile(p[i : i + 1]) for i in range(len(p))]), together)
    assert torch.equal(normal_quantile(p.reshape(1031, 1).expand(1031, 3))[:, 2], together)


def test_its_logarithm_is_within_one_unit_in_the_last_place():
    x = torch.cat([torch.logspace(-300, 0, 50_001, dtype=F64), 1 - torch.logspace(-15, -1, 1001, dtype=F64)])
    expected = torch.from_numpy(np.log(x.numpy()))
    torch.testing.assert_close(streams._log(x), expected, rtol=5e-16, atol=0)


# ---------------------------------------------------------------- the three sources, and refusals

FUNCTIONS = {
    "normal": (streams.normal, lambda g: torch.randn((4, 5), generator=g)),
    "uniform": (streams.uniform, lambda g: torch.rand((4, 5), generator=g)),
    "integers": (
        lambda shape, *rest: streams.integers(9, shape, *rest),
        lambda g: torch.randint(9, (4, 5), generator=g),
    ),
}


@pytest.mark.parametrize(("function", "torchs"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_draw_takes_streams_or_a_generator_or_the_global_one(function, torchs):
    by_generator = function((4, 5), torch.Generator().manual_seed(3))
    assert torch.equal(by_generator, torchs(torch.Generator().manual_seed(3)))
    torch.manual_seed(3)
    assert torch.equal(function((4, 5)), by_generator)
    owned = Streams.of(3, 4)
    by_streams = function((4, 5), owned)
    assert owned.draw == 1
    assert not torch.equal(by_streams, by_generator)
    assert torch.equal(by_streams[2:], function((2, 5), Streams.of(3, 2, first=2)))


def test_functions_hand_on_the_dtype():
    for source in (Streams.of(3, 4), torch.Generator().manual_seed(3), None):
        assert streams.normal((4, 5), source, dtype=F64).dtype is F64
        assert streams.uniform((4, 5), source, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert streams.integers(9, (4, 5), source).dtype is torch.int64


def test_seeds_and_counts_that_disagree_are_refused():
    with pytest.raises(ArgumentError, match="needs n"):
        Streams.of(3)
    with pytest.raises(ArgumentError, match=r"shape \(3,\).*each of 2 samples"):
        Streams.of([1, 2, 3], 2)
    with pytest.raises(ArgumentError, match=r"shape \(2, 2\)"):
        Streams.of(torch.ones(2, 2, dtype=torch.int64))
    assert len(Streams.of([1, 2, 3], 3)) == 3


@pytest.mark.parametrize("shape", [(), (3, 5), (5, 4)])
def test_a_shape_that_is_not_one_row_for_each_stream_is_refused_and_draws_nothing(shape):
    owned = Streams.of(3, 4)
    with pytest.raises(ArgumentError, match="its first size must be 4"):
        owned.normal(shape)
    assert owned.draw == 0


def test_no_samples_and_no_numbers_are_allowed():
    assert Streams.of(3, 0).normal((0, 5)).shape == (0, 5)
    assert Streams.of(3, 4).uniform((4, 0)).shape == (4, 0)
