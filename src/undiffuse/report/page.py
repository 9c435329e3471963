"""The page itself: its sections in order, and the file."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undiffuse.report import curves, results
from undiffuse.report.content import ReportData
from undiffuse.report.style import STYLE
from undiffuse.report.text import count, duration, escape, sentence, significant
from undiffuse.report.views import view_of

# Nothing is loaded, run, framed or sent: pictures and styles are in the page itself.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

FACTS = {
    "parameters": ("Parameters", count),
    "steps": ("Training steps", count),
    "seconds": ("Training time", duration),
    "n": ("Training items", count),
    "images_per_second": ("Speed", lambda value: f"{significant(value)} items/s"),
    "device": ("Device", str),
    "dataset": ("Data", str),
}


def render(data: ReportData) -> str:
    """The whole page as one string of HTML that needs nothing else; the same bytes for the same data."""
    sections = [
        ("samples", "Samples", _samples(data)),
        ("film", "From noise to data", _film(data)),
        ("curves", "Training", _curves(data)),
        ("metrics", "Metrics", _metrics(data)),
        ("neighbours", "Nearest training items", _neighbours(data)),
        ("recipe", "Recipe", _recipe(data.recipe_yaml)),
        ("reproduce", "Reproduce", _commands(data)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in shown)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>{content}</section>'
        for key, name, content in shown
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{escape(data.title)} · undiffuse</title>'
        f"<style>{STYLE}</style></head>\n<body>{_header(data)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{body}</main>\n'
        "<footer>Made by undiffuse. This page is one file: it loads nothing and runs nothing.</footer>"
        "</body></html>\n"
    )


def write_report(data: ReportData, file: str | Path) -> Path:
    """Render to `file`, whole or not at all: a temporary name beside it, fsync, rename.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    page = render(data).encode("utf-8")
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)
    return target


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; some systems cannot open a folder, and there it is."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(data: ReportData) -> str:
    subtitle = f'<p class="subtitle">{escape(data.subtitle)}</p>' if data.subtitle else ""
    tiles = "".join(_tile(key, value) for key, value in data.facts.items())
    lead = results.headline(data.results[0]) if data.results else ""
    facts = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    return (
        f'<header><p class="eyebrow">undiffuse · run report</p><h1>{escape(data.title)}</h1>{subtitle}'
        f"{lead}{facts}</header>"
    )


def _tile(key: str, value: object) -> str:
    name, shown = FACTS.get(key, (sentence(key), significant))
    text = "unknown" if value is None else shown(value)
    return f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>'


def _samples(data: ReportData) -> str:
    if data.samples is None or len(data.samples) == 0:
        return '<p class="note">This run has no samples yet.</p>'
    return view_of(data.samples.shape[1:]).samples(data)


def _film(data: ReportData) -> str:
    frames = [(caption, x) for caption, x in data.film if len(x) > 0]
    return view_of(frames[0][1].shape[1:]).film(frames) if frames else ""


def _neighbours(data: ReportData) -> str:
    near = data.neighbours
    if near is None or len(near.samples) == 0:
        return ""
    pictures = view_of(near.samples.shape[1:]).neighbours(near)
    what = "Above a sample, below the training item nearest to it, and the distance between them. " if pictures else ""
    distances = near.distances[near.distances.isfinite()]
    median = float(distances.median()) if len(distances) else math.nan
    known: Mapping[str, Any] = near.references or {"median of those shown": median}
    return f'<p class="note" style="margin:0 0 14px">{what}</p>{pictures}{results.definitions(_rounded(known))}'


def _rounded(items: Mapping[str, Any]) -> dict[str, str]:
    return {key: significant(value) for key, value in items.items()}


def _curves(data: ReportData) -> str:
    found = curves.all_curves(data.metrics_log)
    if not found:
        return '<p class="note">The training log has no figures yet.</p>'
    figures = []
    for curve in found:
        legend = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for style, name in curve.legend)
        legend = f'<ul class="legend">{legend}</ul>' if legend else ""
        note = f"<figcaption>{escape(curve.note)}</figcaption>" if curve.note else ""
        figures.append(f"<figure><h3>{escape(curve.heading)}</h3>{curve.chart.svg()}{legend}{note}</figure>")
    table = (
        '<details><summary>Figures as a table</summary><div class="scroll" tabindex="0" role="group" '
        f'aria-label="training log"><table>{curves.table(data.metrics_log)}</table></div></details>'
    )
    return f'<div class="charts">{"".join(figures)}</div>{table}'


def _metrics(data: ReportData) -> str:
    return results.tables(data.results) or '<p class="note">This run has not been evaluated yet.</p>'


def _recipe(text: str) -> str:
    """The recipe with its keys set off: split at the key first, then escaped, so that no markup comes from it."""
    if not text.strip():
        return ""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        match = re.match(r"(\s*(?:- )?)([\w.-]+)(:(?:\s.*)?)$", line)
        if match is None:
            lines.append(escape(line))
        else:
            indent, key, rest = match.groups()
            lines.append(f'{escape(indent)}<span class="key">{escape(key)}</span>{escape(rest)}')
    return f"<details><summary>Every value, as resolved</summary><pre>{chr(10).join(lines)}</pre></details>"


def _commands(data: ReportData) -> str:
    if not data.commands:
        return ""
    lines = "".join(f"<code>{escape(command)}</code>" for command in data.commands)
    return f'<pre class="commands">{lines}</pre><p class="note">One click selects a whole command.</p>'
