"""What one signal asks for, and what a second one does."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline import signals
from pipeline.signals import stop_on_signals


def test_one_wish_may_come_twice_as_launchers_pass_on_what_the_terminal_sends_too() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stop_on_signals() as stop:
        assert not stop()
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_later_ctrl_c_ends_at_once_and_a_later_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ONE_WISH_SECONDS", 0.0)
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
