"""`pipe index` from the command line: what it prints, writes and refuses."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.config import Config, load_config
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError
from stages import index as stage


def index(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.cli", "index", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tiny_tars: Path) -> Path:
    """pipe.yaml beside the tiny tars, the second of which was cut."""
    (tiny_tars.parent / "pipe.yaml").write_text("data: {source: tars, workers: 2}\n")
    cut = tiny_tars / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:60_000])
    return tiny_tars.parent


def test_index_writes_the_manifest_and_shows_counts_and_problems(folder):
    done = index(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    with tarfile.open(folder / "tars" / "00000.tar") as tar:
        keys = sorted({name.split(".")[0] for name in tar.getnames()})
    assert manifest.column("key")[: len(keys)].tolist() == keys
    counts = manifest.summary()
    line = next(line for line in done.stderr.splitlines() if line.split()[:1] == ["ok"])
    assert line.split()[1:] == [str(counts["train"]["ok"]), str(counts["val"]["ok"])]
    assert "source_cut" in done.stderr
    assert "00001.tar" in done.stderr
    assert f"{len(manifest)} rows ({len(manifest)} new)" in done.stderr
    assert "manifest.parquet" in done.stderr


def test_index_needs_a_source_and_names_what_is_gone(folder, capsys):
    with pytest.raises(PipeError, match=r"^data.source is not set"):
        stage.run(Config(workspace=folder / "w"))
    config = load_config(folder / "pipe.yaml")
    stage.run(config)
    stage.run(config)  # nothing new is no problem
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("rows of the manifest") == 2
    (folder / "tars" / "00000.tar").unlink()
    with pytest.raises(PipeError, match=r"is gone.*00000\.tar; put the old file back"):
        stage.run(config)


def test_indexing_imports_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; from pipeline.data.index import build_manifest\n"
        "import stages.index\n"
        "build_manifest('tars', Path('m.parquet'), workers=1)\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'open_clip'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
