"""Progress in a log file: rate, time left, plain lines."""

from __future__ import annotations

import logging
import re

import pytest

from pipeline import console
from pipeline.console import clock, log, progress


@pytest.fixture
def lines(monkeypatch):
    kept = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.setLevel(logging.INFO)
    return kept


def test_a_log_file_gets_a_line_at_intervals_and_one_at_the_end(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress("reading", total=100, unit="rows") as bar:
        for _ in range(4):
            now[0] += 10
            bar.advance(20)
        bar.note("loss 1.5")
    assert lines[0] == "reading: 40/100 rows, 2.0/s, 0:30 left"
    assert lines[-1] == "reading: 80/100 rows, 2.0/s, 0:10 left, loss 1.5"
    assert not any(re.search(r"[\r\x1b]", line) for line in lines)


def test_progress_without_a_total_counts_on(lines):
    with progress("reading", unit="rows") as bar:
        bar.advance(3)
    assert lines[-1].startswith("reading: 3 rows, ")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (59.6, "1:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
