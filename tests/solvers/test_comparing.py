"""`ud.compare`: errors as made by hand through `ud.sample`, calls as counted, and what is recommended."""

import json

import pytest
import torch

import undiffuse as ud
from undiffuse.core.errors import ArgumentError, SamplingError
from undiffuse.solvers import DDIM, EDM, Cell, Comparison, Judged, Multistep, Solver, linear_table

PATH = ud.Linear()
SIZES = (9, 2)


def world() -> ud.Denoiser:
    turns = torch.arange(5, dtype=torch.float64) * 2 * torch.pi / 5
    means = torch.stack([turns.cos(), turns.sin()], dim=1)
    return ud.GaussianMixture(means, torch.full((5,), 0.3).double()).denoiser(PATH)


def test_errors_are_distances_to_the_exact_flow_s_ends():
    """The library's own extrapolation solves the flow to 1e-11, with no code of the solvers in it."""
    found = ud.compare(world(), (2,), ["ddim", "heun"], ["own", "karras"], (6, 9), n=9, seed=4)
    noise = ud.Streams.of(4, 9).normal(SIZES, dtype=torch.float32)
    truth = ud.exact_flow(world(), noise, 1.0, 0.0)
    size = truth.square().mean().sqrt()
    assert found.size == pytest.approx(float(size), rel=1e-4)
    for name, grid, calls, steps in (("ddim", "karras", 9, 9), ("heun", "own", 6, 3), ("heun", "karras", 9, 5)):
        cell = found.cell(name, grid, calls)
        x = ud.sample(world(), noise=noise, solver=name, steps=steps, grid=None if grid == "own" else grid)
        each = (x - truth).square().mean(1)
        assert cell.steps == steps
        assert cell.error == pytest.approx(float(each.mean().sqrt() / size), rel=3e-3)
        assert cell.median == pytest.approx(float(each.sqrt().quantile(0.5) / size), rel=3e-3)
    assert found.rows == [("ddim", "own"), ("ddim", "karras"), ("heun", "own"), ("heun", "karras")]
    assert 0 < found.truth_error < 1e-4


@pytest.mark.parametrize(
    ("name", "calls", "steps", "nfe"),
    # Two calls a step but one in the last; four, and two in the last; two, two in all.
    [("heun", 5, 3, 5), ("heun", 6, 3, 5), ("rk4", 10, 3, 10), ("rk4", 13, 3, 10), ("midpoint", 7, 3, 6),
     ("ab4", 7, 7, 7)],
)  # fmt: skip
def test_the_most_steps_that_fit_are_taken(name, calls, steps, nfe):
    (cell,) = ud.compare(world(), (2,), [name], calls=[calls], n=2).cells
    assert (cell.steps, cell.nfe) == (steps, nfe)
    for count, within in ((steps, True), (steps + 1, False)):
        info = ud.sample(world(), (2, 2), solver=name, steps=count, seed=0, return_info=True)
        assert (info.nfe <= calls) == within


class Failing(Solver):
    order, evals_per_step = 1, 1

    def step(self, field, x, t, s, state, noise):
        if len(x) > 1:
            raise SamplingError("lost its way")
        return field(x, t), state


def test_a_solver_that_fails_keeps_its_cells_and_the_others_theirs():
    found = ud.compare(world(), (2,), {"lost": Failing(), "plain": DDIM()}, calls=[1, 4], n=3)
    lost = [cell for cell in found.cells if cell.solver == "lost"]
    assert [(c.steps, c.error, c.median, c.failure) for c in lost] == [
        (1, None, None, "lost its way"), (4, None, None, "lost its way"),
    ]  # fmt: skip
    assert all(cell.median > 0 for cell in found.cells if cell.solver == "plain")
    assert found.best(4).solver == "plain"
    on_ve = ud.GaussianMixture(torch.zeros(1, 2).double(), torch.ones(1).double()).denoiser(ud.VE())
    assert ud.compare(on_ve, (2,), ["heun"], calls=[1], n=2).cells[0].failure == "not one step can be made in 1 calls"
    only = Comparison(tuple(lost), "", (2,), 3, 1.0, "", 0.0)
    assert only.best(4) is None
    with pytest.raises(ArgumentError, match=r"every solver failed.*lost its way"):
        only.recommend()


def fabricated() -> Comparison:
    def cell(solver, calls, nfe, median):
        return Cell(
            solver, "own", calls, nfe, nfe, None if median is None else 2 * median, median, "" if median else "no"
        )

    cells = (cell("a", 5, 5, 0.2), cell("a", 10, 10, 0.009), cell("a", 20, 20, 0.0001),
             cell("b", 5, 5, 0.1), cell("b", 10, 9, 0.01), cell("b", 20, 19, 0.003),
             cell("c", 5, 5, None), cell("c", 10, 10, 0.002), cell("c", 20, 20, None))  # fmt: skip
    return Comparison(cells, "Linear()", (2,), 32, 0.7, "exactly", 1e-5)


def test_the_fewest_calls_at_the_level_are_recommended_else_the_least_error():
    found = fabricated()
    assert [found.best(calls).solver for calls in found.calls] == ["b", "c", "a"]
    for level, solver, nfe, met in (
        (0.01, "b", 9, True),  # 9 calls before 10, and the level itself is at the level
        (0.0099, "c", 10, True),  # of those with 10 calls the more exact
        (0.15, "b", 5, True),
        (0.001, "a", 20, True),
        (1e-5, "a", 20, False),
    ):
        advice = found.recommend(level)
        assert (advice.cell.solver, advice.cell.nfe, advice.met, advice.level) == (solver, nfe, met, level)
    with pytest.raises(ArgumentError, match="above 0"):
        found.recommend(0.0)


JUDGED = Judged(100, "50 of ring (train)", {"far": "least", "near": "most", "odd": None}, {"held-out": {"far": 0.9}})


def judged() -> Comparison:
    """Cell "a" at 20 calls fails when it is measured; the others' numbers are those of its calls."""
    values = {"a": {5: 1.30, 10: 1.04}, "b": {5: 1.06, 9: 1.05, 19: 1.0}, "c": {10: 1.02}}

    def measure(cell: Cell) -> dict[str, float]:
        if cell.nfe not in values[cell.solver]:
            raise SamplingError("not finite")
        value = values[cell.solver][cell.nfe]
        return {"far": value, "near": 2 - value, "odd": 3.0}

    return fabricated().judge(JUDGED, measure)


def test_cells_are_judged_and_a_number_recommends():
    found = judged()
    assert found.numbers == ["far", "near", "odd"]
    assert found.cell("a", "own", 20).failure == "not finite"
    assert (found.cell("c", "own", 5).failure, found.cell("c", "own", 5).quality) == ("no", {})  # never asked
    assert found.cell("b", "own", 10).median == 0.01  # the errors are as they were
    for number in ("far", "near"):
        assert [found.best(calls, number).solver for calls in found.calls] == ["b", "c", "b"]
    assert found.best(5, "odd") is None
    # The best are 1.0 of "far" and 1.0 of "near", both at 19 calls.
    for number, within, calls in (("far", 0.061, 5), ("far", 0.059, 9), ("far", 0.041, 10), ("far", 0.019, 19),
                                  ("near", 0.061, 5), ("near", 0.021, 10), ("near", 0.0, 19)):  # fmt: skip
        advice = found.recommend_by(number, within)
        assert (advice.cell.nfe, advice.number) == (calls, number)
    assert found.recommend_by("far", 0.041).cell.solver == "c"  # of those with 10 calls the better
    for wrong, message in (("odd", "neither end"), ("fid", "was not measured: far, near, odd")):
        with pytest.raises(ArgumentError, match=message):
            found.recommend_by(wrong)
    with pytest.raises(ArgumentError, match="at least 0"):
        found.recommend_by("far", -0.1)


def test_solvers_that_draw_noise_are_rows_without_an_error():
    found = ud.compare(world(), (2,), ["ddpm", "ddim"], calls=[4], n=3, noisy=True)
    noisy, plain = found.cells
    assert (noisy.steps, noisy.nfe, noisy.error, noisy.median, noisy.failure) == (4, 4, None, None, "")
    assert plain.median == ud.compare(world(), (2,), ["ddim"], calls=[4], n=3).cells[0].median
    alone = ud.compare(world(), (2,), ["ddpm"], calls=[4], n=3, noisy=True)
    assert (alone.size, alone.truth, alone.truth_error) == (None, "", None)
    for name in ("mala", "stay"):
        with pytest.raises(ArgumentError, match="follows no grid"):
            ud.compare(world(), (2,), [name], noisy=True)


def test_it_goes_through_json():
    for found in (fabricated(), judged()):
        assert Comparison.from_dict(json.loads(json.dumps(found.to_dict() | {"run": "elsewhere"}))) == found
    before = {key: value for key, value in fabricated().to_dict().items() if key != "judged"}
    before["cells"] = [{k: v for k, v in cell.items() if k != "quality"} for cell in before["cells"]]
    assert Comparison.from_dict(before) == fabricated()  # of a file made before there were numbers


def test_a_solver_that_was_made_for_one_shape_is_compared_too():
    table = linear_table(Multistep(), PATH, 5, (2,))
    found = ud.compare(world(), (2,), {"table": table, "abm-4": "abm-4"}, calls=(5,), n=9)
    assert found.cell("table", "own", 5).error == pytest.approx(found.cell("abm-4", "own", 5).error, rel=1e-4)


def test_noises_and_conditions_are_those_of_sample():
    """Three seeds and their conditions; the calls told of only grow, and end at all of them."""
    law = ud.GaussianMixture(
        torch.tensor([[-2.0], [2.0]]).double(), torch.tensor([0.3, 0.8]).double(), labels=torch.tensor([0, 1])
    )
    labels = torch.tensor([0, 1, 1])
    told = []
    options = {"n": 3, "seed": [5, 6, 9], "cond": labels, "progress": lambda *a: told.append(a)}
    found = ud.compare(law.denoiser(PATH), (1,), ["ddim"], calls=[3], **options)
    x = ud.sample(law.denoiser(PATH), (3, 1), solver="ddim", steps=3, seed=[5, 6, 9], cond=labels, dtype=torch.float64)
    noise = ud.Streams.of([5, 6, 9], 3).normal((3, 1), dtype=torch.float64)
    truth = ud.exact_flow(law.denoiser(PATH), noise, 1.0, 0.0, cond=labels)
    assert found.cells[0].error == pytest.approx(float((x - truth).norm() / truth.norm()), rel=3e-3)
    done, totals, _ = zip(*told)
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ["huen"]}, "Did you mean 'heun'"),
        ({"solvers": ["heun"], "grids": ["karas"]}, "Did you mean 'karras'"),
        ({"solvers": ["ddpm"]}, "draws noise"),
        ({"solvers": [DDIM(eta=0.5)]}, "draws noise"),
        ({"solvers": {"churned": EDM(S_churn=40)}}, "'churned' draws noise"),
        ({"solvers": ["mala"]}, "draws noise"),
        ({"solvers": ["stay"]}, "draws noise"),
        ({"solvers": ["dopri5"]}, "tolerance"),
        ({"solvers": "heun"}, "lists of names"),
        ({"solvers": []}, "nothing to compare"),
        ({"calls": [5, 0]}, "at least 1"),
        ({"calls": []}, "at least 1"),
        ({"n": 1}, "at least 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ArgumentError, match=message):
        ud.compare(world(), (2,), **options)
