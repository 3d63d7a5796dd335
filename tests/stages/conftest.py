"""What the tests of the commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(tiny_stage_one, tmp_path):
    """A copy of the tiny workspace, to do anything with."""
    return Path(shutil.copytree(tiny_stage_one, tmp_path / "copy"))
