"""A manifest's table of any length, made from random numbers, for the tests of how big ones are read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.data.manifest import SCHEMA


def random_table(rows: int, seed: int = 0, source_rows: int = 900) -> pa.Table:
    """A table of `SCHEMA`, `rows` long and in chunks of `source_rows`: sources, hashes, and 0 to 2 captions a row."""
    rng = np.random.default_rng(seed)
    number = np.arange(rows)
    hashes = rng.bytes(32 * rows).hex()
    counts = rng.integers(0, 3, rows)
    offset = rng.integers(0, 2**40, rows)
    captions = [[f"caption {k} of row {row}, é" for k in range(count)] for row, count in enumerate(counts.tolist())]
    columns = {
        "row": number,
        "source": [f"{row // source_rows:05d}.tar" for row in range(rows)],
        "key": [f"{row:09d}" for row in range(rows)],
        "image_offset": offset,
        "image_bytes": rng.integers(1, 60_000, rows),
        "caption_offset": offset + 60_000,
        "caption_bytes": rng.integers(1, 99, rows),
        "captions": captions,
        "width": rng.integers(1, 600, rows),
        "height": rng.integers(1, 600, rows),
        "sha256": [hashes[64 * row : 64 * row + 64] for row in range(rows)],
        "split": np.where(rng.random(rows) < 0.01, "val", "train"),
        "status": np.where(counts == 0, "caption_missing", "ok"),
        "reason": [f"no caption: {row}" if count == 0 else "" for row, count in enumerate(counts.tolist())],
    }
    table = pa.table(columns, schema=SCHEMA)
    return pa.concat_tables([table.slice(first, source_rows) for first in range(0, rows, source_rows)])
