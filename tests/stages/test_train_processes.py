"""One process a GPU, started by `pipe train` itself: how their ends become its own. The processes are shell scripts."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pipeline.errors import PipeError, Stopped
from stages import train_processes


@pytest.fixture
def scripts(monkeypatch):
    """Run these instead, one a rank."""
    started = []

    def use(*texts):
        original = train_processes.start

        def start(command, place, **how):
            assert place["WORLD_SIZE"] == str(len(texts))
            assert place["RANK"] == place["LOCAL_RANK"] == str(len(started))
            assert command[-2:] == ["train", "--resume"]
            started.append(original(["sh", "-c", texts[len(started)]], place, **how))
            return started[-1]

        monkeypatch.setattr(train_processes, "start", start)
        return started

    return use


ARGUMENTS = ["train", "--resume"]


def test_all_well(scripts):
    started = scripts("exit 0", 'test -n "$MASTER_PORT"')
    train_processes.run(2, ARGUMENTS)
    assert [copy.returncode for copy in started] == [0, 0]


def test_a_failure_is_an_error_and_what_hangs_is_ended(scripts, monkeypatch):
    monkeypatch.setattr(train_processes, "PATIENCE_SECONDS", 0.3)
    started = scripts("exec sleep 60", "exit 3")
    with pytest.raises(PipeError, match="ended with code 3; its message stands above"):
        train_processes.run(2, ARGUMENTS)
    assert [copy.returncode for copy in started] == [-signal.SIGKILL, 3]


def test_a_process_stopped_by_a_signal_of_its_own_is_a_stop(scripts):
    scripts("exit 75", "exit 75")
    with pytest.raises(Stopped, match="--resume"):
        train_processes.run(2, ARGUMENTS)


def test_a_signal_reaches_every_process_and_waits_for_them(scripts):
    waits = "trap 'sleep 0.2; exit 75' TERM; echo ready > /dev/null; while true; do sleep 0.05; done"
    started = scripts(waits, waits)

    def interrupt():
        while len(started) < 2:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped):
        train_processes.run(2, ARGUMENTS)
    assert [copy.returncode for copy in started] == [75, 75]
