"""Curves: the drawn coordinates are the data's, whatever the log holds."""

import itertools
import math
import re

import pytest

from undiffuse.report import curves, read_metrics
from undiffuse.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Band, Chart, Hint, Line
from undiffuse.report.scales import LogScale, Scale, fit_scale

NAN = float("nan")


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    """The unbroken stretches of every line of a chart, in viewBox units."""
    stretches = []
    for path in re.findall(r'<g class="[a-z]+"><path d="([^"]*)"', svg):
        for stretch in path.split("M")[1:]:
            places = [tuple(map(float, place.split())) for place in stretch.replace("h0", "").split("L")]
            stretches.append(places)
    return stretches


def test_linear_axis_in_closed_form():
    x, y = [0.0, 10.0, 40.0], [0.0, 1.0, 5.0]
    (line,) = drawn(Chart("s", "x", "y", [Line(x, y)]).svg())
    for (px, py), a, b in zip(line, x, y):
        assert px == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) * a / 40, abs=0.006)
        assert py == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * b / 5, abs=0.006)


def test_log_axis_in_closed_form_and_named():
    y = [0.01, 0.1, 0.5, 10.0]
    svg = Chart("s", "x", "loss", [Line([1.0, 2.0, 3.0, 4.0], y)]).svg()
    (line,) = drawn(svg)
    for (_, py), b in zip(line, y):
        wanted = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (math.log10(b) + 2) / 3
        assert py == pytest.approx(wanted, abs=0.006)
    assert "loss, log scale" in svg
    assert "log" not in Chart("s", "x", "loss", [Line([1.0, 2.0], [0.01, 10.0])], log=False).svg().split("loss")[1]


def test_ticks_are_drawn_at_their_values():
    chart = Chart("s", "x", "y", [Line([0.0, 7.0], [0.0, 43.0])])
    ticks = re.findall(r'text-anchor="end">([^<]*)</text>', chart.svg())
    places = re.findall(r'<line class="grid"[^>]*y1="([^"]*)"', chart.svg())
    assert ticks[:-1] == ["0", "10", "20", "30", "40", "50"]
    for tick, place in zip(ticks, places):
        assert float(place) == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * float(tick) / 50, abs=0.006)


def test_tiny_values_share_a_power_of_ten():
    svg = Chart("s", "step", "rate", [Line([0.0, 1.0], [0.0, 5e-4])]).svg()
    assert "rate, in units of 10⁻⁴" in svg
    assert re.findall(r'text-anchor="end">([^<]*)</text>', svg)[:-1] == ["0", "1", "2", "3", "4", "5"]


def test_not_a_number_breaks_the_line_and_a_lone_point_is_still_drawn():
    svg = Chart("s", "x", "y", [Line([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, NAN, 1.5, NAN, 2.0])]).svg()
    assert [len(stretch) for stretch in drawn(svg)] == [1, 1, 1]
    assert svg.count("h0") == 3
    assert "nan" not in svg.lower()


def test_band_goes_there_and_back():
    svg = Chart("s", "x", "y", [], [Band([0.0, 1.0, 2.0], [0.0, 1.0, NAN], [2.0, 3.0, NAN])]).svg()
    (area,) = re.findall(r'class="band" d="M([^"]*)Z"', svg)
    rows = [float(place.split()[1]) for place in area.split("L")]
    unit = (HEIGHT - BOTTOM - TOP) / 3
    assert rows == pytest.approx([HEIGHT - BOTTOM - unit * v for v in (2, 3, 1, 0)], abs=0.006)


def test_hints_cover_the_plot_without_gap_or_overlap():
    hints = [Hint(x, (x,), f"at {x}") for x in (3.0, 0.0, 1.0)]
    svg = Chart("s", "x", "y", [Line([0.0, 1.0, 3.0], [0.0, 1.0, 3.0])], hints=hints).svg()
    strips = [tuple(map(float, m)) for m in re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', svg)]
    assert strips[0][0] == LEFT
    for (x, width), (following, _) in itertools.pairwise(strips):
        assert x + width == pytest.approx(following, abs=0.011)
    assert sum(strips[-1]) == pytest.approx(WIDTH - RIGHT, abs=0.011)
    assert re.findall("<title>([^<]*)</title>", svg) == ["at 0.0", "at 1.0", "at 3.0"]


@pytest.mark.parametrize(
    ("values", "kind", "low", "high"),
    [
        ([0.13, 0.21], Scale, 0.12, 0.22), ([0.1, 0.9], Scale, 0.0, 1.0), ([0.1, 1.0], LogScale, 0.1, 1.0),
        ([0.03, 7.0], LogScale, 0.02, 10.0), ([-3.0, 100.0], Scale, -50.0, 100.0), ([0.0, 100.0], Scale, 0.0, 100.0),
        ([4.0, 4.0], Scale, 2.0, 6.0), ([0.0], Scale, -0.5, 0.5), ([], Scale, 0.0, 1.0),
        ([NAN, 2.0, 3.0], Scale, 2.0, 3.0),
    ],
)  # fmt: skip
def test_axis_ends(values, kind, low, high):
    scale = fit_scale(values, 0.0, 1.0)
    assert type(scale) is kind
    assert (scale.low, scale.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
@pytest.mark.parametrize("mantissa", [1.0, 1.7, 4.99, 9.999])
def test_ticks_are_few_round_and_inside(exponent, mantissa):
    for scale in (
        fit_scale([0.0, mantissa * 10.0**exponent], 0.0, 1.0),
        fit_scale([mantissa * 10.0**exponent, 30 * mantissa * 10.0**exponent], 0.0, 1.0),
        fit_scale([mantissa * 10.0**exponent, 10.0 ** (exponent + 9)], 0.0, 1.0),
    ):
        ticks = scale.ticks()
        assert 3 <= len(ticks) <= 9
        for tick in ticks:
            assert scale.low * (1 - 1e-9) <= tick <= scale.high * (1 + 1e-9)
            assert float(f"{tick:.1e}") == pytest.approx(tick, rel=1e-9), "a tick has at most two digits"


# ---------------------------------------------------------------- the log


def test_reading_skips_a_line_cut_short_and_accepts_not_a_number(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n\n[3]\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    records = read_metrics(file)
    assert [record["step"] for record in records] == [1, 2]
    assert math.isnan(records[1]["loss"])
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_a_resumed_run_repeats_steps_and_the_later_line_counts():
    log = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 5.0} for s in (2, 3, 4)]
    assert [(r["step"], r["loss"]) for r in curves.history(log)] == [(1, 1.0), (2, 5.0), (3, 5.0), (4, 5.0)]


def test_thousands_of_lines_become_few_points_and_lose_no_extreme():
    n = 10_007
    steps, values = [float(i) for i in range(n)], [math.sin(i) for i in range(n)]
    values[5001], values[7000] = 50.0, NAN
    buckets = curves.bucket(steps, values)
    assert len(buckets.mean) <= curves.MOST_POINTS
    assert buckets.size == math.ceil(n / curves.MOST_POINTS)
    assert max(buckets.high) == 50.0
    assert min(buckets.low) == min(v for v in values if v == v)
    k = 5001 // buckets.size
    inside = values[k * buckets.size : (k + 1) * buckets.size]
    assert buckets.mean[k] == pytest.approx(sum(inside) / len(inside))
    assert buckets.step[k] == pytest.approx(k * buckets.size + (buckets.size - 1) / 2)


def test_moving_average_skips_what_is_not_finite():
    assert curves.moving_average([1.0, NAN, 4.0, 7.0], 1)[0::2] == pytest.approx([1.0, 5.5])
    assert math.isnan(curves.moving_average([1.0, NAN, 4.0], 1)[1])
    assert curves.moving_average([3.0, 5.0], 0) == [3.0, 5.0]


def test_the_line_of_a_short_log_passes_through_every_entry():
    log = [{"step": s, "loss": loss} for s, loss in ((10, 4.0), (20, 3.0), (30, 2.5))]
    (curve,) = curves.all_curves(log)
    (line,) = drawn(curve.chart.svg())
    scale = curve.chart.y_scale
    assert [
        scale.low + (HEIGHT - BOTTOM - y) / (HEIGHT - BOTTOM - TOP) * (scale.high - scale.low) for _, y in line
    ] == (pytest.approx([4.0, 3.0, 2.5], abs=0.01))


def test_the_learning_rate_is_never_averaged():
    log = [{"step": s, "lr": 1e-3 if s < 500 else 1e-4} for s in range(1000)]
    (curve,) = curves.all_curves(log)
    levels = {round(y, 6) for line in curve.chart.lines for y in line.y}
    assert {1e-3, 1e-4} <= levels
    assert len(levels) <= 3, "only the bucket of the jump lies between"


def test_values_that_are_not_finite_are_counted_and_marked():
    log = [{"step": s, "loss": 1.0 + s} for s in range(5)] + [{"step": 5, "loss": NAN}, {"step": 6, "loss": None}]
    (curve,) = curves.all_curves(log)
    assert "2 entries are not finite (red), first at step 5." in curve.note
    marks = re.findall(r'class="mark" x1="([\d.]+)"', curve.chart.svg())
    width = WIDTH - LEFT - RIGHT
    assert [float(m) for m in marks] == pytest.approx([LEFT + width * 5 / 6, LEFT + width], abs=0.006)


@pytest.mark.parametrize(
    "log",
    [
        [], [{}], [{"step": None, "loss": 1.0}], [{"loss": 1.0}], [{"step": 1}], [{"step": 1, "loss": NAN}],
        [{"step": 1, "loss_by_noise": None}],
        [{"step": 1, "loss_by_noise": {"edges": [0, 1], "mean": [None], "count": [0]}}],
        [{"step": 1, "loss_by_noise": {"edges": [0.0], "mean": [], "count": []}}],
        [{"step": 1, "loss_by_noise": {"edges": [0.0, None, 1.0], "mean": [1, 2], "count": [1, 1]}}],
    ],
)  # fmt: skip
def test_a_log_without_figures_has_no_curves(log):
    assert curves.all_curves(log) == []


def noise_log(means, counts, steps, edges=(-2.0, 0.0, 2.0)):
    return [
        {"step": s, "loss_by_noise": {"edges": list(edges), "mean": m, "count": c}}
        for s, m, c in zip(steps, means, counts)
    ]


def test_loss_by_noise_weighs_by_count():
    log = noise_log([[1.0, None], [4.0, 2.0]], [[1, 0], [3, 5]], [1, 2])
    pooled = curves.pool(log)
    assert pooled.mean == pytest.approx([(1 * 1 + 3 * 4) / 4, 2.0])
    assert pooled.count == [4, 5]


def test_loss_by_noise_shows_start_middle_and_end():
    log = noise_log([[float(s), 1.0] for s in range(100)], [[1, 1]] * 100, range(100))
    curve = curves.loss_by_noise(log)
    assert [name for _, name in curve.legend] == ["steps 0–9", "steps 45–54", "steps 90–99"]
    assert [line.y[0] for line in curve.chart.lines] == pytest.approx([4.5, 49.5, 94.5])
    assert [list(line.x) for line in curve.chart.lines] == [[-1.0, 1.0]] * 3
    assert curve.chart.hints[0].text.startswith("half log-SNR −2.00 to 0\nsteps 0–9: 4.50 (n = 10)\n")


def test_loss_by_noise_draws_unbounded_bins_as_wide_as_their_neighbours():
    edges = [-math.inf, -1.0, 1.0, math.inf]
    curve = curves.loss_by_noise(noise_log([[1.0, 2.0, 3.0]], [[1, 1, 1]], [1], edges))
    assert list(curve.chart.lines[0].x) == [-2.0, 0.0, 2.0]


def test_loss_by_noise_keeps_to_the_latest_bins():
    old = noise_log([[9.0, 9.0]] * 5, [[1, 1]] * 5, range(5), (-4.0, 0.0, 4.0))
    new = noise_log([[1.0, 1.0]] * 5, [[1, 1]] * 5, range(5, 10))
    curve = curves.loss_by_noise(old + new)
    assert all(y == 1.0 for line in curve.chart.lines for y in line.y)


def test_the_trainers_own_records_are_drawn(tmp_path):
    """From the meter of the trainer, through its file, to the chart."""
    import torch

    from undiffuse.training.records import Meter, MetricsFile, means

    file = MetricsFile(tmp_path / "metrics.jsonl")
    meter = Meter(torch.device("cpu"))
    for step in (1, 2, 3):
        meter.reset()
        meter.add(torch.tensor([1.0, 3.0, 5.0]) * step, torch.tensor([-20.0, 0.5, 0.7]), torch.tensor(0.5))
        file.write({"step": step, **means(meter.sums), "lr": 1e-3})
    found = {curve.heading: curve for curve in curves.all_curves(read_metrics(file.path))}
    assert set(found) == {"Loss", "Loss by noise level", "Gradient norm", "Learning rate"}
    last = found["Loss by noise level"].chart.lines[-1]
    finite = {x: y for x, y in zip(last.x, last.y) if math.isfinite(y)}
    assert finite == pytest.approx({-7.5: 3.0, 0.5: 12.0})
