"""Crops of the one stored view, and what the teacher's map over such a crop would be: an approximation.

A box is (x0, y0, x1, y1), float32, in fractions of the square that everyone sees (see data.views). It is drawn anew for
every row in every epoch, from (seed, epoch, row) alone. The image is cut from the original at full resolution; the
teacher never saw that crop, so its map is the stored one resampled over the box, as features are for a region of
interest (RoIAlign: He et al., arXiv 1703.06870). What the teacher would see in the crop differs: its tokens are finer
and know less of their surroundings. How far, every cache has measured (`roi_cosine`). There are no flips: the mirrored
map of a picture is another thing than the map of the mirrored picture.

Legend: B rows, T = g² tokens in row-major order of the grid, K components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

BOXES = "roi.boxes"  # beside a batch's targets; no scale can have this name
SHARES = (1.0, 0.75, 0.5, 0.35, 0.2)  # of the square, at which a cache's calibration measures the approximation
_TRIES = 10


@dataclass(frozen=True)
class RoiSpec:
    """A family of boxes within the unit square.

    Args:
        area: least and largest share of the square.
        aspect: least and largest ratio of width to height.
    """

    area: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, seed: int, epoch: int, row: int) -> np.ndarray:
        """(4,) float32: the box of row `row` in epoch `epoch`, drawn as `geometry.draw_box` draws, but not in pixels.

        Where no try fits, the largest box of an allowed ratio in the middle, whatever its area.
        """
        rng = np.random.default_rng([seed, epoch, row, 0x401])
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        for _ in range(_TRIES):
            share, ratio = rng.uniform(*self.area), math.exp(rng.uniform(low, high))
            w, h = math.sqrt(share * ratio), math.sqrt(share / ratio)
            if w <= 1 and h <= 1:
                x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
                return np.clip(np.array([x, y, x + w, y + h], np.float32), 0, 1)
        w, h = min(1.0, self.aspect[1]), min(1.0, 1 / self.aspect[0])
        return np.array([(1 - w) / 2, (1 - h) / 2, (1 + w) / 2, (1 + h) / 2], np.float32)


def resample(tokens: Tensor, boxes: Tensor) -> Tensor:
    """The maps over boxes, on the same grid: bilinear, at the middle of each cell of the box.

    A box is no larger than the square, so its cells are no larger than the map's and one sample in each is enough;
    with more, the box of the whole square would no longer give back the map to the bit.

    Args:
        tokens: (B, T, K) float32. boxes: (B, 4) float32 in fractions of the square.

    Returns:
        (B, T, K) float32; beyond the middles of the outermost cells the map goes on as it is there.
    """
    count, length, width = tokens.shape
    grid = math.isqrt(length)
    maps = tokens.transpose(1, 2).reshape(count, width, grid, grid).contiguous()
    found = roi_align(maps, list(boxes.to(maps.dtype).split(1)), grid, float(grid), sampling_ratio=1, aligned=True)
    return found.flatten(2).transpose(1, 2).contiguous()


def probes(seed: int, row: int) -> np.ndarray:
    """(len(SHARES), 4) float32: the boxes in which a calibration measures row `row`, one of each share."""
    return np.stack([RoiSpec((share, share)).draw(seed, number, row) for number, share in enumerate(SHARES)])


def cosines(resampled: np.ndarray, live: np.ndarray) -> np.ndarray:
    """(n,) float64: mean cosine of the tokens of (n, T, K) maps, or of (n, C) vectors."""
    a, b = torch.from_numpy(resampled).double(), torch.from_numpy(live).double()
    found = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return found.flatten(1).mean(1).numpy() if found.ndim > 1 else found.numpy()


def described(cosine: dict[str, dict[str, float]], shares: Sequence[float] = SHARES[1:]) -> str:
    """What a cache has measured, in words: the worst scale at each share of the area."""
    if not cosine:
        return "how far this cache has not measured (it is an older one)"
    worst = {share: min(of[f"{share:g}"] for name, of in cosine.items() if name != "global") for share in shares}
    return ", ".join(f"{value:.2f} at {share:g} of the area" for share, value in worst.items())
