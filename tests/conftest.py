"""Fixtures shared by the tests: a tiny set of image-text tars, and a workspace in which stage one has run on them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

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


TINY_CONFIG: dict[str, Any] = {
    "workspace": "workspace",
    "data": {"source": "tars", "workers": 0},
    "teacher": {
        "name": "vit_small_patch16_dinov3_qkvb",
        "model_args": {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 2,
            "init_values": 1.0,
        },
        "random_weights": True,
        "image_size": 32,
        "batch_size": 8,
        "pca": 16,
        "calibration_rows": 24,
        "scales": [{"name": "fine", "layer": -1, "grid": 4}, {"name": "mid", "layer": 1, "grid": 2}],
    },
    "model": {
        "trunk": {
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "image_size": 32,
        "student": {"patch": 8, "depth": 2, "text_width": 16, "text_layers": 1},
    },
    "train": {
        "batch_size": 8,
        "max_steps": 6,
        "warmup_steps": 0,
        "transition_depth": 4,
        "log_every": 1,
        "checkpoint_every": 3,
        "validate_every": 3,
    },
    "evaluate": {"batch_size": 8},
}


def write_tiny_config(folder: Path, **changes: Any) -> Path:
    """pipe.yaml beside `tars/`, for the tiny data."""
    path = folder / "pipe.yaml"
    path.write_text(yaml.safe_dump(TINY_CONFIG | changes))
    return path


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
