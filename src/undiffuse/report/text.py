"""Words and numbers of the page: escaping, significant digits, durations. Everything a user wrote passes `escape`."""

from __future__ import annotations

import html
import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def escape(value: object) -> str:
    """Text that is inert both between tags and inside a quoted attribute.

    Control characters, which HTML forbids and which can hide text, become U+FFFD; tabs and line ends stay.
    """
    kept = "".join(c if c in "\t\n" or c.isprintable() or c == "\u00a0" else "\ufffd" for c in str(value))
    return html.escape(kept, quote=True)


def number(value: object) -> float:
    """A finite float, or NaN for whatever is not one (None, text, infinity): the log may hold any JSON."""
    try:
        converted = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return converted if math.isfinite(converted) else math.nan


def significant(value: object, digits: int = 3) -> str:
    """`digits` significant digits; integers whole with separators; powers of ten where zeros would mislead."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    # Rounded first: 9.999 has one digit before the point, 10.0 has two.
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not is_plain(exponent):
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}\u00a0×\u00a0{power_of_ten(int(power))}".replace("-", "−")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def is_plain(exponent: int) -> bool:
    """Whether a value of this size is written out, rather than with a power of ten."""
    return -3 <= exponent <= 6


def with_spread(value: object, spread: object) -> tuple[str, str]:
    """A value to three digits, or as many as its spread needs, and " ± spread" to as many decimals.

    Where a power of ten is used it is taken out of both, and the second part is empty; so it is without a spread.
    """
    given, width = number(value), number(spread)
    if not math.isfinite(given + width):
        return significant(value), ""
    exponent = int(f"{given or width:.2e}".split("e")[1])
    plain = is_plain(exponent)
    unit = 1.0 if plain else 10.0**exponent
    size = exponent if plain else 0
    smallest = int(f"{width / unit:.0e}".split("e")[1]) if width else size
    decimals = max(0, (0 if given == 0 else 2) - size, min(-smallest, 6))
    main, tail = (f"{v / unit:,.{decimals}f}".replace("-", "−") for v in (given, width))
    return (main, f" ± {tail}") if plain else (f"({main} ± {tail})\u00a0×\u00a0{power_of_ten(exponent)}", "")


def power_of_ten(exponent: int) -> str:
    """10⁻³ and the like."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def tick(value: float) -> str:
    """Short label of an axis tick: 0.05, 200, 1k, 2.5M, 10⁻⁵."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, power = f"{value:.1e}".split("e")
        mantissa = mantissa.removesuffix(".0")
        shown = "" if mantissa == "1" else "−" if mantissa == "-1" else f"{mantissa}·".replace("-", "−")
        return f"{shown}{power_of_ten(int(power))}"
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{suffix}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def duration(seconds: object) -> str:
    """42 s, 2 min 41 s, 3 h 05 min, 2 d 4 h."""
    given = number(seconds)
    if math.isnan(given):
        return "unknown"
    if given < 10:
        return f"{given:.1f} s"
    total = round(given)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def count(value: object) -> str:
    """Counts as people say them: 1,437 or 1.31 million."""
    given = number(value)
    if math.isnan(given):
        return str(value)
    for unit, word in ((1e9, "billion"), (1e6, "million")):
        if abs(given) >= unit:
            return f"{given / unit:.3g} {word}"
    return f"{given:,.0f}" if given == round(given) else significant(given)


def sentence(name: object) -> str:
    """A key as a label: `batch_size` becomes "Batch size"."""
    words = str(name).replace("_", " ").strip()
    return words[:1].upper() + words[1:]
