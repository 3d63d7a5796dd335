"""The figures of a report: results and nodes here, curves over training beside them.

A run has one colour, dash and marker throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipeline.report.curves import Panel, Section, distilled, run_legend, training, trajectories
from pipeline.report.results import NODES, Results
from pipeline.report.runs import Group, Run
from pipeline.report.style import DASHES, draw, light, series
from pipeline.report.table import Number
from pipeline.report.text import shortened, slug


def figures(results: Results, runs: Sequence[Run]) -> dict[str, Section]:
    """All panels by section (retrieval, nodes, training, distillation, injection); those without data are left out."""
    known = {run.name: run for run in runs}
    found = {
        "retrieval": retrieval(results),
        "nodes": by_node(results),
        "training": training(results.own_groups, known),
        "distillation": distilled(results.own_groups, known),
        "injection": trajectories(results.own_groups, known),
    }
    return {name: section for name, section in found.items() if section.figures}


def retrieval(results: Results) -> Section:
    """R@1 of both directions with intervals, a panel a benchmark."""
    panels = []
    for benchmark, split in results.places("retrieval"):
        where = results.place_name(benchmark, split, "retrieval")
        rows: list[tuple[Group, Number, Number]] = []
        for group in results.own_groups:
            pair = [results.cell(group, benchmark, split, f"retrieval/{way}_recall@1") for way in ("i2t", "t2i")]
            if pair[0] is not None and pair[1] is not None:
                rows.append((group, pair[0], pair[1]))
        chance = [
            results.cell(group, benchmark, split, "retrieval/t2i_recall@1")
            for group in results.groups
            if group.reference
        ]
        level = next((cell.value for cell in chance if cell is not None), None)
        if not rows:
            continue
        alt = f"Bars of R@1 on {where}: " + "; ".join(
            f"{group.label}: {100 * a.value:.1f} % image to text, {100 * b.value:.1f} % text to image"
            for group, a, b in rows
        )
        paint = _recall_bars(rows, level)
        name = f"retrieval_{slug(where)}"
        panels.append(draw(name, f"R@1, {where} (%)", alt, paint, height=1.0 + 0.66 * len(rows), left=0.02))
    return Section(panels)


def _recall_bars(rows: list[tuple[Group, Number, Number]], chance: float | None) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        for place, (group, *pair) in enumerate(rows):
            style = series(group.index)
            for number, (cell, way) in enumerate(zip(pair, ("i → t", "t → i"), strict=True)):
                y = 3.3 * place + number
                low, high = _spread(cell)
                axes.barh(y, 100 * cell.value, height=0.8, color=style["color"], alpha=1 if number == 0 else 0.55)
                axes.plot([100 * low, 100 * high], [y, y], color=light("ink"), linewidth=1.2, solid_capstyle="butt")
                end = 100 * max(cell.value, high)
                text = f"\u00a0{100 * cell.value:.1f}\u00a0\u00a0{way}"  # SVG would drop plain spaces
                axes.text(end, y, text, va="center", fontsize=9, color=light("soft"))
            axes.text(
                0,
                3.3 * place - 0.72,
                shortened(group.label),
                va="bottom",
                fontsize=10,
                color=light("ink"),
                parse_math=False,
            )
        if chance is not None:
            axes.axvline(100 * chance, color=light("soft"), linewidth=1, linestyle=DASHES[2])
        axes.set_ylim(3.3 * len(rows) - 1.5, -1.9)
        axes.set_yticks([])
        top = max(100 * max(cell.value, _spread(cell)[1]) for _, *pair in rows for cell in pair)
        axes.set_xlim(0, top * 1.3 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return paint


def by_node(results: Results) -> Section:
    """Gap, relative gap and R@1 along the forward pass, three panels a benchmark."""
    asked = (
        ("gap", "nodes/gap", "Modality gap", 1.0),
        ("relative_gap", "nodes/relative_gap", "Relative gap", 1.0),
        ("recall", "retrieval/mean_recall@1", "Mean R@1 (%)", 100.0),
    )
    panels: list[Panel] = []
    for benchmark, split in results.places("nodes"):
        where = results.place_name(benchmark, split, "nodes")
        for name, metric, title, factor in asked:
            lines: list[tuple[Group, dict[str, Number]]] = []
            for group in results.own_groups:
                cells = {node: results.cell(group, benchmark, split, metric, node) for node in NODES}
                there = {node: cell for node, cell in cells.items() if cell is not None}
                if there:
                    lines.append((group, there))
            if not lines:
                continue
            alt = f"{title} by node on {where}: " + "; ".join(
                f"{group.label}: " + ", ".join(f"{node} {factor * c.value:.3g}" for node, c in cells.items())
                for group, cells in lines
            )
            panel = draw(f"{name}_{slug(where)}", f"{title}, {where}", alt, _along_nodes(lines, factor))
            panels.append(Panel(panel, [group for group, _ in lines]))
    return Section.of(panels)


def _along_nodes(lines: list[tuple[Group, dict[str, Number]]], factor: float) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for place, (group, cells) in enumerate(lines):
            style = series(group.index)
            shift = 0.14 * (place - (len(lines) - 1) / 2) / max(1, len(lines) / 4)
            x = [NODES.index(node) + shift for node in cells]
            y = [factor * cell.value for cell in cells.values()]
            for at, cell in zip(x, cells.values(), strict=True):
                low, high = _spread(cell)
                axes.plot([at, at], [factor * low, factor * high], color=style["color"], linewidth=1.4)
            # The student lives in the teacher's space: no line leads through it.
            path = [i for i, node in enumerate(cells) if node != "student"]
            axes.plot([x[i] for i in path], [y[i] for i in path], color=style["color"], linewidth=1, alpha=0.55)
            axes.plot(x, y, linestyle="", marker=style["marker"], color=style["color"], markersize=5.5)
        axes.set_xticks(range(len(NODES)), NODES)
        axes.set_xlim(-0.5, len(NODES) - 0.5)
        highest = max(factor * max(cell.value, _spread(cell)[1]) for _, cells in lines for cell in cells.values())
        axes.set_ylim(0, 1.12 * highest if highest > 0 else 1)
        run_legend(axes, [group for group, _ in lines], lines_only=False)

    return paint


def _spread(cell: Number) -> tuple[float, float]:
    """The interval, or mean ∓ std over seeds, or the point."""
    if cell.std is not None:
        return cell.value - cell.std, cell.value + cell.std
    return (cell.value if cell.low is None else cell.low), (cell.value if cell.high is None else cell.high)
