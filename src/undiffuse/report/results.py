"""Metrics: a headline with its yardsticks, and tables of results that share a protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from undiffuse.report.scales import fit_scale
from undiffuse.report.text import count, escape, number, sentence, significant, with_spread

# What a reader knows the metrics of this library by, and which way is better.
KNOWN = {
    "frechet": ("Fréchet distance", "lower"),
    "kernel": ("Kernel distance", "lower"),
    "mmd": ("Maximum mean discrepancy, squared", "lower"),
    "sliced-wasserstein": ("Sliced Wasserstein distance", "lower"),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
    "density": ("Density", "higher"),
    "coverage": ("Coverage", "higher"),
    "class-accuracy": ("Class read as intended", "higher"),
    "nearest": ("Distance to nearest training item, over that of held-out items", ""),
}
PROTOCOL_NAMES = {
    "n": "Samples",
    "reference": "Reference data",
    "reference_n": "Reference items",
    "reference_fingerprint": "Reference fingerprint",
    "features_hash": "Features, sha256",
    "data_range": "Range of pixel values",
    "steps": "Solver steps",
    "nfe": "Network calls per sample",
    "ema": "Weights",
    "step": "Training step",
}


def label_of(result: Mapping[str, Any]) -> str:
    """What the page calls a metric: its own label, the usual one, or its name as words."""
    name = str(result["name"])
    return str(result.get("label") or KNOWN.get(name, (sentence(name),))[0])


def better_of(result: Mapping[str, Any]) -> str:
    """ "lower", "higher", or "" where neither is."""
    return str(result.get("better") or KNOWN.get(str(result["name"]), ("", ""))[1])


def figure_of(result: Mapping[str, Any]) -> str:
    """Value ± spread, escaped."""
    main, tail = with_spread(result["value"], result.get("std"))
    return escape(main) + (f"<small>{escape(tail)}</small>" if tail else "")


def headline(result: Mapping[str, Any]) -> str:
    """A wide tile: the figure, and where it lies among its yardsticks."""
    better = better_of(result)
    protocol = result.get("protocol") or {}
    hint = [f"{better} is better"] if better else []
    hint += [f"{count(protocol['n'])} samples"] if "n" in protocol else []
    yardsticks = gauge(result)
    return (
        f'<div class="tile lead"><div><div><dl><dt>{escape(label_of(result))}</dt>'
        f'<dd class="figure">{figure_of(result)}</dd></dl><p class="note">{escape(" · ".join(hint))}</p></div>'
        f"{yardsticks}</div></div>"
    )


def gauge(result: Mapping[str, Any]) -> str:
    """The value and its references on one axis, a row each in order of size; "" without references."""
    rows = [("these samples", number(result["value"]), True)]
    rows += [(str(name), number(value), False) for name, value in (result.get("references") or {}).items()]
    rows = sorted((row for row in rows if math.isfinite(row[1])), key=lambda row: row[1])
    if len(rows) < 2:
        return ""
    values = [value for _, value, _ in rows]
    scale = fit_scale(values, 0.0, 100.0)
    if not scale.is_log:
        scale = fit_scale([0.0, *values], 0.0, 100.0)
    items = []
    for name, value, own in rows:
        style, here = ("own", ' class="here"') if own else ("ref", "")
        items.append(
            f'<li><span class="{style}">{escape(name)}</span><span class="track">'
            f'<i{here} style="left:{scale.place(value):.2f}%"></i></span>'
            f'<span class="num {style}">{escape(significant(value))}</span></li>'
        )
    log = '<p class="note">log scale</p>' if scale.is_log else ""
    return f'<div><ul class="gauge" aria-label="value beside its references">{"".join(items)}</ul>{log}</div>'


def by_protocol(results: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Results grouped by equal protocol, in order of first appearance: only these may be read side by side."""
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = []
    for result in results:
        protocol = {key: value for key, value in (result.get("protocol") or {}).items() if value not in (None, "")}
        same = next((members for known, members in groups if known == protocol), None)
        if same is None:
            groups.append((protocol, [result]))
        else:
            same.append(result)
    return groups


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """A table and a fold-out protocol for each group of comparable results."""
    groups = by_protocol(results)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Metric", "Value", "References"))
    parts = []
    if len(groups) > 1:
        parts.append(
            '<p class="note intro">Each table has its own protocol: figures of different tables do not compare.</p>'
        )
    for i, (protocol, members) in enumerate(groups):
        title = f"Protocol {chr(65 + i % 26)}" if len(groups) > 1 else "Protocol"
        heading = f"<h3>{title}</h3>" if len(groups) > 1 else ""
        parts.append(
            f'{heading}<div class="scroll" tabindex="0" role="group" aria-label="metrics, {title.lower()}">'
            f'<table class="metrics"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(map(_row, members))}</tbody></table></div>{_protocol(title, protocol, members)}"
        )
    return "".join(parts)


def _row(result: Mapping[str, Any]) -> str:
    references = "".join(
        f"<li><span>{escape(name)}</span> {escape(significant(value))}</li>"
        for name, value in (result.get("references") or {}).items()
    )
    better = better_of(result)
    direction = f'<br><span class="quiet">{escape(better)} is better</span>' if better else ""
    direction += "".join(f'<br><span class="quiet warn">{escape(text)}</span>' for text in result.get("warnings") or ())
    listed = f'<ul class="refs">{references}</ul>' if references else "–"
    return (
        f'<tr><th scope="row">{escape(label_of(result))}{direction}</th><td class="num">{figure_of(result)}</td>'
        f"<td>{listed}</td></tr>"
    )


def _protocol(title: str, protocol: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of a table were made, and the settings of each metric in it."""
    if not protocol:
        return '<p class="note warn">No protocol is recorded: these figures cannot be compared with others.</p>'
    settings = {f"settings of {label_of(r)}": r["settings"] for r in members if r.get("settings")}
    named = {PROTOCOL_NAMES.get(key, key): value for key, value in protocol.items()}
    return f"<details><summary>{title}</summary>{definitions(named | settings)}</details>"


def definitions(items: Mapping[str, Any]) -> str:
    """A mapping as a list of terms; values that are mappings or lists on one line."""
    rows = "".join(f"<dt>{escape(sentence(key))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in items.items())
    return f'<dl class="protocol">{rows}</dl>'


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:g}".replace("-", "−")
    if isinstance(value, int) and not isinstance(value, bool):
        return significant(value)
    return "none" if value is None else str(value)
