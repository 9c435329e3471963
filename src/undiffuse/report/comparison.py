"""A comparison of solvers as a picture and as a table in Markdown. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import io
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
# Least distance of two labels, as a share of the height.
APART = 0.05


def figure_of(cell: Cell) -> str:
    """The median error in two digits, and where the calls are fewer than allowed, how many."""
    if cell.median is None:
        return "failed"
    fewer = f" ({cell.nfe})" if cell.nfe < cell.calls else ""
    return f"{cell.median:.1e}".replace("e-0", "e-").replace("e+0", "e+") + fewer


def name_of(solver: str, grid: str) -> str:
    """A row in words."""
    return solver if grid == "own" else f"{solver}, {grid}"


def table(found: Comparison, mark: str = "*") -> list[list[str]]:
    """Median errors: a row for each solver and grid, a column for each number of calls, the least of it marked."""
    best = [found.best(calls) for calls in found.calls]
    rows = [[found.cell(*row, calls) for calls in found.calls] for row in found.rows]
    return [
        [cells[0].solver, cells[0].grid]
        + [f"{mark}{figure_of(cell)}{mark}" if cell in best else figure_of(cell) for cell in cells]
        for cells in rows
    ]


def markdown(found: Comparison, title: str, advice: str) -> str:
    """The table, what it was measured against, and what to take."""
    heads = ["solver", "grid", *(f"{calls} calls" for calls in found.calls)]
    rules = ["---", "---", *("--:" for _ in found.calls)]
    lines = [f"| {' | '.join(row)} |" for row in (heads, rules, *table(found, "**"))]
    failures = [f"- {c.solver}, {c.grid}, {c.calls} calls: {c.failure}" for c in found.cells if c.failure]
    failed = ["", "Failed:", "", *failures] if failures else []
    return "\n".join([f"# {title}", "", about(found), "", *lines, *failed, "", advice, ""])


def about(found: Comparison) -> str:
    """What the figures are."""
    return (
        f"Error of the median of {found.n} samples, RMS(x - truth) / RMS(truth), truth by {found.truth} (apart by "
        f"{found.truth_error:.1g}). In brackets: the calls, where the steps that fit take fewer."
    )


def draw(found: Comparison, advice: Recommendation, title: str) -> bytes:
    """Median error over calls, both logarithmic, a line for each row, named at its end; as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "text.color": LIGHT["ink"], "axes.linewidth": 0.7}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        _axes(ax, found, title)
        ax.axhline(advice.level, color=LIGHT["muted"], lw=0.8, ls=(0, (2, 3)), zorder=1)
        ends = _lines(ax, found)
        if advice.cell.median is not None:
            ring = {"mec": LIGHT["ink"], "mfc": "none", "ms": 11, "mew": 1.2}
            ax.plot([advice.cell.nfe], [advice.cell.median], "o", zorder=5, clip_on=False, **ring)
        _names(ax, ends, max(found.calls))
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


def _axes(ax: Axes, found: Comparison, title: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel="network calls")
    ax.xaxis.label.set_color(LIGHT["muted"])
    ax.set_title(title, loc="left", fontsize=9.5, pad=16)
    ax.text(0, 1.02, "error of the median sample, over the RMS of the truth", transform=ax.transAxes,
            color=LIGHT["muted"], fontsize=8.5)  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LIGHT["muted"])
    ax.tick_params(colors=LIGHT["muted"], which="both")
    ax.grid(axis="y", color=LIGHT["rule"], lw=0.7)
    ax.set_xticks(found.calls, [str(calls) for calls in found.calls])
    ax.set_xticks([], minor=True)
    errors = [c.median for c in found.cells if c.median is not None and c.median <= HIGHEST]
    if errors:
        ax.set_ylim(max(min(errors), 1e-12) / 1.6, max(errors) * 1.6)


def _lines(ax: Axes, found: Comparison) -> list[tuple[float, str, str]]:
    """Draws a line for each row, one for rows that are the same; (error at its end, name, colour)."""
    hues: dict[str, str] = {}
    drawn: dict[tuple[str, ...], tuple[float, str, str]] = {}
    for solver, grid in found.rows:
        style = (0, (4, 2)) if solver in hues else "-"
        colour = hues.setdefault(solver, COLOURS[len(hues) % len(COLOURS)])
        cells = [found.cell(solver, grid, calls) for calls in found.calls]
        points = {c.nfe: c.median for c in cells if c.median is not None and c.median <= HIGHEST}
        if not points:
            continue
        key, name = tuple(f"{nfe}: {error:.3e}" for nfe, error in points.items()), name_of(solver, grid)
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
    places = [float(height.transform((right, error))[1]) for error, _, _ in ends]
    for _ in range(400):
        for i, (low, high) in enumerate(pairwise(places)):
            push = max(0.0, APART - (high - low)) / 2
            places[i], places[i + 1] = low - push, places[i + 1] + push
    for place, (_, name, colour) in zip(places, ends):
        ax.annotate(name, (1.02, place), xycoords="axes fraction", color=colour, va="center", annotation_clip=False)
