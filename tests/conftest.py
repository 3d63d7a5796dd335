"""Fixtures shared by the tests: a tiny set of image-text tars, and a workspace in which stage one has run on them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_config import TINY_CONFIG

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub must fail at once

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
PLACES = {"left": 0, "right": 1}


def tiny_image(colour: str, place: str, noise: int, size: int = 32) -> bytes:
    """A square of one colour on one side of a grey noise background, as PNG."""
    generator = np.random.default_rng(noise)
    pixels = generator.integers(90, 150, (size, size, 3), dtype=np.uint8)
    half = size // 2
    left = PLACES[place] * half
    pixels[half // 2 : half // 2 + half, left : left + half] = COLOURS[colour]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tiny_tars(folder: Path, *, tars: int = 2, samples: int = 24) -> Path:
    """img2dataset tars: KEY.png, KEY.txt, KEY.json with two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for index in range(tars):
        with tarfile.open(folder / f"{index:05d}.tar", "w") as tar:
            for _ in range(samples):
                colour, place = list(COLOURS)[number % 4], list(PLACES)[(number // 4) % 2]
                captions = [f"a {colour} square on the {place}", f"on the {place} there is something {colour}"]
                key = f"{number:09d}"
                add(tar, f"{key}.png", tiny_image(colour, place, number))
                add(tar, f"{key}.txt", captions[0].encode())
                add(tar, f"{key}.json", json.dumps({"key": key, "captions": captions}).encode())
                number += 1
    return folder


def write_tiny_config(folder: Path, **changes: Any) -> Path:
    """pipe.yaml beside `tars/`, for the tiny data."""
    path = folder / "pipe.yaml"
    path.write_text(yaml.safe_dump(TINY_CONFIG | changes))
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_tars(tmp_path: Path) -> Path:
    return write_tiny_tars(tmp_path / "tars")


@pytest.fixture(scope="session")
def tiny_stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars/, pipe.yaml and a workspace that holds manifest and teacher cache. Read only: copy it."""
    from pipeline.config import load_config
    from stages import extract_teacher, index

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tars(folder / "tars")
    config = load_config(write_tiny_config(folder))
    index.run(config)
    extract_teacher.run(config, limit=None)
    return folder


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the tests of several processes found; see gloo_processes."""
    import gloo_processes

    return gloo_processes.start(tmp_path_factory.mktemp("gloo"))
