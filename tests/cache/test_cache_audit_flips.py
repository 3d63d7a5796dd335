"""Single bits, flipped one after the other anywhere in a store: every one is found, and named where it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_sample import SHARD_ROWS, make_sample

from pipeline.cache import layout
from pipeline.cache.audit import verify
from pipeline.cache.reader import open_cache
from pipeline.cache.writer import CacheWriter

LEAST_EACH = 3


def chosen_bits(files: list[Path], flips: int, seed: int) -> list[tuple[Path, int]]:
    """(file, bit): at least three a file, the rest in proportion to the files' sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array([file.stat().st_size * 8 for file in files])
    extra = rng.multinomial(flips - LEAST_EACH * len(files), sizes / sizes.sum())
    return [
        (file, int(bit))
        for file, size, more in zip(files, sizes, extra, strict=True)
        for bit in rng.choice(size, min(LEAST_EACH + more, size), replace=False)
    ]


@pytest.mark.parametrize(("views", "below", "count"), [((), "", 1000), (("crop1", "crop2"), "views", 500)])
def test_every_one_of_the_flipped_bits_is_found_and_its_file_named(
    tmp_path: Path, views: tuple[str, ...], below: str, count: int
) -> None:
    store, sample = tmp_path / "teacher.zarr", make_sample(views=views)
    with CacheWriter.create(store, sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        sample.write(writer, [0, 2])  # a shard that is not there yet makes no difference
    files = sorted(f for f in (store / below).rglob("*") if f.is_file() and f.name != layout.LOCK)
    cache = open_cache(store)
    state, missed, unnamed, wrong_row = cache.state(), [], [], []
    flips = chosen_bits(files, count, seed=20)
    assert len(flips) == count
    assert {file for file, _ in flips} == set(files)
    for file, bit in flips:
        name, good = str(file.relative_to(store)), file.read_bytes()
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(bad)
        report = verify(store, workers=0)
        file.write_bytes(good)
        if not report.damage:
            missed.append((name, bit))
        elif not {name, layout.DIGEST if name == layout.METADATA else name} & {f.file for f in report.damage}:
            unnamed.append((name, bit))
        array = next((a for a in cache.arrays if name.startswith(f"{a.name}/c/")), None)
        if array is not None:
            shard = int(name.rpartition("/c/")[2].split("/")[0])
            present = np.flatnonzero(state[shard * cache.shard_rows : (shard + 1) * cache.shard_rows] == layout.OK)
            chunk = bit // 8 // (array.row_bytes + 4)
            rows = (int(present[chunk]) + shard * cache.shard_rows,) if chunk < len(present) else ()
            if [finding.rows for finding in report.damage if finding.array == array.name] != [rows]:
                wrong_row.append((name, bit, report.damage))
    assert (missed, unnamed, wrong_row) == ([], [], [])
    assert not verify(store).damage
