"""Hints of what comes next: carried out in a thread, waited for by reads of the same rows, never errors themselves."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import ahead as ahead_module
from pipeline.cache.ahead import Ahead, read_ahead
from pipeline.cache.layout import OK
from pipeline.cache.reader import open_cache
from pipeline.errors import PipeError


def test_a_read_waits_for_hints_about_its_rows_and_for_no_others() -> None:
    ahead, go, log = Ahead(), threading.Event(), []
    ahead.hint(np.array([5, 3]), lambda: (go.wait(10), log.append("hint"))[1])
    ahead.wait_for(np.array([1, 2, 4]))
    assert not log
    threading.Timer(0.05, go.set).start()
    ahead.wait_for(np.array([9, 3]))
    assert log == ["hint"]
    ahead.wait_for(np.array([3]))  # nothing is pending any more


def test_hints_that_fail_or_are_too_many_are_let_go() -> None:
    ahead, go, done = Ahead(), threading.Event(), []

    def fail() -> None:
        raise PipeError("this shard is missing")

    ahead.hint(np.array([0]), fail)
    ahead.wait_for(np.array([0]))
    ahead.hint(np.array([0]), lambda: [][0])  # whatever it raises, the thread goes on
    ahead.wait_for(np.array([0]))
    ahead.hint(np.array([0]), lambda: (go.wait(10), None)[1])
    for number in range(3 * ahead_module.WAITING):
        ahead.hint(np.array([number + 1]), lambda: done.append(1))
    assert len(ahead._pending) <= ahead_module.WAITING + 1
    ahead.wait_for(np.array([3 * ahead_module.WAITING]))  # was let go: no one waits for it
    go.set()
    ahead.wait()
    assert 0 < len(done) <= ahead_module.WAITING


def test_the_child_of_a_fork_has_hints_of_its_own() -> None:
    ahead = Ahead()
    ahead.hint(np.array([1]), lambda: None)
    ahead.wait()
    go = threading.Event()
    ahead.hint(np.array([1]), lambda: (go.wait(10), None)[1])
    child = os.fork()
    if child == 0:
        ahead.wait_for(np.array([1]))  # the parent's hint is none of its business
        done = []
        ahead.hint(np.array([2]), lambda: done.append(1))
        ahead.wait()
        os._exit(0 if done else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.set()
    assert pickle.loads(pickle.dumps(Ahead()))._jobs is None


def test_a_cache_goes_when_its_last_user_does_hints_or_not(whole_store: Path) -> None:
    cache = open_cache(whole_store)
    rows = np.flatnonzero(cache.state() == OK)
    cache.will_need(rows)
    cache._ahead.wait()
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_the_thread_ends_with_its_cache(whole_store: Path) -> None:
    before = threading.active_count()
    for _ in range(5):
        cache = open_cache(whole_store)
        cache.will_need([0, 1])
        cache._ahead.wait()
    del cache
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("sequence", [1, 10**9])
def test_runs_are_read_and_rows_are_asked_for(sequence: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours as one run, wherever the file ends; far ones apart."""
    file = tmp_path / "shard"
    file.write_bytes(bytes(400_000))
    read: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ahead_module, "SEQUENCE", sequence)
    monkeypatch.setattr(ahead_module, "BLOCK", 20_000)
    monkeypatch.setattr(ahead_module.os, "preadv", lambda _, buffers, at: read.append((at, at + len(buffers[0]))))
    monkeypatch.setattr(ahead_module.os, "posix_fadvise", lambda _, at, count, __: asked.append((at, at + count)))
    read_ahead(file, np.array([10_000, 0, 20_000, 300_000]), 10_000)
    if sequence == 1:
        assert read == [(0, 20_000), (20_000, 30_000), (300_000, 310_000)]
        assert not asked
    else:
        assert asked == [(0, 30_000), (300_000, 310_000)]
        assert not read
