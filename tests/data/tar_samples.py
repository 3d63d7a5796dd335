"""Small images and tars for the tests of pipeline.data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(seed: int, width: int = 16, height: int = 12) -> np.ndarray:
    """(height, width, 3) uint8, smooth enough for a JPEG to be a few hundred bytes."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def image(seed: int, kind: str = "JPEG", width: int = 16, height: int = 12) -> bytes:
    """An encoded image; every seed gives other bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(out, kind)
    return out.getvalue()


def sample(key: str, seed: int, caption: str | None = None, **fields: Any) -> list[tuple[str, bytes]]:
    """Members of one img2dataset sample: jpg, txt, json."""
    caption = f"caption of {key}" if caption is None else caption
    stored = {"key": key, "caption": caption, **fields}
    return [(f"{key}.jpg", image(seed)), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(stored).encode())]


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members of samples first, first + 1 ..."""
    return [member for n in range(first, first + count) for member in sample(f"{n:09d}", n)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
