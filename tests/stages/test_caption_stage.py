"""`pipe caption` as a user meets it; and what it leaves alone: the teacher cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from stage_captioner import tiny_blip

from pipeline.cache.reader import open_cache
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest
from pipeline.data.synthetic_captions import open_captions
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace
from stages import cache as cache_stage
from stages import caption as stage
from stages.train_data import open_data


@pytest.fixture(scope="session")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_blip(tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture
def config_file(folder: Path, captioner: Path) -> Path:
    """The tiny workspace's pipe.yaml, with a captioner beside it."""
    shutil.copytree(captioner, folder / "blip")
    values = yaml.safe_load((folder / "pipe.yaml").read_text())
    values["caption"] = {"model": "./blip", "max_new_tokens": 6, "batch_size": 7}
    (folder / "pipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipe.yaml"


def test_captions_leave_the_teacher_cache_valid(config_file, capsys):
    config = load_config(config_file)
    workspace = Workspace(config.workspace)
    before = {path: path.read_bytes() for path in workspace.teacher.rglob("*") if path.is_file()}
    manifest = workspace.manifest.read_bytes()
    rows = open_data(workspace, config).train_rows
    stage.run(config)
    assert {path: path.read_bytes() for path in workspace.teacher.rglob("*") if path.is_file()} == before
    assert workspace.manifest.read_bytes() == manifest
    assert np.array_equal(open_data(workspace, config).train_rows, rows)  # what pipe train checks before it starts
    assert open_cache(workspace.teacher).digest == json.loads(before[workspace.teacher / "digest.json"])["sha256"]
    assert cache_stage.verify(workspace.teacher, config)
    captions = open_captions(workspace.captions, read_manifest(workspace.manifest))
    assert captions.missing(rows) == 0


def test_it_says_what_is_there_in_words_and_as_json(config_file, capsys):
    config = load_config(config_file)
    stage.run(config, limit=10)
    said = capsys.readouterr().out
    assert "38 absent, 10 ok" in said
    assert "blip (BlipForConditionalGeneration, float32" in said
    assert "this run   10 rows" in said
    stage.run(config, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["captioned_now"]) == ({"ok": 48}, 38)
    assert figures["captioner"]["generation"] == {"max_new_tokens": 6, "num_beams": 1}
    stage.run(config)
    assert "this run" not in capsys.readouterr().out


def test_the_captioner_is_found_beside_the_config_or_where_the_flag_says(config_file, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config(config_file).caption.model == str(folder / "blip")
    for name, found in [
        ("./here", str(tmp_path / "here")),
        ("hf:./here", f"hf:{tmp_path / 'here'}"),
        ("~/x", str(Path("~/x").expanduser())),
        ("org/name", "org/name"),
        ("hf:org/name", "hf:org/name"),
    ]:
        assert load_config(config_file, flags={"caption.model": name}).caption.model == found


def test_what_is_not_there_is_named(config_file, folder):
    with pytest.raises(PipeError, match=r"no captioner is named, caption\.model; give --model"):
        stage.run(load_config(config_file, sets=["caption.model=null"]))
    shutil.rmtree(folder / "workspace")
    with pytest.raises(PipeError, match=r"there is no manifest.*pipe index"):
        stage.run(load_config(config_file))


def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(config_file, capsys):
    program = """
        import os, signal
        from pipeline.captioning.captioner import Captioner
        say = Captioner.__call__
        def interrupted(self, images):
            os.kill(os.getpid(), signal.SIGTERM)
            return say(self, images)
        Captioner.__call__ = interrupted
        from stages.cli import app
        app()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), "caption", "--config", str(config_file), "--json"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 75, first.stderr
    assert "stopped: captioning with 7 of 48 rows looked at; the same command goes on" in first.stderr
    assert first.stdout == ""
    config = load_config(config_file)
    with pytest.raises(PipeError, match="no synthetic captions"):
        open_captions(Workspace(config.workspace).captions, read_manifest(Workspace(config.workspace).manifest))
    stage.run(config, as_json=True)
    assert json.loads(capsys.readouterr().out)["captioned_now"] == 41
