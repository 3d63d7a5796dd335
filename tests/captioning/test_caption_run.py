"""The loop of `pipe caption`: every row once, whatever ends a run; and no row by two captioners."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_captioners import blip

from pipeline.cache.locks import StoreLock
from pipeline.captioning import caption as loop
from pipeline.captioning.caption import caption
from pipeline.captioning.captioner import Captioner, CaptionSettings
from pipeline.captioning.parts import CaptionParts, join
from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.synthetic_captions import SCHEMA, CaptionsMetadata, SyntheticCaptions, open_captions
from pipeline.errors import PipeError, Stopped

BATCH = 5  # 48 rows are no multiple of it
HOW = {"max_new_tokens": 6, "batch_size": BATCH}


class Counting(Captioner):
    """Notes how many images it was shown, and may do something before a batch."""

    seen = 0
    before = staticmethod(lambda batch: None)
    batches = 0

    def __call__(self, images):
        self.before(self.batches)
        self.batches += 1
        self.seen += len(images)
        return super().__call__(images)


@pytest.fixture
def make(folders):
    return lambda kind="blip", **more: Counting(str(folders[kind]), CaptionSettings(**HOW | more), "cpu")


@pytest.fixture
def run(tmp_path: Path, manifest: Manifest):
    """run(captioner, out="a", manifest=..., **options) → the captions."""

    def start(captioner: Captioner, out: str = "a", manifest: Manifest = manifest, **options) -> SyntheticCaptions:
        return caption(
            manifest, captioner, tmp_path / f"{out}.parquet", tmp_path / f"{out}.parts", workers=1, **options
        ).captions

    return start


def table(captions: SyntheticCaptions) -> pa.Table:
    return pq.read_table(captions.path)


def test_every_row_has_what_the_captioner_says_of_its_block(run, make, manifest, tmp_path):
    captions = run(make())
    reader, captioner = SampleReader(manifest), make()
    for start in range(0, 48, BATCH):
        rows = range(start, min(start + BATCH, 48))
        assert [captions.caption(row) for row in rows] == captioner([reader.image(row) for row in rows])
    assert len({captions.caption(row) for row in range(48)}) > 2
    assert captions.counts() == {"ok": 48}
    assert table(captions).schema.remove_metadata() == SCHEMA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "manifest.parquet", "tars"]


def test_limit_and_split_and_a_stop_lead_to_the_file_of_an_undisturbed_run(run, make, manifest, monkeypatch):
    whole = table(run(make(), "whole"))
    some = run(make(), limit=12)
    assert some.counts() == {"ok": 12, "absent": 36}
    assert [some.caption(row) is None for row in (11, 12)] == [False, True]
    train = manifest.rows("train", ok_only=False)
    some = run(make(), split="train")
    assert np.flatnonzero([some.caption(row) is not None for row in range(48)]).tolist() == sorted(
        {*range(12), *train.tolist()}
    )
    captioner = make()
    assert table(run(captioner)).equals(whole)
    assert captioner.seen <= BATCH * (48 - len(train))
    again = make()
    assert table(run(again)).equals(whole)
    assert again.seen == 0
    assert again._model is None  # nothing to do: no weights are loaded


def test_a_stop_by_signal_keeps_what_is_finished(run, make, tmp_path):
    whole = run(make(), "whole")
    stopped = make()
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 else None
    with pytest.raises(Stopped, match="20 of 48 rows looked at"):
        run(stopped)
    assert not (tmp_path / "a.parquet").exists()
    assert pq.read_table(tmp_path / "a.parts" / "part-000000.parquet").column("row").to_pylist() == list(range(20))
    rest = make()
    captions = run(rest)
    assert rest.seen == 28
    assert captions.path.read_bytes() == whole.path.read_bytes()
    assert not (tmp_path / "a.parts").exists()


def test_killed_at_any_moment_it_goes_on_and_ends_in_the_same_file(run, make, manifest, folders, tmp_path):
    """It costs the rows since the last part. Half a part that was being written is no part."""
    program = """
        import sys, time
        from pathlib import Path
        from pipeline.captioning import caption as loop
        from pipeline.captioning.captioner import Captioner, CaptionSettings
        from pipeline.data.manifest import read_manifest

        loop.PART_ROWS = 10
        class Slow(Captioner):
            def __call__(self, images):
                time.sleep(0.3)
                return super().__call__(images)
        manifest, folder, out = sys.argv[1:]
        captioner = Slow(folder, CaptionSettings(max_new_tokens=6, batch_size=5), "cpu")
        loop.caption(read_manifest(Path(manifest)), captioner, Path(out + ".parquet"), Path(out + ".parts"), workers=1)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(manifest.path), str(folders["blip"])]
    process = subprocess.Popen([*command, str(tmp_path / "a")], stderr=subprocess.DEVNULL)
    while not (tmp_path / "a.parts" / "part-000001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    (tmp_path / "a.parts" / ".part-000002.parquet.1.tmp").write_bytes(b"half a part")
    stored = sum(pq.read_metadata(path).num_rows for path in (tmp_path / "a.parts").glob("part-*"))
    assert 20 <= stored < 48
    rest = make()
    captions = run(rest)
    assert rest.seen == 48 - stored
    assert captions.path.read_bytes() == run(make(), "whole").path.read_bytes()
    assert not (tmp_path / "a.parts").exists()


def test_parts_are_written_by_rows_and_by_time(run, make, monkeypatch):
    written = []
    write = CaptionParts.write
    monkeypatch.setattr(CaptionParts, "write", lambda self, t, m: (written.append(len(t)), write(self, t, m)))
    monkeypatch.setattr(loop, "PART_ROWS", 20)
    run(make(), "rows")
    assert written == [20, 20, 8]
    written.clear()
    monkeypatch.setattr(loop, "PART_SECONDS", 0.0)
    run(make(), "time")
    assert written == [BATCH] * 9 + [3]


def test_parts_that_outlived_the_joined_file_do_no_harm(run, make, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(CaptionParts, "clear", lambda self: None)
        whole = run(make()).path.read_bytes()
    assert (tmp_path / "a.parts").exists()
    again = make()
    assert run(again).path.read_bytes() == whole
    assert again.seen == 0
    assert not (tmp_path / "a.parts").exists()


def test_broken_images_are_recorded_and_passed_over(run, make, manifest, caplog):
    reader = SampleReader(manifest)
    for row in (7, 30):
        record = manifest.record(row)
        with open(manifest.source_path(record.source), "r+b") as tar:
            tar.seek(record.image_offset)
            tar.write(bytes(record.image_bytes))
    captions = run(make())
    found = table(captions).to_pylist()
    assert captions.counts() == {"ok": 46, "undecodable": 2}
    for row in (7, 30):
        assert (found[row]["status"], found[row]["caption"]) == ("undecodable", None)
        assert "cannot decode" in found[row]["reason"]
    assert captions.missing(np.arange(48)) == 2
    block = [row for row in range(5, 10) if row != 7]
    assert [captions.caption(row) for row in block] == make()([reader.image(row) for row in block])
    again = make()
    run(again)
    assert again.seen == 0  # a broken image is not looked at again


def test_an_image_that_is_another_than_was_indexed_gets_no_caption(run, make, manifest):
    """Even where nothing but its bytes tells."""
    size = manifest.column("image_bytes")
    small, large = int(size[:24].argmin()), int(size[:24].argmax())
    record, reader = manifest.record(large), SampleReader(manifest)
    data, tar = reader.image_bytes(small), manifest.source_path(record.source)
    time_of_change = os.stat(tar).st_mtime_ns
    with open(tar, "r+b") as file:
        file.seek(record.image_offset)
        file.write(data + bytes(record.image_bytes - len(data)))
    os.utime(tar, ns=(time_of_change, time_of_change))
    assert SampleReader(manifest).image(large) == reader.image(small)  # it decodes, and looks well
    found = table(run(make())).to_pylist()[large]
    assert (found["status"], found["caption"]) == ("undecodable", None)
    assert "changed since it was indexed" in found["reason"]


def test_a_batch_without_any_image_is_no_problem(run, make, manifest, tmp_path):
    """A table of files that were never there."""
    (tmp_path / "mixed").mkdir()
    lines = ["filepath,title", *(f"{n}.png,nothing {n}" for n in range(BATCH))]
    (tmp_path / "mixed" / "a.csv").write_text("\n".join(lines))
    shutil.copy(tmp_path / "tars" / "00000.tar", tmp_path / "mixed" / "one.tar")
    build_manifest(f"{tmp_path}/mixed/*", tmp_path / "m.parquet", workers=0)
    captions = run(make(), manifest=read_manifest(tmp_path / "m.parquet"))
    assert captions.counts() == {"ok": 24, "undecodable": 5}


def test_a_model_that_says_nothing_is_recorded(run, make, monkeypatch):
    silent = make()
    monkeypatch.setattr(silent._tokenizer, "batch_decode", lambda tokens, **_: [" "] + ["a"] * (len(tokens) - 1))
    captions = run(silent)
    assert captions.counts() == {"empty": 10, "ok": 38}
    assert captions.caption(0) is None
    assert captions.caption(1) == "a"


def test_another_captioner_prompt_or_length_is_refused_and_named(run, make, folders, tmp_path):
    stopped = make()
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGINT) if batch == 2 else None
    for unfinished in (True, False):
        if unfinished:
            with pytest.raises(Stopped):
                run(stopped)
        else:
            run(make())
        for other, said in [
            (make("encoder_decoder"), "the captioner was blip and is encoder_decoder"),
            (make(prompt="a dog"), "prompt was None and is 'a dog'"),
            (make(max_new_tokens=7), "max_new_tokens was 6 and is 7"),
            (make(num_beams=2), "num_beams was 1 and is 2"),
        ]:
            with pytest.raises(PipeError, match=rf"of another kind: {said}.*--overwrite"):
                run(other)
            assert other.seen == 0


def test_overwriting_keeps_the_old_file_until_the_end_and_can_be_resumed(run, make, tmp_path):
    old = run(make()).path.read_bytes()
    stopped = make(prompt="a dog")
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 else None
    with pytest.raises(Stopped):
        run(stopped, overwrite=True)
    assert (tmp_path / "a.parquet").read_bytes() == old
    with pytest.raises(PipeError, match="prompt was None"):
        run(make(prompt="a dog"))
    rest = make(prompt="a dog")
    captions = run(rest, overwrite=True)
    assert rest.seen == 28  # its own parts are not thrown away
    assert captions.path.read_bytes() == run(make(prompt="a dog"), "whole").path.read_bytes()


def test_overwriting_throws_parts_of_others_away(run, make):
    stopped = make(prompt="a dog")
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 else None
    with pytest.raises(Stopped):
        run(stopped)
    whole = make()
    captions = run(whole, overwrite=True)
    assert whole.seen == 48
    assert captions.identity.prompt is None
    assert table(captions).equals(table(run(make(), "whole")))


def test_a_grown_manifest_costs_its_new_rows_alone(run, make, manifest, tmp_path):
    old = run(make())
    before = [old.caption(row) for row in range(48)]
    shutil.copy(tmp_path / "tars" / "00000.tar", tmp_path / "tars" / "00002.tar")
    build_manifest(str(tmp_path / "tars"), manifest.path, workers=0)
    grown = read_manifest(manifest.path)
    assert len(grown) == 72
    still = open_captions(old.path, grown)
    assert (len(still), still.missing(np.arange(72)), still.caption(71)) == (48, 24, None)
    more = make()
    captions = run(more, manifest=grown)
    assert more.seen == 24 + 3  # with the three old rows of the block that was cut
    assert [captions.caption(row) for row in range(48)] == before
    assert captions.missing(np.arange(72)) == 0
    assert captions.metadata.fingerprint == grown.fingerprint()


def test_captions_of_another_manifest_are_refused(run, make, manifest, tmp_path):
    run(make(), limit=3)
    build_manifest(str(tmp_path / "tars" / "00001.tar"), tmp_path / "other.parquet", workers=0)
    other = read_manifest(tmp_path / "other.parquet")
    with pytest.raises(PipeError, match=r"made of another manifest.*--overwrite"):
        run(make(), manifest=other)
    assert run(make(), manifest=other, overwrite=True).counts() == {"ok": 24}


def test_parts_of_another_manifest_are_refused(run, make, manifest, tmp_path):
    stopped = make()
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 1 else None
    with pytest.raises(Stopped):
        run(stopped)
    build_manifest(str(tmp_path / "tars" / "00001.tar"), tmp_path / "other.parquet", workers=0)
    other = read_manifest(tmp_path / "other.parquet")
    with pytest.raises(PipeError, match=r"made of another manifest, .*part-000000\.parquet.*--overwrite"):
        run(make(), manifest=other)
    whole = make()
    run(whole, manifest=other, overwrite=True)
    assert whole.seen == 24


def test_two_at_once_are_refused(run, make, tmp_path):
    with (
        CaptionParts(tmp_path / "a.parts"),
        pytest.raises(PipeError, match=rf"another pipe caption is at work \(process {os.getpid()}"),
    ):
        run(make())
    assert run(make()).counts() == {"ok": 48}


def test_a_lock_on_a_folder_that_was_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening the lock's file and locking it, the one before finishes and removes both."""
    exclusive, removed = StoreLock.exclusive, []

    def late(lock: StoreLock) -> bool:
        if not removed:
            removed.append((tmp_path / "parts" / ".lock").unlink())
            (tmp_path / "parts").rmdir()
        return exclusive(lock)

    monkeypatch.setattr(StoreLock, "exclusive", late)
    with CaptionParts(tmp_path / "parts"):
        assert removed
        with pytest.raises(PipeError, match="another pipe caption is at work"):
            CaptionParts(tmp_path / "parts").__enter__()
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("moment", ["mkdir", "open"])
def test_a_folder_that_goes_while_it_is_entered_is_made_again(tmp_path, monkeypatch, moment):
    """The one before removes it after mkdir found it there, or before the lock's file was opened."""
    folder, gone = tmp_path / "parts", []
    mkdir = Path.mkdir

    def interrupted(path: Path, *args: object, **options: object) -> None:
        mkdir(path, *args, **options)
        if path == folder and not gone:
            gone.append(path.rmdir())
            if moment == "mkdir":
                raise FileExistsError(17, "File exists")

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with CaptionParts(folder):
        assert gone
    assert not folder.exists()


def test_a_file_in_the_place_of_the_parts_is_one_line(tmp_path):
    (tmp_path / "parts").write_text("")
    with pytest.raises(PipeError, match=r"cannot make this folder: File exists, .*parts"):
        CaptionParts(tmp_path / "parts").__enter__()


def test_a_damaged_part_is_one_line_and_its_rows_are_captioned_again(run, make, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PART_ROWS", 10)
    stopped = make()
    stopped.before = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 5 else None
    with pytest.raises(Stopped):
        run(stopped)
    part = tmp_path / "a.parts" / "part-000001.parquet"
    good, with_parts = part.read_bytes(), CaptionParts(tmp_path / "a.parts")
    rows = with_parts.read(part)
    damaged = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(good), 200).tolist():
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        part.write_bytes(flipped)
        try:
            assert with_parts.read(part) == rows  # in padding, or in statistics that nobody reads
        except PipeError:
            damaged += 1
    assert damaged > 100
    part.write_bytes(good[:-9])
    with pytest.raises(PipeError, match=r"this part is damaged.*part-000001.*remove it and run the same command"):
        run(make())
    part.unlink()
    rest = make()
    assert table(run(rest)).equals(table(run(make(), "whole")))
    assert rest.seen == 48 - 20


def test_a_file_that_is_away_stops_and_what_was_said_is_kept(run, make, manifest, tmp_path):
    (tmp_path / "tars" / "00001.tar").rename(tmp_path / "away.tar")
    with pytest.raises(PipeError, match="cannot open a source of the manifest"):
        run(make())
    (tmp_path / "away.tar").rename(tmp_path / "tars" / "00001.tar")
    rest = make()
    assert table(run(rest)).equals(table(run(make(), "whole")))
    assert rest.seen < 48


def test_joining_takes_the_first_of_a_row_and_calls_the_others_absent(monkeypatch):
    monkeypatch.setattr("pipeline.captioning.parts.GROUP_ROWS", 4)
    generator = np.random.default_rng(0)
    tables, expected = [], {}
    for number in range(3):
        rows = generator.choice(30, 12, replace=False).tolist()
        entries = [{"row": row, "status": "ok", "caption": f"{number} {row}", "reason": ""} for row in rows]
        entries[0] |= {"status": "absent", "caption": None}
        tables.append(pa.Table.from_pylist(entries, SCHEMA))
        for entry in entries[1:]:
            expected.setdefault(entry["row"], entry)
    absent = {"status": "absent", "caption": None, "reason": ""}
    assert join(tables, 30).to_pylist() == [expected.get(row, {"row": row, **absent}) for row in range(30)]
    assert join([], 2).to_pylist() == [{"row": row, **absent} for row in range(2)]


def test_a_part_says_whose_it_is(make, manifest, tmp_path):
    """Another program, or a later version, can tell."""
    metadata = CaptionsMetadata.of(make().identity, manifest)
    with CaptionParts(tmp_path / "parts") as parts:
        parts.write(SCHEMA.empty_table(), metadata)
        assert parts.read(parts.files()[0]) == (SCHEMA.empty_table(), metadata)
        parts.clear()


def test_another_seed_of_weights_says_otherwise(run, make, tmp_path):
    """Or the tests above would hold for a captioner that ignores its weights."""
    other = Counting(str(blip(tmp_path / "other", seed=5)), CaptionSettings(**HOW), "cpu")
    assert not table(run(other, "other")).equals(table(run(make())))
