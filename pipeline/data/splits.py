"""Which rows are held out for validation: by the image's bytes, so that copies of one image fall on one side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import OK

TRAIN, VAL = "train", "val"
DUPLICATE_OF_VAL, DUPLICATE_OF_TRAIN = "duplicate_of_val", "duplicate_of_train"
LEAST_ROWS, LEAST_SHARE = 1_000, 0.1


@dataclass(frozen=True)
class Assigned:
    """Of the new rows: `split` and `status`, (n,) text each."""

    split: list[str]
    status: list[str]


def held_out_rows(rows: int, fraction: float) -> int:
    """How many of `rows` usable rows to hold out: the fraction, but at least min(1,000, 10 %)."""
    return max(math.ceil(fraction * rows), min(LEAST_ROWS, math.ceil(LEAST_SHARE * rows)))


def split_by_hash(
    hashes: Sequence[str], status: Sequence[str], old: dict[str, str], old_usable: Counter[str], fraction: float
) -> Assigned:
    """Hold out the images whose SHA-256 comes first, until old and new rows together reach `held_out_rows`.

    Args:
        hashes, status: of the new rows, (n,) each; a row without an image has hash "".
        old: image hash → split of usable rows that are already numbered; their copies follow them.
        old_usable: split → number of usable rows already numbered.
        fraction: of rows, to hold out.
    """
    counts = Counter(h for h, s in zip(hashes, status, strict=True) if s == OK)
    wanted = held_out_rows(counts.total() + old_usable.total(), fraction) - old_usable[VAL]
    wanted -= sum(number for h, number in counts.items() if old.get(h) == VAL)
    free = sorted(h for h in counts if h not in old)
    if not old and len(free) < 2:
        free = []  # one image: it is trained on
    threshold = _threshold(free, counts, wanted)
    split = [old.get(h) or (VAL if h and h <= threshold else TRAIN) for h in hashes]
    return Assigned(split, list(status))


def _threshold(free: list[str], counts: Counter[str], wanted: int) -> str:
    """The largest hash to hold out, the hashes in order making up `wanted` rows; "" for none."""
    if wanted <= 0 or not free:
        return ""
    rows: NDArray[np.int64] = np.cumsum([counts[h] for h in free])
    return free[min(int(np.searchsorted(rows, wanted)), len(free) - 1)]


def split_by_source(
    hashes: Sequence[str], status: Sequence[str], is_val: Sequence[bool], old: dict[str, str]
) -> Assigned:
    """Rows of the validation source are held out; an image on both sides is used on one.

    That is the side it is already used on, else validation: its copy in the other side gets a status that keeps it out.

    Args:
        hashes, status, is_val: of the new rows, (n,) each.
        old: image hash → split of usable rows that are already numbered.
    """
    owner = dict(old)
    for h, s, val in zip(hashes, status, is_val, strict=True):
        if s == OK and val:
            owner.setdefault(h, VAL)
    split = [VAL if val else TRAIN for val in is_val]
    kept = []
    for h, s, side in zip(hashes, status, split, strict=True):
        elsewhere = s == OK and owner.get(h, side) != side
        kept.append((DUPLICATE_OF_TRAIN if side == VAL else DUPLICATE_OF_VAL) if elsewhere else s)
    return Assigned(split, kept)
