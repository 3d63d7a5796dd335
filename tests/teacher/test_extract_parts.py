"""Stage one by several processes: the bytes of one, whatever is killed when; and growth that recomputes nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS, write_tar

from pipeline.cache import layout
from pipeline.cache.codec import ComponentMaxima, ScaleCodec
from pipeline.cache.codec import to_float16 as numpy_to_float16
from pipeline.cache.copy import copy_cache
from pipeline.cache.part import Part
from pipeline.cache.reader import open_cache
from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError
from pipeline.teacher.encode import ShardEncoder, TensorCodec, to_float16
from pipeline.teacher.extract import Settings, extract
from pipeline.teacher.teacher import Teacher, load_teacher

MakeManifest = Callable[..., Manifest]
SETTINGS = Settings(pca=16, batch_size=4, workers=1, shard_rows=8, calibration_rows=12)
KILLS = 30
CONTEXT = multiprocessing.get_context("forkserver")  # its server imports torch once, and has never run a thread


CONTEXT.set_forkserver_preload(["pipeline.teacher.extract", "timm"])


def store_bytes(path: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.name != ".lock"
    }


def extract_part(manifest: Path, checkpoint: Path, out: Path, part: Part) -> None:
    """A process's whole life."""
    torch.set_num_threads(1)
    teacher = load_teacher(VIT, model_args=VIT_ARGS, checkpoint=checkpoint, image_size=SIZE, scales=SCALES)
    try:
        extract(read_manifest(manifest), teacher, out, SETTINGS, part=part)
    except PipeError as error:
        print(error, flush=True)
        raise SystemExit(1) from None


def start(manifest: Manifest, checkpoint: Path, out: Path, parts: int) -> list[Any]:
    processes = [
        CONTEXT.Process(target=extract_part, args=(manifest.path, checkpoint, out, Part(index, parts)))
        for index in range(parts)
    ]
    for process in processes:
        process.start()
    return processes


def finished_files(out: Path) -> dict[Path, tuple[int, int]]:
    """Every file of the shards that are done: inode and time of change, which a second writing would change."""
    if not (out / layout.DIGEST).exists():
        return {}
    cache = open_cache(out)
    done = [
        shard
        for shard in range(cache.shards)
        if (cache.state()[shard * cache.shard_rows : (shard + 1) * cache.shard_rows] != layout.ABSENT).all()
    ]
    files = [array.file(out, shard) for array in cache.arrays for shard in done]
    files += [out / layout.chunk_path(layout.STATE, shard, 1) for shard in done]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_thirty_kills_of_two_processes_change_nothing(
    make_manifest: MakeManifest, vit: Teacher, vit_checkpoint: Path, tmp_path: Path
):
    """SIGKILL at random moments; between them, whatever is finished is never written again; at the end, the bytes are
    those of an undisturbed run by one process."""
    manifest, moments = make_manifest(46, broken=(11, 40)), random.Random(0)
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    whole = store_bytes(tmp_path / "whole.zarr")
    kills = done = 0
    while kills < KILLS:
        out = tmp_path / f"{done}.zarr"
        while True:
            before = finished_files(out)
            processes = start(manifest, vit_checkpoint, out, 2)
            time.sleep(moments.uniform(0.05, 0.6))
            victims = [p for p in processes if p.is_alive() and (moments.random() < 0.8 or p is processes[0])]
            for process in victims:
                process.kill()
            for process in processes:
                process.join(60)
            kills += sum(process.exitcode == -signal.SIGKILL for process in processes)
            assert {file: now for file, now in finished_files(out).items() if file in before} == before
            if all(process.exitcode == 0 for process in processes):
                break
            assert {process.exitcode for process in processes} <= {0, -signal.SIGKILL}
        assert store_bytes(out) == whole
        done += 1


def test_a_second_extraction_of_the_same_shards_says_so_and_disturbs_nothing(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest, out = make_manifest(30), tmp_path / "t.zarr"
    add, refusals = ShardEncoder.add, []

    def meanwhile(self: ShardEncoder, batch: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ShardEncoder, "add", add)
            for part in (None, Part(0, 1), Part(1, 2)):
                with pytest.raises(PipeError, match=rf"another extraction is writing shard \d.*process {os.getpid()}"):
                    extract(manifest, vit, out, SETTINGS, part=part)
                refusals.append(part)
        add(self, batch)

    monkeypatch.setattr(ShardEncoder, "add", meanwhile)
    extract(manifest, vit, out, SETTINGS)
    monkeypatch.setattr(ShardEncoder, "add", add)
    assert len(refusals) >= 3
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


# ---- growth ----------------------------------------------------------------------------------------------------------


def grow(tmp_path: Path, rows: int) -> Manifest:
    """The manifest of 20 + 2 rows with another tar of `rows` pictures."""
    folder = tmp_path / "from-0"
    write_tar(folder / "train" / "2.tar", range(100, 100 + rows), first=500)
    path = folder / "manifest.parquet"
    build_manifest(str(folder / "train"), path, val_source=str(folder / "val"), workers=0)
    return read_manifest(path)


def test_a_grown_manifest_adds_rows_and_recomputes_none(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "t.zarr"
    old = make_manifest(20)
    tar = tmp_path / "from-0" / "train" / "1.tar"
    sound, stamp = tar.read_bytes(), tar.stat()
    make_manifest(20, broken=(13, 17))
    before = extract(old, vit, out, SETTINGS).cache  # 22 rows: two whole shards and six rows of a third
    raw, whole = before.read_raw(np.flatnonzero(before.state() == 1)), finished_files(out)
    assert before.state()[[13, 17]].tolist() == [2, 2]  # and so they stay, whatever the tar holds later
    tar.write_bytes(sound)
    os.utime(tar, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    manifest = grow(tmp_path, 9)
    seen: list[int] = []
    add = ShardEncoder.add
    monkeypatch.setattr(
        ShardEncoder, "add", lambda self, batch: (seen.extend(batch.rows.tolist()), add(self, batch))[1]
    )
    grown = extract(manifest, vit, out, SETTINGS)
    assert seen == list(range(22, 31))
    assert grown.rows == 9
    cache = grown.cache
    assert (cache.rows, cache.segments) == (31, [22, 31])
    assert cache.state()[:22].tolist() == before.state().tolist()
    assert (cache.state()[22:] == 1).all()
    for name, values in cache.read_raw(np.flatnonzero(before.state() == 1), verify=True).items():
        np.testing.assert_array_equal(values, raw[name])
    now = finished_files(out)
    untouched = [file for file in whole if str(file.relative_to(out)).split("/c/")[1][0] in "01"]
    assert len(untouched) == 2 * 5
    assert all(now[file] == whole[file] for file in untouched)
    counted, after = before.saturated, cache.saturated
    assert all(after[name] >= counted[name] for name in counted)
    live = vit(torch.stack([_pixels(manifest, vit, 25)]))
    np.testing.assert_allclose(cache.read([25])["global"], live["global"].numpy(), rtol=2e-3, atol=2e-3)
    assert extract(manifest, vit, out, SETTINGS).rows == 0


def _pixels(manifest: Manifest, teacher: Teacher, row: int) -> torch.Tensor:
    return Preprocess(View("crop", SIZE), teacher.mean, teacher.std)(SampleReader(manifest).image(row))


@pytest.mark.parametrize("first", [None, 10, 20])
@pytest.mark.parametrize("second", [None, 23, 29])
def test_limits_and_growth_end_at_the_same_bytes(
    first: int | None, second: int | None, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    """However far the runs before the growth, and in it, went."""
    old = make_manifest(20)
    extract(old, vit, tmp_path / "a.zarr", SETTINGS)
    extract(old, vit, tmp_path / "b.zarr", SETTINGS, limit=first)
    manifest = grow(tmp_path, 9)
    extract(manifest, vit, tmp_path / "a.zarr", SETTINGS)
    extract(manifest, vit, tmp_path / "b.zarr", SETTINGS, limit=second)
    extract(manifest, vit, tmp_path / "b.zarr", SETTINGS)
    assert store_bytes(tmp_path / "a.zarr") == store_bytes(tmp_path / "b.zarr")


def test_a_growth_that_was_stopped_at_any_file_ends_at_the_same_bytes(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ended after each file that comes to its place: the same command goes on, and no value counts twice as cut off."""
    settings = replace(SETTINGS, calibration_rows=4)  # whose steps are too short for the others
    extract(make_manifest(20), vit, tmp_path / "old.zarr", settings)
    manifest, expected = grow(tmp_path, 3), tmp_path / "expected.zarr"
    shutil.copytree(tmp_path / "old.zarr", expected)
    whole = extract(manifest, vit, expected, settings).cache
    assert min(whole.saturated_in(2).values()) > 0
    move, moved = os.replace, list[str]()
    ended, out = False, tmp_path / "t.zarr"

    def stop_after(survived: int) -> None:
        def move_or_stop(source: Path, target: Path) -> None:
            move(source, target)
            if out in Path(target).parents:
                moved.append(Path(target).relative_to(out).as_posix())
                if len(moved) == survived:
                    raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", move_or_stop)

    for survived in range(1, 100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old.zarr", out)
        moved.clear()
        stop_after(survived)
        try:
            extract(manifest, vit, out, settings)
            ended = True
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", move)
            assert extract(manifest, vit, out, settings).rows <= 3  # the new ones; never one that was there
        assert store_bytes(out) == store_bytes(expected), moved[-1]
        if ended:
            break
    assert {"growing.json", "digest.json", "saturated/c/2/0", "seals/c/2/0/0", "state/c/2"} <= set(moved)


@pytest.mark.parametrize("limit", [3, 12, 18])
def test_a_limit_loses_no_row_of_a_copy_that_it_fills_up(
    limit: int, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(20)
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    rows = np.array([1, 6, 9, 14, 15, 21])
    copy_cache(tmp_path / "whole.zarr", tmp_path / "t.zarr", rows=rows)
    state = extract(manifest, vit, tmp_path / "t.zarr", SETTINGS, limit=limit).cache.state()
    assert (state[rows] != layout.ABSENT).all()
    assert (state[:limit] != layout.ABSENT).all()
    extract(manifest, vit, tmp_path / "t.zarr", SETTINGS)
    assert store_bytes(tmp_path / "t.zarr") == store_bytes(tmp_path / "whole.zarr")


def test_only_the_shards_that_are_asked_for_are_done_again(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(30), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS)
    whole = store_bytes(out)
    for shard in (1, 2):
        (out / layout.chunk_path(layout.STATE, shard, 1)).unlink()
    assert extract(manifest, vit, out, SETTINGS, shards=[2]).rows == 8
    assert (open_cache(out).state()[8:16] == 0).all()
    assert extract(manifest, vit, out, SETTINGS).rows == 8
    assert store_bytes(out) == whole


def test_a_damaged_state_chunk_is_no_obstacle(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS)
    whole = store_bytes(out)
    (out / "state" / "c" / "1").write_bytes(b"\0" * 12)
    assert extract(manifest, vit, out, SETTINGS).rows == 8
    assert store_bytes(out) == whole


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_store_goes_on_when_there_is_room(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, small_disk: Path
):
    manifest, out = make_manifest(80), small_disk / "t.zarr"
    settings = replace(SETTINGS, dtype="float16", calibration_rows=8)
    extract(manifest, vit, out, settings, limit=8)
    room = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(b"x" * (room - 50_000))
    with pytest.raises(PipeError, match=r"cannot write the cache.*No space left on device.*t\.zarr.*same command"):
        extract(manifest, vit, out, settings)
    cache = open_cache(out)
    ok = np.flatnonzero(cache.state() == 1)
    assert 8 <= len(ok) < 82
    cache.read(ok, verify=True)
    assert not list(out.glob(".tmp/*"))
    (small_disk / "others").unlink()
    done = finished_files(out)
    extract(manifest, vit, out, settings)
    assert {file: now for file, now in finished_files(out).items() if file in done} == done
    extract(manifest, vit, tmp_path / "whole.zarr", settings)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


# ---- compiling -------------------------------------------------------------------------------------------------------


def test_a_compiled_teacher_is_recorded_and_gives_the_same_features(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a backend that needs no compiler; what torch's own gives differs by rounding."""
    compiled: list[bool] = []

    def compile_network(self: Teacher) -> None:
        compiled.append(True)
        self.backbone.compile(backend="eager")

    monkeypatch.setattr(Teacher, "compile_network", compile_network)
    manifest = make_manifest(12)
    plain = extract(manifest, vit, tmp_path / "a.zarr", SETTINGS).cache
    assert not compiled
    made = extract(manifest, vit, tmp_path / "b.zarr", replace(SETTINGS, compile=True)).cache
    assert compiled
    assert made.settings["compile"] is True
    assert "compile" not in plain.settings
    for name, values in plain.read_raw(np.arange(12)).items():
        assert np.abs(values.astype(np.float32) - made.read_raw(np.arange(12))[name]).max() <= 1
    with pytest.raises(PipeError, match="compile"):
        extract(manifest, vit, tmp_path / "b.zarr", SETTINGS)


# ---- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int8_token", "float16"])
@pytest.mark.parametrize("projected", [False, True])
def test_encoding_on_a_device_gives_the_codecs_own_bits(dtype: layout.StoredDtype, projected: bool):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0][:, :5].astype(np.float32) if projected else None
    x = rng.normal(size=(6, 9, 12)).astype(np.float32) * rng.uniform(0.01, 30, 12).astype(np.float32)
    x[2, 3] = 0
    codec = ScaleCodec(dtype, 12, basis)
    maxima = ComponentMaxima(codec.components)
    maxima.update(codec.project(x[:3]))
    codec = codec.with_steps(maxima.steps()) if dtype == "int8" else codec
    y = (torch.from_numpy(x) if basis is None else torch.from_numpy(x) @ torch.from_numpy(basis)).numpy()
    expected = codec.quantise(y)
    values, token_steps, saturated = TensorCodec(codec, torch.device("cpu")).encode(torch.from_numpy(x))
    assert values.numpy().dtype == expected.values.dtype
    np.testing.assert_array_equal(values.numpy(), expected.values)
    alone = [codec.quantise(image[None]).saturated for image in y]
    assert saturated.tolist() == alone
    assert sum(alone) == expected.saturated
    assert expected.saturated > 0 or dtype != "int8"
    if expected.token_steps is None:
        assert token_steps is None
    else:
        np.testing.assert_array_equal(token_steps.numpy(), expected.token_steps)


def test_float16_is_cut_and_counted_as_the_codec_does():
    x = np.array([1e5, -1e5, 65504.0, 65519.0, 0.1, -3e-8], np.float32)
    expected, beyond = numpy_to_float16(x)
    found, count = to_float16(torch.from_numpy(np.stack([x, x / 2])))
    np.testing.assert_array_equal(found[0].numpy(), expected)
    assert beyond == 3
    assert count.tolist() == [3, 0]


def test_features_that_are_not_finite_are_refused():
    codec = TensorCodec(ScaleCodec("float16", 4), torch.device("cpu"))
    with pytest.raises(PipeError, match="not finite"):
        codec.encode(torch.tensor([[[1.0, 2.0, float("inf"), 0.0]]]))
