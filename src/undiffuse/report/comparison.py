"""A comparison of solvers as a picture and as tables in Markdown. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from undiffuse.report.pictures import PALETTE
from undiffuse.report.style import LIGHT
from undiffuse.solvers import Cell, Comparison, Recommendation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in PALETTE]
# Beyond it an error says only that a solver is of no use there.
HIGHEST = 2.0
# Least distance of two lines of labels, as a share of the height; and the letters of one line.
APART = 0.05
LETTERS = 34
# A number of which the least is best is drawn up to so many times the least, on a logarithmic axis beyond the other.
FAR, WIDE = 30.0, 3.0


def panels(found: Comparison) -> list[str]:
    """What there is a table and a panel of: "", the error along the flow, where there is a truth; then the numbers."""
    return ([] if found.truth_error is None else [""]) + found.numbers


def value_of(cell: Cell, number: str = "") -> float | None:
    """The median error of a cell, or a number of its samples."""
    return cell.quality.get(number) if number else cell.median


def figure_of(cell: Cell, number: str = "") -> str:
    """The median error in two digits (a number in four), and where the calls are fewer than allowed, how many."""
    value = value_of(cell, number)
    if value is None:
        return "failed" if cell.failure else "-"
    fewer = f" ({cell.nfe})" if cell.nfe < cell.calls else ""
    text = f"{value:.4g}" if number else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    return text + fewer


def name_of(solver: str, grid: str) -> str:
    """A row in words."""
    return solver if grid == "own" else f"{solver}, {grid}"


def table(found: Comparison, mark: str = "*", number: str = "") -> list[list[str]]:
    """Median errors, or a number: a row for each solver and grid, a column for each calls, the best marked."""
    best = [found.best(calls, number) for calls in found.calls]
    rows = [[found.cell(*row, calls) for calls in found.calls] for row in found.rows]
    return [
        [cells[0].solver, cells[0].grid]
        + [f"{mark}{figure_of(cell, number)}{mark}" if cell in best else figure_of(cell, number) for cell in cells]
        for cells in rows
    ]


def markdown(found: Comparison, title: str, advice: str) -> str:
    """The tables, what they were measured against, and what to take."""
    heads = ["solver", "grid", *(f"{calls} calls" for calls in found.calls)]
    rules = ["---", "---", *("--:" for _ in found.calls)]
    parts = []
    for number in panels(found):
        lines = [f"| {' | '.join(row)} |" for row in (heads, rules, *table(found, "**", number))]
        parts += ["", about(found, number), "", *lines]
    failures = [f"- {c.solver}, {c.grid}, {c.calls} calls: {c.failure}" for c in found.cells if c.failure]
    failed = ["", "Failed:", "", *failures] if failures else []
    return "\n".join([f"# {title}", *parts, *failed, "", advice, ""])


def about(found: Comparison, number: str = "") -> str:
    """What the figures are."""
    fewer = "In brackets: the calls, where the steps that fit take fewer."
    if number and found.judged is not None:
        way = {"least": ", the least is best", "most": ", the most is best", None: ""}[found.judged.better[number]]
        beside = [
            f"{name} data {values[number]:.4g}" for name, values in found.judged.beside.items() if number in values
        ]
        like = f" Of {', '.join(beside)}." if beside else ""
        return f"{number} of {found.judged.n:,} samples against {found.judged.against}{way}.{like} {fewer}"
    return (
        f"Error of the median of {found.n} samples, RMS(x - truth) / RMS(truth), truth by {found.truth} (apart by "
        f"{found.truth_error:.1g}). {fewer}"
    )


def draw(found: Comparison, advised: Sequence[Recommendation], title: str) -> bytes:
    """Median error, and below it each number of the samples, over calls; a line for each row, named at its end; as PNG.

    A ring marks what is recommended.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(found)
    with rc_context({"font.size": 9, "text.color": LIGHT["ink"], "axes.linewidth": 0.7}):
        figure = Figure(figsize=(8, 4.6 * len(shown)), layout="constrained")
        FigureCanvasAgg(figure)
        for i, (number, ax) in enumerate(zip(shown, figure.subplots(len(shown), squeeze=False)[:, 0])):
            _panel(ax, found, number, next((a for a in advised if a.number == number), None), title if i == 0 else "")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


def _panel(ax: Axes, found: Comparison, number: str, advice: Recommendation | None, title: str) -> None:
    _axes(ax, found, number, title)
    across = {"color": LIGHT["muted"], "lw": 0.8, "ls": (0, (2, 3)), "zorder": 1}
    if advice is not None and not number:
        ax.axhline(advice.level, **across)
    if number and found.judged is not None and _dotted(found):
        ax.axhline(found.judged.beside["held-out"][number], **across)
    ends = _lines(ax, found, number)
    value = None if advice is None else value_of(advice.cell, number)
    if advice is not None and value is not None:
        ring = {"mec": LIGHT["ink"], "mfc": "none", "ms": 11, "mew": 1.2}
        ax.plot([advice.cell.nfe], [value], "o", zorder=5, clip_on=False, **ring)
    _names(ax, ends, max(found.calls))


def _axes(ax: Axes, found: Comparison, number: str, title: str) -> None:
    values = _values(found, number)
    log = not number or (_falls(found, number) and bool(values) and 0 < WIDE * min(values) < max(values))
    ax.set(xscale="log", yscale="log" if log else "linear", xlabel="network calls")
    ax.xaxis.label.set_color(LIGHT["muted"])
    ax.set_title(title, loc="left", fontsize=9.5, pad=16)
    what = "error of the median sample, over the RMS of the truth"
    if number and found.judged is not None:
        what = f"{number} of {found.judged.n:,} samples" + ("; dotted: held-out data" if _dotted(found) else "")
    ax.text(0, 1.02, what, transform=ax.transAxes, color=LIGHT["muted"], fontsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LIGHT["muted"])
    ax.tick_params(colors=LIGHT["muted"], which="both")
    ax.grid(axis="y", color=LIGHT["rule"], lw=0.7)
    ax.set_xticks(found.calls, [str(calls) for calls in found.calls])
    ax.set_xticks([], minor=True)
    if values:  # said, not found: names are placed by it
        low, high = min(values), max(values)
        room = 0.08 * (high - low or abs(high) or 1.0)
        ax.set_ylim((max(low, 1e-12) / 1.6, high * 1.6) if log else (low - room, high + room))
    ax.set_xlim(min(max(cell.nfe, 1) for cell in found.cells) / 1.06, max(found.calls) * 1.06)


def _dotted(found: Comparison) -> bool:
    return found.judged is not None and "held-out" in found.judged.beside


def _falls(found: Comparison, number: str) -> bool:
    return found.judged is not None and found.judged.better.get(number) == "least"


def _values(found: Comparison, number: str) -> list[float]:
    """What is drawn; the yardstick too, where there is one."""
    values = [value for cell in found.cells if (value := value_of(cell, number)) is not None]
    if number and found.judged is not None and _dotted(found):
        values.append(found.judged.beside["held-out"][number])
    return [value for value in values if value <= _limit(found, number)]


def _limit(found: Comparison, number: str) -> float:
    """Beyond it a value says only that a solver is of no use there."""
    if not number:
        return HIGHEST
    values = [value for cell in found.cells if (value := value_of(cell, number)) is not None and value > 0]
    return FAR * min(values) if values and _falls(found, number) else math.inf


def _lines(ax: Axes, found: Comparison, number: str) -> list[tuple[float, str, str]]:
    """Draws a line for each row, one for rows that are the same; (value at its end, name, colour)."""
    hues: dict[str, str] = {}
    limit = _limit(found, number)
    drawn: dict[tuple[str, ...], tuple[float, str, str]] = {}
    for solver, grid in found.rows:
        style = (0, (4, 2)) if solver in hues else "-"
        colour = hues.setdefault(solver, COLOURS[len(hues) % len(COLOURS)])
        cells = [found.cell(solver, grid, calls) for calls in found.calls]
        values = {cell.nfe: value_of(cell, number) for cell in cells}
        points = {nfe: value for nfe, value in values.items() if value is not None and value <= limit}
        if not points:
            continue
        key, name = tuple(f"{nfe}: {value:.3e}" for nfe, value in points.items()), name_of(solver, grid)
        if key in drawn:
            drawn[key] = (drawn[key][0], f"{drawn[key][1]} = {name}", drawn[key][2])
            continue
        ax.plot(list(points), list(points.values()), ls=style, color=colour, lw=1.6, marker="o", ms=3, zorder=3)
        drawn[key] = (list(points.values())[-1], name, colour)
    return list(drawn.values())


def _names(ax: Axes, ends: list[tuple[float, str, str]], right: int) -> None:
    """Names beside the ends of their lines, moved apart where they would touch."""
    height = ax.transData + ax.transAxes.inverted()
    ends = sorted(ends)
    texts = [textwrap.fill(name, LETTERS, break_on_hyphens=False, break_long_words=False) for _, name, _ in ends]
    half = [APART * (1 + text.count("\n")) / 2 for text in texts]
    places = [float(height.transform((right, value))[1]) for value, _, _ in ends]
    for _ in range(400):
        for i, (low, high) in enumerate(pairwise(places)):
            push = max(0.0, half[i] + half[i + 1] - (high - low)) / 2
            places[i], places[i + 1] = low - push, places[i + 1] + push
    rise = max(0.0, -min(places, default=0.0))
    for place, text, (_, _, colour) in zip(places, texts, ends):
        at = (1.02, place + rise)
        ax.annotate(text, at, xycoords="axes fraction", color=colour, va="center", annotation_clip=False)
