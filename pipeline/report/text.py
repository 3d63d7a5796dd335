"""How numbers look: percent, points, plain figures, counts, bytes, times; and escaping for Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

Kind = Literal[
    "text", "rate", "points", "plain", "rank", "ratio", "whole", "count", "flops", "bytes", "seconds", "per_second"
]

MISSING = "–"
MINUS = "−"
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def signed(text: str) -> str:
    """A hyphen in front of a number becomes a minus sign; a zero that rounding left negative loses it."""
    if text.startswith("-"):
        return text[1:] if not text.strip("-0.") else MINUS + text[1:]
    return text


def compact(value: float) -> str:
    """1234567 -> 1.23 M: three significant digits and an SI prefix."""
    for size, prefix in _SI:
        if abs(value) >= size:
            return f"{_three(value / size)} {prefix}"
    return f"{value:.0f}" if value == int(value) else _three(value)


def byte_size(value: float) -> str:
    """In binary units, three significant digits."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """83 s, 12.4 min, 71.9 h."""
    if seconds < 100:
        return f"{_three(seconds)} s"
    return f"{_three(seconds / 60)} min" if seconds < 5400 else f"{_three(seconds / 3600)} h"


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


_FORMATS: dict[str, Callable[[float], str]] = {
    "rate": lambda v: signed(f"{100 * v:.1f}"),
    "points": lambda v: ("+" if round(100 * v, 1) > 0 else "") + signed(f"{100 * v:.1f}"),
    "plain": lambda v: signed(f"{v:.3f}") if abs(v) >= 0.0005 or v == 0 else signed(f"{v:.1e}"),
    "ratio": lambda v: f"{v:.3f}",
    "rank": lambda v: f"{v:.0f}" if v == int(v) else f"{v:.1f}",
    "whole": lambda v: f"{v:,.0f}",
    "count": compact,
    "flops": compact,
    "bytes": byte_size,
    "seconds": duration,
    "per_second": _three,
}


def show(value: float, kind: Kind) -> str:
    """One number of a column of this kind, for people."""
    return _FORMATS[kind](value)


def plural(n: int, one: str, many: str | None = None) -> str:
    """1 run, 3 runs."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def slug(text: str) -> str:
    """A file name or id: lower-case letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def shortened(text: str, longest: int = 36) -> str:
    """A name for a figure's legend: whole where it fits, else both its ends."""
    return text if len(text) <= longest else f"{text[: longest - 13]}…{text[-12:]}"


def one_line(text: str) -> str:
    """Line breaks and control characters become spaces: a cell is one line in every format."""
    return "".join(c if c.isprintable() else " " for c in text)


def markdown(text: str) -> str:
    """Text of a Markdown table cell: nothing in it can end the cell, start markup or HTML."""
    return re.sub(r"([\\|`*<\[\]])", r"\\\1", one_line(text))


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "γ": r"$\gamma$",
    "β": r"$\beta$",
    "‖": r"$\|$",
    "·": r"$\cdot$",
    "–": "--",
    "…": r"\dots{}",
}


def latex(text: str) -> str:
    """Text for LaTeX: every special character is printed, none is executed."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))
