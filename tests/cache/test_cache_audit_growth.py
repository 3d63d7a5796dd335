"""What an extraction leaves that was cut off while a cache grew is unfinished; damage in it is damage all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import ROWS, Sample

from pipeline.cache import header, layout, seals, writer
from pipeline.cache.audit import verify
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.reader import open_cache
from pipeline.cache.store import publish
from pipeline.cache.writer import CacheWriter

MORE = 24  # rows of the grown manifest: the last shard, of 5 rows, becomes a whole one
Flip = Callable[[Path, int, int], None]


class Killed(BaseException):
    pass


def grown(sample: Sample) -> CacheIdentity:
    return sample.named(
        rows=MORE,
        manifest_fingerprint="ef" * 32,
        prefix_fingerprint=lambda rows: "cd" * 32 if rows == ROWS else "ef" * 32,
    )


@contextmanager
def killed_after(files: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process dies when it has published so many files."""
    left = files

    def counted(*args: Any) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        publish(*args)

    with monkeypatch.context() as patch:
        for module in (header, writer, seals):
            patch.setattr(module, "publish", counted)
        with pytest.raises(Killed):
            yield


def extend(writer_: CacheWriter, sample: Sample, new: int) -> None:
    """Write shard 2 again with its 5 old rows and copies of the first three, in state `new`."""
    arrays, saturated = sample.stored(range(16, ROWS))
    more, beside = sample.stored(range(3))
    state = np.append(sample.state[16:], np.full(3, new, np.uint8))
    joined = {name: np.concatenate([values, more[name]]) for name, values in arrays.items()}
    writer_.write_shard(2, joined, state, np.concatenate([saturated, beside]), extends=True)


@pytest.mark.parametrize("files", range(1, 10))
def test_growth_of_the_metadata_that_was_cut_off_is_no_damage(
    sample: Sample, store: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    with killed_after(files, monkeypatch):
        CacheWriter.resume(store, grown(sample))
    assert [(f.kind, f.file) for f in verify(store).findings] == [("unfinished", "growing.json")]
    with CacheWriter.resume(store, grown(sample)) as resumed:  # type: ignore[union-attr]
        assert resumed.rows == MORE
    report = verify(store)
    assert report.findings == []
    assert report.rows == {"ok": ROWS - 2, "undecodable": 2, "absent": 3}


def test_damage_is_found_while_a_cache_grows(
    sample: Sample, store: Path, monkeypatch: pytest.MonkeyPatch, flip: Flip
) -> None:
    with killed_after(3, monkeypatch):
        CacheWriter.resume(store, grown(sample))
    flip(store / "global" / "c" / "0" / "0", 3, 1)
    flip(store / "fine_basis" / "c" / "0" / "0", 3, 1)
    assert [f.file for f in verify(store).damage] == ["fine_basis/c/0/0", "digest.json", "global/c/0/0"]
    text = (store / "growing.json").read_text()
    (store / "growing.json").write_text(text[:100])
    assert verify(store).damage[0].file == "growing.json"


@pytest.mark.parametrize("new", [layout.OK, layout.UNDECODABLE])
@pytest.mark.parametrize("files", range(8))  # of 5 arrays, `saturated`, seals and `state`
def test_rows_whose_addition_was_cut_off_are_no_damage(
    sample: Sample, store: Path, monkeypatch: pytest.MonkeyPatch, files: int, new: int
) -> None:
    with CacheWriter.resume(store, grown(sample)) as writer_:  # type: ignore[union-attr]
        with killed_after(files, monkeypatch):
            extend(writer_, sample, new)
        report = verify(store)
        assert report.damage == []
        begun = files > 0 if new == layout.OK else files == 7  # undecodable rows show nowhere but in the seals
        assert [(f.kind, f.shard) for f in report.findings] == ([("unfinished", 2)] if begun else [])
        assert report.rows == {"ok": ROWS - 2, "undecodable": 2, "absent": 3}
        open_cache(store, verify=True).read([16, 17])
        extend(writer_, sample, new)
    assert verify(store).findings == []


@pytest.mark.parametrize("files", [0, 3, 7])
def test_damage_is_found_in_a_shard_to_which_rows_are_added(
    sample: Sample, store: Path, monkeypatch: pytest.MonkeyPatch, flip: Flip, files: int
) -> None:
    with CacheWriter.resume(store, grown(sample)) as writer_, killed_after(files, monkeypatch):  # type: ignore[union-attr]
        extend(writer_, sample, layout.OK)
    flip(store / "fine" / "c" / "2" / "0" / "0", 3, 1)
    assert [(f.file, f.rows) for f in verify(store).damage] == [("fine/c/2/0/0", (16,))]
    (store / "mid" / "c" / "2" / "0" / "0").write_bytes((store / "mid" / "c" / "0" / "0" / "0").read_bytes())
    assert "mid/c/2/0/0" in {f.file for f in verify(store).damage}


def test_a_cache_without_seals_stays_one_as_it_grows(sample: Sample, store: Path) -> None:
    shutil.rmtree(store / "seals")
    files = [f for f in json.loads((store / "digest.json").read_text())["files"] if not f.startswith("seals")]
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))
    with CacheWriter.resume(store, grown(sample)) as writer_:  # type: ignore[union-attr]
        extend(writer_, sample, layout.OK)
    assert verify(store).findings == []
    assert not (store / "seals").exists()
