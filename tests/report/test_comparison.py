"""Names beside the lines of `compare`'s picture: all of them, apart, and inside it, however long they are."""

from __future__ import annotations

import math
from itertools import pairwise

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from undiffuse.report import comparison
from undiffuse.report.style import LIGHT

LONG = "dpmpp-2m (half-log-snr) = deis-3 (half-log-snr) = unipc-2 (half-log-snr) = dpm-v3 (half-log-snr)"


def named(ends):
    """The boxes of the names as drawn, in pixels, the figure's size, and the share of its width that the axes have."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.set(xscale="log", yscale="log", xlim=(5, 30), ylim=(1e-3, 1))
    comparison._names(ax, ends, 30)
    canvas.draw()
    texts = [child for child in ax.get_children() if type(child).__name__ == "Annotation"]
    return {text.get_text(): text.get_window_extent() for text in texts}, figure.bbox.size, ax.get_position().width


def test_long_names_of_equal_ends_neither_touch_nor_leave_the_picture():
    ends = [(1e-2 * 1.001**k, f"{k} {LONG}", LIGHT["ink"]) for k in range(4)] + [(0.5, "ddim", LIGHT["ink"])]
    boxes, (width, height), share = named(ends)
    assert {" ".join(text.split()) for text in boxes} == {name for _, name, _ in ends}
    ordered = sorted(boxes.values(), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(ordered))
    assert share > 0.5
    assert all(box.x1 <= width for box in ordered)
    assert all(box.y0 >= 0 and box.y1 <= height for box in ordered)


def test_a_single_short_name_is_beside_its_line():
    boxes, (_, height), _ = named([(math.sqrt(1e-3), "abm-4", LIGHT["ink"])])
    (box,) = boxes.values()
    assert abs((box.y0 + box.y1) / 2 / height - 0.5) < 0.1
