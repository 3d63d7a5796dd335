"""An audit finds whatever is not as it was written, names file, shard and rows, and lets no finding hide another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import COMPONENTS, ROWS, SHARD_ROWS, Sample, make_sample

from pipeline.cache import layout
from pipeline.cache.audit import invalidate, verify
from pipeline.cache.findings import Finding, Report, named
from pipeline.cache.reader import open_cache
from pipeline.cache.seals import seal
from pipeline.cache.shards import assemble_shard, crc32c, index_bytes, with_crc
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError

Flip = Callable[[Path, int, int], None]
STRIDE, INDEX = 9 * COMPONENTS + 4, index_bytes(SHARD_ROWS)  # of `fine`
FINE = "fine/c/0/0/0"
FIRST_OK = [row for row in range(SHARD_ROWS) if row != 3]  # row 3 is undecodable: the file has 7 chunks


def said(report: Report) -> list[tuple[str, int | None, list[int]]]:
    """File, shard and rows of each finding of damage."""
    return [(finding.file, finding.shard, list(finding.rows)) for finding in report.damage]


def what(report: Report) -> str:
    return "\n".join(finding.line() for finding in report.findings)


def rebuild(store: Path, change: Callable[[np.ndarray, np.ndarray], None], name: str = FINE) -> None:
    """Write a shard file of `fine` anew with other chunks (7, stride) and index entries (S, 2), its checksum right."""
    data = (store / name).read_bytes()
    chunks = np.frombuffer(data[:-INDEX], np.uint8).reshape(-1, STRIDE).copy()
    entries = np.frombuffer(data[-INDEX:-4], "<u8").reshape(-1, 2).copy()
    change(chunks, entries)
    (store / name).write_bytes(chunks.tobytes() + with_crc(entries.tobytes()))


def redigest(store: Path) -> None:
    """Make digest.json fit whatever the metadata is now."""
    files = sorted(json.loads((store / "digest.json").read_text())["files"])
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))


# ---- sound stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "scheduler"), [(0, "auto"), (2, "threads"), (2, "processes")])
def test_a_sound_store_is_sound_whoever_reads_it(whole_store: Path, workers: int, scheduler: Any) -> None:
    report = verify(whole_store, workers=workers, scheduler=scheduler)
    assert report.findings == []
    assert report.rows == {"ok": ROWS - 2, "undecodable": 2, "absent": 0}
    assert report.shards == 3
    names = [*(array.name for array in open_cache(whole_store).arrays), "state", "saturated"]
    files = [file for name in names for file in (whole_store / name / "c").rglob("*") if file.is_file()]
    assert report.bytes_read == sum(file.stat().st_size for file in files)  # every byte of them


def test_the_other_files_of_a_running_writer_are_no_damage(store: Path) -> None:
    (store / ".tmp" / "deep").mkdir(parents=True)
    (store / ".tmp" / "deep" / "x").write_bytes(b"half a shard")
    (store / "fine" / "c" / "9").mkdir()  # the folder of a file that was never renamed into it
    assert verify(store).findings == []


def test_a_shard_written_in_part_is_sound(sample: Sample, tmp_path: Path) -> None:
    state = sample.state.copy()
    state[4:] = layout.ABSENT
    with CacheWriter.create(tmp_path / "t", sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        arrays, saturated = sample.stored(writer.rows_of(0))
        writer.write_shard(0, arrays, state[:SHARD_ROWS], saturated)
        report = verify(tmp_path / "t")
    assert report.findings == []
    assert report.rows == {"ok": 3, "undecodable": 1, "absent": 17}


def test_a_shard_that_was_never_published_is_unfinished_and_no_damage(store: Path) -> None:
    (store / "state" / "c" / "1").unlink()
    (store / "fine" / "c" / "1" / "0" / "0").write_bytes(b"cut off by a power failure")
    report = verify(store)
    assert report.damage == []
    assert [(f.kind, f.shard) for f in report.findings] == [("unfinished", 1)]
    assert report.rows == {"ok": 11, "undecodable": 2, "absent": 8}


def test_setting_up_that_was_cut_off_is_unfinished(sample: Sample, store: Path, tmp_path: Path) -> None:
    with CacheWriter.create(tmp_path / "t", sample.identity, sample.fit, shard_rows=SHARD_ROWS):
        (tmp_path / "t" / "digest.json").unlink()
    report = verify(tmp_path / "t")
    assert report.damage == []
    assert "cut off" in what(report)
    (store / "digest.json").unlink()  # here rows are lost sight of: damage
    assert said(verify(store))[0] == ("digest.json", None, [])


def test_a_shard_that_is_replaced_during_the_audit_is_at_work_not_damaged(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cache import audit_shard as module

    class Racing(module.FileAudit):
        def run(self) -> Any:
            (store / "state" / "c" / "0").unlink(missing_ok=True)
            self.file.unlink()
            return super().run()

    monkeypatch.setattr(module, "FileAudit", Racing)
    report = verify(store, shards=[0], workers=0)
    assert [(f.kind, f.shard) for f in report.findings] == [("unfinished", 0)]


def test_a_store_without_seals_is_sound_and_says_what_was_not_checked(sample: Sample, store: Path) -> None:
    shutil.rmtree(store / "seals")
    files = [f for f in json.loads((store / "digest.json").read_text())["files"] if not f.startswith("seals")]
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))
    report = verify(store)
    assert report.findings == []
    assert "without seals" in report.notes[0]


def test_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(PipeError, match=r"there is no teacher cache.*extract-teacher"):
        verify(tmp_path)


# ---- shard files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, INDEX, 3 * STRIDE + 5, 7 * STRIDE, 7 * STRIDE + 5, -1])
def test_a_shard_cut_short_names_the_rows_that_are_gone(store: Path, keep: int) -> None:
    size = (store / FINE).stat().st_size
    (store / FINE).write_bytes((store / FINE).read_bytes()[:keep])
    report = verify(store)
    keep %= size
    assert f"cut short: {keep:,} of {size:,} bytes" in what(report)
    assert {(file, shard) for file, shard, _ in said(report)} == {(FINE, 0)}
    gone = [rows for *_, rows in said(report) if rows]
    assert gone == ([FIRST_OK[keep // STRIDE :]] if keep < 7 * STRIDE else [])


def test_an_appended_byte_is_found_and_hides_no_damaged_row(store: Path, flip: Flip) -> None:
    with open(store / FINE, "ab") as file:
        file.write(b"\0")
    assert "1 bytes longer" in what(verify(store))
    assert said(verify(store)) == [(FINE, 0, [])]
    flip(store / FINE, 2 * STRIDE + 1, 1)
    assert (FINE, 0, [2]) in said(verify(store))


def test_a_damaged_index_hides_no_damaged_row(store: Path, flip: Flip) -> None:
    flip(store / FINE, -10, 3)
    flip(store / FINE, 5 * STRIDE, 0)
    report = verify(store)
    assert said(report) == [(FINE, 0, []), (FINE, 0, [6])]
    assert "index" in report.damage[0].what


def test_all_damage_of_a_store_is_named_at_once(store: Path, flip: Flip) -> None:
    for name, byte in (
        ("fine_basis/c/0/0", 3),
        (FINE, 0),
        ("global/c/2/0", 7),
        ("state/c/1", 2),
        ("saturated/c/1/0", 0),
    ):
        flip(store / name, byte, 1)
    (store / "raw" / "c" / "1" / "0" / "0").unlink()
    (store / "notes.txt").write_text("mine")
    found = {(file, *rows) for file, _, rows in said(verify(store))}
    assert found == {
        ("fine_basis/c/0/0",),
        ("digest.json",),
        (FINE, 0),
        ("global/c/2/0", 16),
        ("state/c/1",),
        ("saturated/c/1/0",),
        ("raw/c/1/0/0",),
        ("notes.txt",),
    }


def test_an_index_may_order_chunks_otherwise(store: Path) -> None:
    def swap(chunks: np.ndarray, entries: np.ndarray) -> None:
        chunks[[0, 2]], entries[[0, 2]] = chunks[[2, 0]], entries[[2, 0]]

    rebuild(store, swap)
    assert verify(store).findings == []


@pytest.mark.parametrize(
    ("slot", "entry", "clause", "rows"),
    [
        (2, (10**9, STRIDE), "points outside", [2]),
        (2, (2**63, STRIDE), "points outside", [2]),
        (2, (2 * STRIDE, STRIDE - 4), "wrong length", [2]),
        (2, (2**64 - 1, 2**64 - 1), "marked ok, but there is no chunk", [2]),
        (2, (STRIDE, STRIDE), "chunks overlap", [1, 2]),
        (2, (2 * STRIDE - 1, STRIDE), "chunks overlap", [1, 2]),
        (3, (2 * STRIDE, STRIDE), "`state` forbids it", [3]),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_found_though_its_checksum_fits(
    store: Path, slot: int, entry: tuple[int, int], clause: str, rows: list[int]
) -> None:
    def change(chunks: np.ndarray, entries: np.ndarray) -> None:
        entries[slot] = entry

    rebuild(store, change)
    found = [finding for finding in verify(store).damage if clause in finding.what]
    assert [list(finding.rows) for finding in found] == [rows]


def test_bytes_that_belong_to_no_chunk_are_found(store: Path) -> None:
    data = (store / FINE).read_bytes()
    entries = np.frombuffer(data[-INDEX:-4], "<u8").reshape(-1, 2).copy()
    entries[4:, 0] += 6
    (store / FINE).write_bytes(data[: 3 * STRIDE] + b"secret" + data[3 * STRIDE : -INDEX] + with_crc(entries.tobytes()))
    report = verify(store)
    assert "6 bytes belong to no chunk" in what(report)
    assert all(rows == [] for *_, rows in said(report))


@pytest.mark.parametrize(
    ("name", "value", "clause"),
    [("raw", np.inf, "not finite"), ("global", np.nan, "not finite"), ("mid_steps", np.nan, "not finite"),
     ("mid_steps", -1.0, "negative"), ("fine", -128, "outside -127..127")],
)  # fmt: skip
def test_values_that_no_writer_stores_are_found_though_checksums_fit(
    store: Path, name: str, value: float, clause: str
) -> None:
    cache = open_cache(store)
    array = next(array for array in cache.arrays if array.name == name)
    stored = np.zeros((SHARD_ROWS, *array.row_shape), array.dtype)
    stored[FIRST_OK] = cache.read_raw(FIRST_OK)[name]
    stored.reshape(SHARD_ROWS, -1)[5, -1] = value
    chunks, index = assemble_shard(stored, cache.state()[:SHARD_ROWS] == layout.OK)
    array.file(store, 0).write_bytes(chunks.tobytes() + index)
    found = [finding for finding in verify(store).damage if clause in finding.what]
    assert [(finding.array, finding.rows) for finding in found] == [(name, (5,))]


@pytest.mark.parametrize("damage", ["missing", "folder", "link"])
def test_a_file_that_is_no_file_is_found(store: Path, damage: str) -> None:
    (store / FINE).unlink()
    if damage == "folder":
        (store / FINE).mkdir()
    if damage == "link":
        (store / FINE).symlink_to("nowhere")
    assert said(verify(store)) == [(FINE, 0, FIRST_OK)]


@pytest.mark.parametrize(
    "name", ["fine/c/1/0/0", "mid_steps/c/1/0", "global/c/1/0", "saturated/c/1/0", "seals/c/1/0/0", "state/c/1",
             "fine/zarr.json", "state/zarr.json", "zarr.json", "digest.json", "fine_basis/c/0/0", "heldout_rows/c/0"],
)  # fmt: skip
def test_every_removed_file_is_noticed(store: Path, name: str) -> None:
    (store / name).unlink()
    report = verify(store)
    assert name in {finding.file for finding in report.findings}
    assert bool(report.damage) is (name != "state/c/1")  # that is what a stopped extraction looks like


# ---- files in the wrong place ----------------------------------------------------------------------------------------


def swap_files(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize("array", ["fine", "mid", "mid_steps", "raw", "global"])
def test_two_exchanged_shards_are_both_found(sample: Sample, tmp_path: Path, array: str) -> None:
    """Both are sound in themselves, and no state tells them apart: only their seals do."""
    sample = Sample(sample.identity, sample.fit, np.full(ROWS, layout.OK, np.uint8), sample.features)
    store = sample.build(tmp_path / "t")
    files = [next(a for a in open_cache(store).arrays if a.name == array).file(store, shard) for shard in (0, 1)]
    open_cache(store, verify=True).read(range(16))
    swap_files(*files)
    open_cache(store, verify=True).read(range(16))  # the reader cannot know
    report = verify(store)
    assert said(report) == [(str(f.relative_to(store)), i, list(range(8 * i, 8 * i + 8))) for i, f in enumerate(files)]
    assert "exchanged" in what(report)


def test_exchanged_seals_and_counts_are_found(store: Path) -> None:
    saturated = [store / "saturated" / "c" / str(shard) / "0" for shard in (0, 1)]
    saturated[0].write_bytes(with_crc(np.arange(3 * SHARD_ROWS, dtype="<i4").tobytes()))
    assert said(verify(store)) == [("saturated/c/0/0", 0, [])]
    swap_files(store / "seals" / "c" / "1" / "0" / "0", store / "seals" / "c" / "2" / "0" / "0")
    assert said(verify(store))[1:] == [("seals/c/1/0/0", 1, []), ("seals/c/2/0/0", 2, [])]


def test_the_same_shard_of_another_cache_is_found(store: Path, tmp_path: Path) -> None:
    other = make_sample(seed=1).build(tmp_path / "other")
    shutil.copy(other / FINE, store / FINE)
    assert said(verify(store)) == [(FINE, 0, FIRST_OK)]


def test_a_checksum_of_the_whole_file_could_not_be_a_seal() -> None:
    """Why seals are over the checksums: CRC-32C of data followed by its own CRC-32C does not depend on the data."""
    one, other = with_crc(b"shard 0"), with_crc(b"shard 1")
    assert crc32c(one) == crc32c(other)
    assert seal("fine", 0, one[-4:]) != seal("fine", 0, other[-4:])
    assert seal("fine", 0, one[-4:]) != seal("fine", 1, one[-4:])


@pytest.mark.parametrize(
    "name", ["notes.txt", "fine/c/0/0/0.bak", "fine/c/7/0/0", "fine/c/00/0/0", "fine/c/0/0/1", "state/c/3",
             "x/zarr.json", "fine/c/x", "digest.json.tmp"],
)  # fmt: skip
def test_files_that_should_not_be_there_are_named(store: Path, name: str) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_text("{}\n")
    report = verify(store)
    assert [finding.file for finding in report.damage if finding.kind == "stray"] == [name]
    assert report.damaged_shards == []


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_damaged_state_hides_no_damaged_row(store: Path, flip: Flip) -> None:
    flip(store / "state" / "c" / "0", 1, 0)
    flip(store / FINE, 5 * STRIDE, 0)
    assert said(verify(store)) == [("state/c/0", 0, []), (FINE, 0, [6])]


def test_states_that_mean_nothing_are_found_though_the_checksum_fits(store: Path) -> None:
    state = np.zeros(SHARD_ROWS, np.uint8)
    state[:4], state[2], state[7] = 1, 9, 1  # shard 2 has rows 16 to 20
    (store / "state" / "c" / "2").write_bytes(with_crc(state.tobytes()))
    report = verify(store)
    assert ("state/c/2", 2, [18]) in said(report)
    assert "states beyond the last row" in what(report)


# ---- metadata --------------------------------------------------------------------------------------------------------


def test_an_altered_document_is_found_even_with_a_fitting_digest(store: Path) -> None:
    for name, old, new in (
        ("fine/zarr.json", '"int8"', '"uint8"'),
        ("state/zarr.json", '"row"', '"raw"'),
        ("mid_basis/zarr.json", '"component"', '"k"'),
    ):
        text = (store / name).read_text()
        (store / name).write_text(text.replace(old, new))
        redigest(store)
        assert {file for file, *_ in said(verify(store))} == {name}
        (store / name).write_text(text)
    redigest(store)
    assert verify(store).findings == []


def test_metadata_in_another_form_is_found(store: Path) -> None:
    document = json.loads((store / "zarr.json").read_text())
    (store / "zarr.json").write_text(json.dumps(document))
    redigest(store)
    assert said(verify(store)) == [("zarr.json", None, [])]


def test_a_digest_that_leaves_a_file_out_or_lists_another_is_found(store: Path) -> None:
    files = json.loads((store / "digest.json").read_text())["files"]
    for changed in ([f for f in files if f != "fine/zarr.json"], sorted([*files, "state/c/0"])):
        digest = layout.digest_of(store, changed)
        (store / "digest.json").write_bytes(layout.json_bytes({"files": changed, "sha256": digest}))
        assert said(verify(store)) == [("digest.json", None, [])]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b"\xff\xfe", b'{"attributes": NaN}', b'{"a": "\\ud800"}'])
@pytest.mark.parametrize("name", ["zarr.json", "digest.json", "global/zarr.json"])
def test_metadata_that_is_gibberish_hides_no_damaged_row(store: Path, flip: Flip, name: str, damage: bytes) -> None:
    (store / name).write_bytes(damage)
    flip(store / FINE, 5 * STRIDE, 0)
    report = verify(store)
    assert (name, None, []) in said(report)
    assert (FINE, 0, [6]) in said(report)
    assert {file for file, *_ in said(report)} <= {name, "digest.json", FINE}


@pytest.mark.parametrize(
    ("old", "new"),
    [('"shard_rows": 8', '"shard_rows": 9'), (f'"rows": {ROWS}', f'"rows": {ROWS + 6000000}'), ('"mid"', '"mud"')],
)
def test_attributes_that_the_arrays_do_not_bear_out_are_not_believed(
    store: Path, flip: Flip, old: str, new: str
) -> None:
    """One digit or letter: the arrays still say what is there, and no sound shard is called damaged."""
    text = (store / "zarr.json").read_text()
    (store / "zarr.json").write_text(text.replace(old, new))
    flip(store / FINE, 5 * STRIDE, 0)
    report = verify(store)
    assert "digest.json" in {finding.file for finding in report.beyond_repair}
    assert report.damaged_shards == [0]
    assert (FINE, 0, [6]) in said(report)


def test_small_arrays_with_impossible_values_are_found_though_all_checksums_fit(store: Path) -> None:
    basis = np.full((6, COMPONENTS), np.nan, "<f4")
    (store / "fine_basis" / "c" / "0" / "0").write_bytes(with_crc(basis.tobytes()))
    (store / "heldout_rows" / "c" / "0").write_bytes(with_crc(np.arange(15, 22, dtype="<i8").tobytes()))
    redigest(store)
    assert {file for file, *_ in said(verify(store))} == {"fine_basis/c/0/0", "heldout_rows/c/0"}


# ---- what is said, and what is made ready for repair -----------------------------------------------------------------


def test_the_report_is_json_and_a_line_names_file_shard_and_rows(store: Path, flip: Flip) -> None:
    flip(store / FINE, 5 * STRIDE, 0)
    report = verify(store)
    value = json.loads(json.dumps(report.to_json()))
    assert value["sound"] is False
    assert value["damaged_shards"] == [0]
    assert value["findings"][0]["rows"] == [6]
    assert report.damage[0].line() == "damage: fine/c/0/0/0 (shard 0): checksums do not fit; 1 row: 6"


def test_rows_are_named_in_runs() -> None:
    assert named([7]) == "1 row: 7"
    assert named([1, 2, 3, 9]) == "4 rows: 1-3, 9"
    assert named(list(range(0, 100, 2))).endswith("20, 22, ...")


def test_invalidating_makes_exactly_the_damaged_shards_ones_to_do_again(
    sample: Sample, store: Path, flip: Flip
) -> None:
    before = {f: f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file() and f.name != ".lock"}
    flip(store / FINE, 5 * STRIDE, 0)
    (store / "global" / "c" / "2" / "0").unlink()
    (store / "global" / "c" / "2" / "0").mkdir()
    report = verify(store)
    assert report.damaged_shards == [0, 2]
    assert invalidate(store, report) == [0, 2]
    assert verify(store).damage == []
    with CacheWriter.create(store, sample.identity, sample.fit) as writer:
        assert writer.missing == [0, 2]
        sample.write(writer)
    assert {f: f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file() and f.name != ".lock"} == before


def test_damage_that_no_shard_has_is_not_repaired(store: Path, flip: Flip) -> None:
    flip(store / "fine_basis" / "c" / "0" / "0", 3, 1)
    flip(store / FINE, 5 * STRIDE, 0)
    report = verify(store)
    with pytest.raises(PipeError, match=r"restore it from a copy"):
        invalidate(store, report)
    assert said(verify(store)) == said(report)


class _Grown:
    """A manifest of some rows whose fingerprint is known by length."""

    path = Path("manifest.parquet")

    def __init__(self, rows: int, fingerprints: dict[int, str]) -> None:
        self.rows, self.fingerprints = rows, fingerprints

    def __len__(self) -> int:
        return self.rows

    def fingerprint(self, rows: int) -> str:
        return self.fingerprints.get(rows, "")


def test_the_manifest_is_compared_by_the_rows_that_the_cache_has(whole_store: Path) -> None:
    own = {ROWS: "cd" * 32}
    for manifest, clause in ((_Grown(ROWS, own), "the same rows"), (_Grown(ROWS + 4, own), "and 4 new ones")):
        report = verify(whole_store, manifest=manifest)  # type: ignore[arg-type]
        assert report.findings == []
        assert clause in report.manifest
    for other in (_Grown(ROWS, {ROWS: "00"}), _Grown(ROWS - 1, own)):
        report = verify(whole_store, manifest=other)  # type: ignore[arg-type]
        assert [finding.file for finding in report.beyond_repair] == ["zarr.json"]


def test_findings_about_no_row_name_none() -> None:
    assert Finding("lost", "a/b", "a", 3).line() == "damage: a/b (shard 3): lost"
