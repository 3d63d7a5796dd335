"""The file of synthetic captions: what is read is what was written, in any process; what does not fit is refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifest_tables import random_table

from pipeline.data import mapped
from pipeline.data.manifest import Manifest, Metadata, SplitRule, read_manifest, write_manifest
from pipeline.data.synthetic_captions import (
    METADATA_KEY,
    SCHEMA,
    CaptionerIdentity,
    CaptionsMetadata,
    SyntheticCaptions,
    open_captions,
    write_captions,
)
from pipeline.errors import PipeError

ROWS = 2_000
METADATA = Metadata(root="/data", val_root=None, rule=SplitRule(0.01, False), sources=[])
CAPTIONER = CaptionerIdentity(
    "blip", "BlipForConditionalGeneration", "ab" * 32, "a photo of", "float32", {"max_new_tokens": 40, "num_beams": 1}
)


def manifest_of(path: Path, rows: int) -> Manifest:
    write_manifest(path, random_table(ROWS + 500).slice(0, rows), METADATA)
    return read_manifest(path)


def random_captions(rows: int) -> pa.Table:
    generator = np.random.default_rng(3)
    status = generator.choice(["ok", "ok", "ok", "empty", "undecodable", "absent"], rows).tolist()
    captions = [f"ein Bild, „{n}“ " + "x" * (n % 50) if kind == "ok" else None for n, kind in enumerate(status)]
    reasons = ["" if kind in ("ok", "absent") else f"why {n}" for n, kind in enumerate(status)]
    return pa.table({"row": range(rows), "status": status, "caption": captions, "reason": reasons}, schema=SCHEMA)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SyntheticCaptions, pa.Table, Manifest]:
    monkeypatch.setattr(mapped, "GROUP_ROWS", 700)
    manifest, table = manifest_of(tmp_path / "manifest.parquet", ROWS), random_captions(ROWS)
    path = tmp_path / "captions.parquet"
    write_captions(path, table, CaptionsMetadata.of(CAPTIONER, manifest))
    return open_captions(path, manifest), table, manifest


def test_captions_and_counts_are_those_that_were_written(written):
    captions, table, _ = written
    rows = table.to_pylist()
    assert len(captions) == ROWS
    assert captions.identity == CAPTIONER
    assert [captions.caption(row) for row in range(ROWS)] == [entry["caption"] for entry in rows]
    assert captions.counts() == Counter(entry["status"] for entry in rows)
    assert captions.rows_to_table() == table
    assert pq.read_table(captions.path).cast(SCHEMA) == table  # any Parquet reader
    some = np.random.default_rng(4).integers(0, ROWS, 300)
    assert captions.missing(some) == sum(rows[row]["caption"] is None for row in some.tolist())
    assert captions.missing(some[:0]) == 0
    for row in (-1, ROWS):
        with pytest.raises(IndexError, match=f"manifest of {ROWS} rows"):
            captions.caption(row)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_they_are_read_in_other_processes_before_and_after_the_first_read(written, method):
    captions, table, _ = written
    rows = list(range(0, ROWS, 97))
    expected = [table.column("caption")[row].as_py() for row in rows]
    for _ in range(2):
        assert len(pickle.dumps(captions)) < 1_500
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            assert list(pool.map(captions.caption, rows)) == expected
        assert [captions.caption(row) for row in rows] == expected


def test_another_process_is_told_when_the_file_was_written_anew(written):
    captions, table, _ = written
    sent = pickle.dumps(captions)
    write_captions(captions.path, table, replace(captions.metadata, captioner=replace(CAPTIONER, prompt=None)))
    with pytest.raises(PipeError, match="written anew meanwhile"):
        pickle.loads(sent)


def test_captions_of_the_first_rows_serve_a_grown_manifest(written, tmp_path):
    captions, table, _ = written
    grown = manifest_of(tmp_path / "grown.parquet", ROWS + 500)
    found = open_captions(captions.path, grown)
    assert len(found) == ROWS
    assert [found.caption(row) for row in range(0, ROWS, 50)] == [captions.caption(row) for row in range(0, ROWS, 50)]
    assert found.caption(ROWS) is None
    assert found.caption(ROWS + 499) is None
    rows = np.arange(ROWS - 100, ROWS + 500)
    assert found.missing(rows) == 500 + captions.missing(rows[:100])
    absent, failed = found.without(rows)
    status = np.array([*table.column("status").to_pylist()[-100:], *["absent"] * 500])
    assert np.array_equal(absent, status == "absent")
    assert np.array_equal(failed, ~np.isin(status, ["ok", "absent"]))
    with pytest.raises(IndexError):
        found.caption(ROWS + 500)
    assert pickle.loads(pickle.dumps(found)).caption(ROWS) is None


def test_captions_of_another_manifest_or_of_more_rows_are_refused(written, tmp_path):
    captions, _, _ = written
    other = random_table(ROWS + 1).slice(1, ROWS).set_column(0, "row", pa.array(range(ROWS)))
    write_manifest(tmp_path / "other.parquet", other, METADATA)
    for manifest in (read_manifest(tmp_path / "other.parquet"), manifest_of(tmp_path / "less.parquet", ROWS - 1)):
        with pytest.raises(PipeError, match=r"made of another manifest.*captions\.parquet; run: pipe caption --over"):
            open_captions(captions.path, manifest)


def test_captions_that_are_not_there_name_the_command(written, tmp_path):
    with pytest.raises(PipeError, match=r"no synthetic captions, .*nowhere; run: pipe caption$"):
        open_captions(tmp_path / "nowhere", written[2])


def test_what_is_no_such_file_or_damaged_is_one_line(written, tmp_path):
    captions, table, manifest = written
    good = captions.path.read_bytes()
    others: list[bytes] = [b"", b"not Parquet", good[:-10], good[: len(good) // 2], manifest.path.read_bytes()]
    pq.write_table(table, tmp_path / "plain.parquet")
    others.append((tmp_path / "plain.parquet").read_bytes())
    metadata = json.loads(captions.metadata.to_json())
    for changes in ({"version": 2}, {"rows": ROWS - 1}, {"fingerprint": "00"}, {"captioner": {}}):
        said = {METADATA_KEY: json.dumps(metadata | changes).encode()}
        pq.write_table(table.replace_schema_metadata(said), tmp_path / "plain.parquet")
        others.append((tmp_path / "plain.parquet").read_bytes())
    for number, content in enumerate(others):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(content)
        with pytest.raises(PipeError, match=r"no file of synthetic captions, or damaged .*pipe caption --overwrite"):
            open_captions(path, manifest)


def test_a_bit_that_flips_where_captions_are_mapped_changes_none(written, caplog):
    captions, table, manifest = written
    place = json.loads(pq.read_metadata(captions.path).metadata[mapped.STREAM_KEY])
    good, expected = captions.path.read_bytes(), table.column("caption").to_pylist()
    told = 0
    start, end = 8 * place["offset"], 8 * (place["offset"] + place["bytes"])
    for at in np.random.default_rng(5).integers(start, end, 25).tolist():
        damaged = bytearray(good)
        damaged[at // 8] ^= 1 << at % 8
        captions.path.with_suffix(".new").write_bytes(damaged)
        captions.path.with_suffix(".new").rename(captions.path)
        caplog.clear()
        found = open_captions(captions.path, manifest)
        assert [found.caption(row) for row in range(ROWS)] == expected, at
        told += any("damaged" in message for message in caplog.messages)
    assert told > 10  # the others hit rows, reasons and padding


def test_damage_to_both_copies_is_an_error_and_never_another_caption(written):
    captions, table, manifest = written
    good = captions.path.read_bytes()
    place = json.loads(pq.read_metadata(captions.path).metadata[mapped.STREAM_KEY])
    end = place["offset"] + place["bytes"]
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    path, told = captions.path.with_suffix(".new"), 0
    for at in np.random.default_rng(6).integers(8 * end, 8 * footer, 60).tolist():
        damaged = bytearray(good)
        damaged[place["offset"] : end] = bytes(place["bytes"])
        damaged[at // 8] ^= 1 << at % 8
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            assert open_captions(path, manifest).rows_to_table() == table, at
        except PipeError:
            told += 1
    assert told > 50


def test_rows_out_of_order_are_not_written(written, tmp_path):
    captions, table, _ = written
    with pytest.raises(ValueError, match="in order"):
        write_captions(tmp_path / "c.parquet", table.slice(1), captions.metadata)


def test_many_captions_take_little_memory_and_no_torch(tmp_path):
    """These captions are 60 MB as Arrow arrays; mapped, they are no memory of the process."""
    rows = 400_000
    write_manifest(tmp_path / "m.parquet", random_table(10), METADATA)
    texts = pa.array([f"{n:0150d}" for n in range(1_000)]).take(pa.array(np.arange(rows) % 1_000))
    columns = {"row": np.arange(rows), "status": ["ok"] * rows, "caption": texts, "reason": [""] * rows}
    metadata = CaptionsMetadata(CAPTIONER, rows, "")
    write_captions(tmp_path / "c.parquet", pa.table(columns, schema=SCHEMA), metadata)
    script = """
        import sys
        from pathlib import Path
        import numpy as np
        from pipeline.data.synthetic_captions import _open

        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

        before = anonymous()
        captions = _open(Path(sys.argv[1]), 400_000)
        for row in np.random.default_rng(0).integers(0, len(captions), 1_000).tolist():
            assert int(captions.caption(row)) == row % 1_000
        captions.missing(np.arange(400_000))
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        print(anonymous() - before)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kB
