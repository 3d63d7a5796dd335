"""What no writer of ours stores, though its checksum fits: values that cannot be.

Legend: n rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray

NO_BOX = "not a box of whole pixels (x0 < x1, y0 < y1) and 0 or 1"
BEYOND_IMAGE = "boxes reach beyond their images, which the manifest gives the sizes of"


def impossible(
    array: RowArray, values: np.ndarray, sizes: np.ndarray | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """What is wrong, and with which rows: (n,) bool.

    Args:
        values: (n, row bytes) uint8, or (n, ...) as the array has them.
        sizes: (n, 2) width and height of the images, 0 where unknown; for the geometry of further views.
    """
    typed = np.ascontiguousarray(values).view(array.dtype).reshape(len(values), -1)
    if array.dtype.kind != "f":
        yield "values lie outside -127..127", (typed == -128).any(axis=1)
        return
    finite = np.isfinite(typed).all(axis=1)
    yield "values are not finite", ~finite
    if array.name.endswith(f"/{layout.GEOMETRY}"):
        boxes = _boxes(typed)
        yield NO_BOX, finite & ~boxes
        if sizes is not None:
            yield BEYOND_IMAGE, boxes & ((typed[:, 2:4] > sizes) & (sizes > 0)).any(axis=1)
    elif array.dtype.itemsize == 4:  # steps
        yield "steps are negative", finite & (typed < 0).any(axis=1)


def _boxes(geometry: np.ndarray) -> np.ndarray:
    """(n, 5) float32 → (n,) bool: whether these are boxes."""
    x0, y0, x1, y1, flip = geometry.T
    with np.errstate(invalid="ignore"):
        whole = (np.floor(geometry) == geometry).all(axis=1) & np.isfinite(geometry).all(axis=1)
        return np.asarray(whole & (x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & ((flip == 0) | (flip == 1)))
