"""`pipe extract-teacher` as a user meets it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.cache.reader import open_cache
from pipeline.config import load_config
from pipeline.errors import PipeError
from stages import extract_teacher, index


def config_file(folder: Path) -> Path:
    """pipe.yaml beside the tars of the fixture `tiny_tars`: 48 pictures of 32 pixels."""
    teacher = {
        "name": "vit_small_patch16_dinov3_qkvb",
        "model_args": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "init_values": 1.0},
        "random_weights": True,
        "image_size": 32,
        "batch_size": 8,
        "pca": 16,
        "calibration_rows": 24,
        "scales": [{"name": "fine", "layer": -1, "grid": 4}, {"name": "mid", "layer": 1, "grid": 2}],
    }
    path = folder / "pipe.yaml"
    path.write_text(yaml.safe_dump({"data": {"source": "tars", "workers": 0}, "teacher": teacher}))
    return path


def test_without_a_manifest_it_says_which_command_makes_one(tmp_path: Path):
    with pytest.raises(PipeError, match="pipe index"):
        extract_teacher.run(load_config(config_file(tmp_path)), limit=None)


def test_it_says_what_is_in_the_cache_and_goes_on_where_a_limit_ended(
    tiny_tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = load_config(config_file(tmp_path))
    index.run(config)
    capsys.readouterr()
    extract_teacher.run(config, limit=9)
    assert "9 ok, 0 undecodable, 39 absent" in capsys.readouterr().out
    extract_teacher.run(config)
    said = capsys.readouterr().out
    assert "48 ok, 0 undecodable, 0 absent" in said
    fidelity = open_cache(config.workspace / "teacher.zarr").fidelity["mid"]["cosine_mean"]
    assert f"{fidelity:.4f}" in said
    extract_teacher.run(config)
    assert "this run" not in capsys.readouterr().out  # nothing was left to do


def test_a_file_that_is_away_is_not_an_image_that_cannot_be_decoded(tmp_path: Path):
    """It stops the extraction, names the file, and counts once it is back; a damaged one is left out for good."""
    config = load_config(
        config_file(tmp_path), sets=[f"data.source={tmp_path}/table.csv", "teacher.calibration_rows=8"]
    )
    lines = ["filepath,title"]
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,picture {number}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    index.run(config)
    (tmp_path / "9.png").rename(tmp_path / "away.png")
    with pytest.raises(PipeError, match=r"cannot read 9\.png.*put it back and run the same command"):
        extract_teacher.run(config)
    (tmp_path / "away.png").rename(tmp_path / "9.png")
    (tmp_path / "11.png").write_bytes(bytes((tmp_path / "11.png").stat().st_size))
    shutil.copy(tmp_path / "3.png", tmp_path / "12.png")
    extract_teacher.run(config)
    state = open_cache(config.workspace / "teacher.zarr").state()
    assert np.flatnonzero(state == 2).tolist() == [11, 12]
    assert (state == 1).sum() == 38


def test_a_source_that_was_replaced_stops_the_extraction(tmp_path: Path):
    """Other images in files of the old names: features of these must not go under the old images' hashes."""
    config = load_config(
        config_file(tmp_path), sets=[f"data.source={tmp_path}/table.csv", "teacher.calibration_rows=8"]
    )
    rows = [f"{number}.png,picture {number}" for number in range(20)]
    (tmp_path / "table.csv").write_text("\n".join(["filepath,title", *rows]))
    for seed in (0, 100):
        for number in range(20):
            pixels = np.random.default_rng(seed + number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        if seed == 0:
            index.run(config)
    with pytest.raises(PipeError, match=r"changed since it was indexed, and \d more of 8: was this source replaced"):
        extract_teacher.run(config)


def test_parts_end_with_the_process_that_started_them(tiny_tars: Path, tmp_path: Path):
    """Killed outright, it can stop nobody; the system does, and what was finished goes on by the same command."""
    config = load_config(config_file(tmp_path))
    index.run(config)
    program = "from stages.cli import app; app()"
    command = [sys.executable, "-c", program, "extract-teacher", "--config", str(tmp_path / "pipe.yaml")]
    parent = subprocess.Popen([*command, "--processes", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert parent.stderr is not None
    for line in parent.stderr:
        if b"[2/2]" in line:  # both parts are there
            break
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in children)
    extract_teacher.run(config)
    assert (open_cache(config.workspace / "teacher.zarr").state() == 1).all()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
