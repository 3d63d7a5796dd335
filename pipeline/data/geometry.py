"""Further views of an image, as numbers: which box of it, and whether mirrored. What is stored can be replayed exactly.

A geometry is (x0, y0, x1, y1, flip), float32: whole pixels of the image as it is stored, and 0 or 1. It is drawn from
(seed, name of the view, row) alone, so that methods without a teacher cache see the very crops that others have targets
for. Boxes are drawn as torchvision's RandomResizedCrop draws them (Szegedy et al., arXiv 1409.4842): an area share,
uniform, and an aspect ratio, uniform in its logarithm; ten tries, then the largest box of an allowed ratio.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import PipeError

BASE = "base"  # the name of the one view that everyone has
NUMBERS = 5
_TRIES = 10


@dataclass(frozen=True)
class ViewSpec:
    """A family of crops, one for each row.

    Args:
        name: of the view.
        area: least and largest share of the image's pixels.
        aspect: least and largest ratio of width to height.
        flip: share of rows that are mirrored.
    """

    name: str
    area: tuple[float, float] = (0.5, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """JSON-able, as caches and configurations record it."""
        values = asdict(self)
        return values | {"area": list(self.area), "aspect": list(self.aspect)}

    def draw(self, seed: int, row: int, width: int, height: int) -> np.ndarray:
        """(5,) float32: this view's geometry of row `row`, whose image has `width` x `height` pixels."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), row])
        box = draw_box(rng, width, height, self.area, self.aspect)
        return np.array([*box, rng.random() < self.flip], np.float32)


def draw_box(
    rng: np.random.Generator, width: int, height: int, area: Sequence[float], aspect: Sequence[float]
) -> tuple[int, int, int, int]:
    """A box (x0, y0, x1, y1) in whole pixels within `width` x `height`."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_TRIES):
        pixels, ratio = width * height * rng.uniform(area[0], area[1]), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return x, y, x + w, y + h
    w, h = width, height
    if width / height < aspect[0]:
        h = min(height, max(1, round(width / aspect[0])))
    elif width / height > aspect[1]:
        w = min(width, max(1, round(height * aspect[1])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def replay(image: Image.Image, geometry: np.ndarray, size: int) -> Image.Image:
    """The view of `image` that `geometry` (5,) describes, RGB, `size` x `size` (bicubic, antialiased).

    Raises:
        PipeError: the box does not lie within the image: this is another image than the geometry was drawn for.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    x0, y0, x1, y1 = (int(value) for value in geometry[:4])
    if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
        raise PipeError(
            f"a stored view does not lie within its image of {image.width} x {image.height}",
            where=f"box {x0}, {y0}, {x1}, {y1}",
            fix="run: pipe cache verify",
        )
    crop = image.crop((x0, y0, x1, y1)).resize((size, size), Image.Resampling.BICUBIC)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry[4] else crop


def view_choice(seed: int, epoch: int, row: int, views: int) -> int:
    """Which of a row's views an epoch uses: every one once before any comes again, starting at a seeded one."""
    start = np.random.default_rng([seed, int(row), 0x51]).integers(views)
    return int((start + epoch) % views)
