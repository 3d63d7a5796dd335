"""Figures: the curves they draw, and files that are the same each time."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
from matplotlib.axes import Axes

from pipeline.evaluation.records import Record
from pipeline.report.curves import thin, training
from pipeline.report.figures import figures
from pipeline.report.results import Results
from pipeline.report.runs import Run, group_runs
from pipeline.report.style import COLOURS, SERIES, Figure, draw
from pipeline.run_folder import RunFolder


def line(axes: Axes) -> None:
    axes.plot([0, 1], [1, 0], marker="o")


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_reach_the_contrast_that_accessibility_asks_for_in_both_themes() -> None:
    for theme in (0, 1):
        paper = COLOURS["paper"][theme]
        assert all(contrast(COLOURS[name][theme], paper) >= 3 for name in SERIES)
        assert all(contrast(COLOURS[name][theme], paper) >= 4.5 for name in ("ink", "soft"))


def test_a_long_curve_is_thinned_to_means_of_its_bins() -> None:
    x = np.arange(10_000.0)
    xs, ys = thin(x.tolist(), (3 * x + 1).tolist(), points=100)
    assert len(xs) == 100
    np.testing.assert_allclose(ys, 3 * np.array(xs) + 1, rtol=1e-12)  # a line stays a line
    np.testing.assert_allclose(np.average(ys), np.mean(3 * x + 1), rtol=1e-3)


def test_a_short_curve_keeps_every_point() -> None:
    assert thin([0, 1, 5], [2, 3, 4]) == ([0, 1, 5], [2, 3, 4])


def test_sections_without_data_are_left_out(record: Callable[..., Record]) -> None:
    assert figures(Results([record("clip", "zero_shot/top1", 0.5)]), []) == {}


def test_lines_that_lack_a_figure_leave_the_point_out(folder: Callable[..., RunFolder]) -> None:
    run = Run.read(folder("clip"))
    broken = [line | {"train/loss": None} for line in run.metrics if "train/loss" in line]
    run = Run(run.name, run.record, broken, run.config)
    names = [figure.name for figure in training(group_runs([], [run]), {run.name: run}).figures]
    assert "train_loss" not in names
    assert "train_info_nce" in names


def test_a_file_is_the_same_each_time_and_dates_from_no_day() -> None:
    first, again = (draw("p", "$title_{", "alt", line) for _ in range(2))
    assert (first.svg, first.png) == (again.svg, again.png)
    assert b"<dc:date>" not in first.svg
    assert b"$title_{" in first.svg  # shown as it is, not read as mathematics


def test_inlined_drawings_are_well_formed_and_share_no_id() -> None:
    figure = draw("one", "t", 'says "a < b"', line)
    other = Figure("two", "t", "x", figure.svg, figure.png)
    trees = [ElementTree.fromstring(f.inline()) for f in (figure, other)]
    ids = [{e.get("id") for e in tree.iter() if e.get("id")} for tree in trees]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert trees[0].get("aria-label") == 'says "a < b"'
    assert not re.search("http|xmlns|<style|DejaVu", figure.inline())
