"""`pipe extract-teacher` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import PipeError
from stages import extract_teacher


def config_file(folder: Path) -> Path:
    path = folder / "pipe.yaml"
    path.write_text("data: {source: nowhere}\nteacher: {name: mobilenetv2_050, random_weights: true}\n")
    return path


def test_without_a_manifest_it_says_which_command_makes_one(tmp_path: Path):
    with pytest.raises(PipeError, match="pipe index"):
        extract_teacher.run(load_config(config_file(tmp_path)), limit=None)
