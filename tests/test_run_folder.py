"""Workspace paths and atomic writes."""

from __future__ import annotations

import pickle

import pytest

from pipeline import run_folder
from pipeline.errors import PipeError
from pipeline.evaluation.records import CHANCE, TEACHER
from pipeline.run_folder import Workspace, code_version, read_json, sha256_file, write_bytes, write_json


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "a\0b", "c:d"])
def test_a_run_name_cannot_leave_the_workspace(tmp_path, name):
    with pytest.raises(PipeError, match="cannot be a folder name"):
        Workspace(tmp_path).run(name)


@pytest.mark.parametrize("name", [CHANCE, TEACHER])
def test_a_run_cannot_take_the_name_of_a_reference_row(tmp_path, name):
    with pytest.raises(PipeError, match="reference row"):
        Workspace(tmp_path).run(name)


def test_only_folders_with_a_record_are_runs_and_only_whole_ones_finished(tmp_path):
    space = Workspace(tmp_path)
    (space.runs / "empty").mkdir(parents=True)
    for name, finished in (("b", True), ("a", False)):
        write_json(space.run(name).record, {"finished": finished})
        space.run(name).weights.write_bytes(b"")
    space.run("b").weights.write_bytes(b"x")
    assert [run.name for run in space.all_runs()] == ["a", "b"]
    assert [run.finished for run in space.all_runs()] == [False, True]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(PipeError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_nan_never_reaches_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe"])
def test_broken_json_names_the_file(tmp_path, data):
    write_bytes(tmp_path / "x.json", data)
    with pytest.raises(PipeError, match=r"not valid JSON.*x\.json"):
        read_json(tmp_path / "x.json")


def test_the_hash_is_sha256(tmp_path):
    write_bytes(tmp_path / "x", b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_code_version_starts_with_the_packages():
    assert code_version().startswith("0.1.0")


def test_errors_survive_the_way_home_from_a_worker():
    error = pickle.loads(pickle.dumps(PipeError("broken", where="a.tar", fix="index again")))
    assert str(error) == "broken, a.tar; index again"
    assert (error.what, error.where, error.fix) == ("broken", "a.tar", "index again")
