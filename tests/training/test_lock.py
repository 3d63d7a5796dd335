"""One training of a run at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder
from pipeline.training.lock import holding


def in_another_process(part: Callable[[], str]) -> str:
    """What `part` says, in a child: a POSIX lock does not keep a process out of its own files."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, part().encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 10_000).decode()
    os.close(reading)
    os.waitpid(child, 0)
    return said


def attempt(folder: RunFolder) -> str:
    try:
        with holding(folder, main=True):
            return "taken"
    except PipeError as error:
        return str(error)


def test_a_second_training_of_a_run_is_refused_with_the_first_one_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    with holding(folder, main=True):
        folder.record.write_text("{}")
        said = in_another_process(lambda: attempt(folder))
        assert said.startswith(f"run mine is being trained by process {os.getpid()} on ")
        assert "choose another --name" in said
        assert "\n" not in said
        assert in_another_process(lambda: attempt(RunFolder(tmp_path / "other"))) == "taken"
        with holding(folder, main=False):  # the other processes of this training
            pass
    assert in_another_process(lambda: attempt(folder)) == "taken"
    assert os.listdir(folder.path) == ["record.json"]


def test_the_lock_of_a_process_that_was_killed_is_no_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")

    def killed() -> str:
        held = holding(folder, main=True)
        held.__enter__()
        os._exit(9)

    in_another_process(killed)
    assert (folder.path / ".lock").exists()
    with holding(folder, main=True):
        pass


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine")
    with pytest.raises(ValueError, match="refused"), holding(folder, main=True):
        raise ValueError("refused")
    assert not folder.path.exists()


def test_without_locks_the_run_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    said: list[str] = []
    monkeypatch.setattr("pipeline.training.lock.fcntl.lockf", none)
    monkeypatch.setattr("pipeline.training.lock.log.warning", lambda text, *values: said.append(text % values))
    with holding(RunFolder(tmp_path / "mine"), main=True):
        assert said == ["this file system gives no locks: do not start run mine twice"]
