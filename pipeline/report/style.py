"""How figures look, and how one drawing serves a paper (light, opaque) and the page (colours that follow the theme).

Matplotlib draws in the light colours. For the page every colour becomes a CSS variable, ids get the figure's name in
front (several figures share a page), and whatever points out of the file is removed. Files of one figure are the same
bytes each time: no dates, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.legend import Legend

# name: (light, dark). Neighbouring series differ for colour-blind readers too; all reach 3:1 on paper.
COLOURS = {
    "paper": ("#ffffff", "#14171b"),
    "ink": ("#16191d", "#eceef1"),
    "soft": ("#5a626c", "#a3abb5"),
    "rule": ("#dfe3e8", "#2d333a"),
    "s0": ("#2568c4", "#5b9bf0"),
    "s1": ("#d1591a", "#ee8a4f"),
    "s2": ("#0f8a60", "#35b98a"),
    "s3": ("#8a4fc2", "#b78be6"),
    "s4": ("#b07400", "#d9a32c"),
    "s5": ("#c23a72", "#ea7ba6"),
    "s6": ("#45717f", "#82b3c3"),
    "s7": ("#7a7f1d", "#b5bb4a"),
}
SERIES = tuple(name for name in COLOURS if re.fullmatch(r"s\d", name))
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# The same shapes as SVG paths in a box of 10 by 10, for legends and tables of the page.
GLYPHS = (
    "M5 1a4 4 0 1 0 .01 0z", "M1.5 1.5h7v7h-7z", "M5 1 9.2 8.6H.8z", "M5 .4 9.6 5 5 9.6.4 5z", "M5 9 .8 1.4h8.4z",
    "M3.6 1h2.8v2.6H9v2.8H6.4V9H3.6V6.4H1V3.6h2.6z",
    "M2.6.8 5 3.2 7.4.8l1.8 1.8L6.8 5l2.4 2.4-1.8 1.8L5 6.8 2.6 9.2.8 7.4 3.2 5 .8 2.6z",
    "M5 .6 8.9 2.8v4.4L5 9.4 1.1 7.2V2.8z",
)  # fmt: skip
SIZE = (4.3, 2.9)  # inches: one phone's width at full text size; the page sets panels side by side
RUN_LEGEND = "runs"  # gid of the legend that the page replaces by one of its own

_RC = {
    "svg.hashsalt": "dinorankclip",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 9,
    "axes.unicode_minus": True,
    "path.simplify": True,
}


def light(name: str) -> str:
    """A colour as drawn."""
    return COLOURS[name][0]


def series(index: int) -> dict[str, Any]:
    """Colour, dash and marker of row `index`; beyond eight, colours come again with another dash."""
    return {
        "color": light(SERIES[index % len(SERIES)]),
        "linestyle": DASHES[index // len(SERIES) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def css_variables(theme: int) -> str:
    """The palette as CSS declarations; theme 0 is light, 1 dark."""
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items())


@dataclass(frozen=True)
class Figure:
    """One panel. `name` is the file's; `alt` says what there is to see; `svg`, `png` are its files' bytes."""

    name: str
    title: str
    alt: str
    svg: bytes
    png: bytes

    def inline(self) -> str:
        """The drawing for an HTML page: themed, labelled, with ids of its own and nothing that points outside."""
        text = self.svg.decode()
        text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r'\s(xmlns(:xlink)?)="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text)
        text = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
        for name, (colour, _) in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would reach the whole page
        box = re.search(r'viewBox="([^"]+)"', text)
        assert box is not None
        label = escape(self.alt)
        text = re.sub(
            r"<svg [^>]*>", lambda _: f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">', text, count=1
        )
        return re.sub(r"\n\s*", "\n", text).strip()


def draw(
    name: str,
    title: str,
    alt: str,
    paint: Callable[[Axes], None],
    *,
    height: float = SIZE[1],
    above: float = 0.0,
    left: float = 0.15,
) -> Figure:
    """Make one panel: `paint` draws into prepared axes.

    Args:
        height: inches; the width is every panel's.
        above: inches kept free between title and axes.
        left: share of the width for tick labels.
    """
    with matplotlib.rc_context(_RC):
        canvas = Canvas(figsize=(SIZE[0], height), facecolor=light("paper"))
        # Fixed margins: panels side by side line up, and the layout engine would draw everything twice.
        canvas.subplots_adjust(left=left, right=0.94, bottom=0.54 / height, top=1 - (0.36 + above) / height)
        axes = canvas.subplots()
        _plain(axes)
        axes.set_title(title, color=light("ink"), pad=9 + 72 * above, parse_math=False)
        paint(axes)
        svg, png = io.BytesIO(), io.BytesIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        canvas.savefig(svg, format="svg", metadata=nothing)
        canvas.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return Figure(name, title, alt, svg.getvalue(), png.getvalue())


# Paper behind the names, so that no grid line crosses them; no frame.
_BARE: dict[str, Any] = {
    "facecolor": light("paper"),
    "edgecolor": "none",
    "framealpha": 0.85,
    "fancybox": False,
    "borderpad": 0.2,
}


def legend(axes: Axes, *, gid: str, handles: list[Any], **place: Any) -> None:
    """A quiet legend whose texts are never read as mathematics; `place` as matplotlib's Legend takes it."""
    labels = [str(handle.get_label()) for handle in handles]
    made = Legend(axes, handles, labels, labelcolor=light("ink"), handlelength=2.2, **(_BARE | place))
    made.set_gid(gid)
    for text in made.get_texts():
        text.set_parse_math(False)
    axes.add_artist(made)


def _plain(axes: Axes) -> None:
    """Horizontal hairlines, no box, quiet ticks."""
    axes.set_facecolor(light("paper"))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(light("soft"))
    axes.spines["bottom"].set_linewidth(0.8)
    axes.grid(axis="y", color=light("rule"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, colors=light("soft"), pad=5)
    axes.tick_params(axis="x", length=3)
