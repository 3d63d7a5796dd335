"""A second caption of each image, for losses that read two (ALIP): another of the row's own, or a synthetic one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.data.synthetic_captions import SyntheticCaptions

SecondCaption = Callable[[int, int, list[str], int], str]  # (epoch, row, the row's captions, the chosen one's index)


class AnotherOfItsOwn:
    """Any of the row's captions but the chosen one, as a function of (seed, epoch, row); the row has two at least."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, epoch: int, row: int, captions: list[str], chosen: int) -> str:
        ahead = np.random.default_rng([self.seed, epoch, int(row), 0x2C]).integers(1, len(captions))
        return captions[(chosen + int(ahead)) % len(captions)]


class Synthetic:
    """The caption that `pipe caption` wrote for the row."""

    def __init__(self, captions: SyntheticCaptions) -> None:
        self.captions = captions

    def __call__(self, epoch: int, row: int, captions: list[str], chosen: int) -> str:
        found = self.captions.caption(row)
        assert found is not None, row  # rows without one are left out before training
        return found
