"""Stage one from end to end: what is stored is what the teacher sees, however often the run was cut off."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS

from pipeline.cache.layout import GLOBAL, ScaleSpec
from pipeline.cache.reader import Cache, open_cache
from pipeline.data.manifest import Manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError, Stopped
from pipeline.teacher import extract as extract_module
from pipeline.teacher.calibration import Spool, choose_rows
from pipeline.teacher.extract import Settings, ShardEncoder, extract, summary
from pipeline.teacher.feed import AHEAD, AHEAD_ON_CPU, Feed, in_batches
from pipeline.teacher.teacher import Teacher, load_teacher

MakeManifest = Callable[..., Manifest]
SETTINGS = Settings(pca=16, batch_size=4, workers=2, shard_rows=10, calibration_rows=16)


def live(manifest: Manifest, teacher: Teacher, rows: list[int]) -> dict[str, np.ndarray]:
    """The teacher's features, image by image, through the preprocessing that everyone shares."""
    preprocess, reader = Preprocess(View("crop", SIZE), teacher.mean, teacher.std), SampleReader(manifest)
    found = [teacher(preprocess(reader.image(row))[None]) for row in rows]
    return {name: torch.cat([one[name] for one in found]).numpy() for name in found[0]}


def store_bytes(path: Path) -> dict[str, bytes]:
    """Every file of a store by its relative name."""
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file() and f.name != ".lock"
    }


def gram(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit @ unit.swapaxes(-1, -2)


# ---- what is stored --------------------------------------------------------------------------------------------------


def test_the_cache_equals_the_live_teacher_within_half_a_step(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(22)
    cache = extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache
    assert (cache.state() == 1).all()  # validation rows too
    rows = [0, 3, 9, 10, 17, 23]  # the last one is a validation row
    stored, features = cache.read(rows), live(manifest, vit, rows)
    for scale in SCALES:
        basis, steps = cache.basis(scale.name), cache.steps[scale.name]
        assert basis is not None
        assert steps is not None
        coefficients = features[scale.name] @ basis
        inside = np.abs(coefficients) <= 127 * steps
        assert inside.mean() > 0.98
        off = np.abs(stored[scale.name] - coefficients)
        assert (off <= 0.5 * steps + 1e-4)[inside].all()
    np.testing.assert_allclose(stored[GLOBAL], features[GLOBAL], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"dtype": "int8_token", "pca": None}, 0.02),
        ({"dtype": "float16", "pca": None}, 0.002),
        ({"dtype": "float16", "pca": 999}, 0.002),
    ],
)
def test_every_way_to_store_keeps_the_gram_matrices(
    change: dict[str, object], tolerance: float, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(18)
    cache = extract(manifest, vit, tmp_path / "t.zarr", replace(SETTINGS, **change)).cache  # type: ignore[arg-type]
    stored, features = cache.read([0, 13]), live(manifest, vit, [0, 13])
    assert stored["fine"].shape == (2, 16, 48)  # all channels
    for scale in SCALES:
        np.testing.assert_allclose(gram(stored[scale.name]), gram(features[scale.name]), atol=tolerance)


def test_the_view_decides_what_the_teacher_sees(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest = make_manifest(10)
    crop = extract(manifest, vit, tmp_path / "crop.zarr", SETTINGS).cache
    squash = extract(manifest, vit, tmp_path / "squash.zarr", replace(SETTINGS, view="squash")).cache
    assert (crop.view, squash.view) == ({"kind": "crop", "size": SIZE}, {"kind": "squash", "size": SIZE})
    assert squash.teacher["view"] == "squash"
    assert not np.allclose(crop.read([0])[GLOBAL], squash.read([0])[GLOBAL], atol=1e-2)


def test_an_undecodable_image_is_recorded_and_disturbs_nothing(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    manifest = make_manifest(22, broken=(2, 10, 11, 12, 13, 23))  # among them a whole batch of 4
    cache = extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache
    assert np.flatnonzero(cache.state() == 2).tolist() == [2, 10, 11, 12, 13, 23]
    assert summary(cache)["rows"] == {"ok": 18, "undecodable": 6, "absent": 0}
    assert not set(cache.calibration_rows) & {2, 10, 11, 12, 13, 23}
    np.testing.assert_allclose(cache.read([3])[GLOBAL], live(manifest, vit, [3])[GLOBAL], atol=2e-3, rtol=1e-3)


def test_an_image_that_is_another_one_is_left_out_whatever_its_tars_time_says(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    """One byte of the JPEG header, which the decoder does not mind; the time of change is put back."""
    manifest = make_manifest(22)
    record = manifest.record(7)
    path = manifest.source_path(record.source)
    times = path.stat()
    with open(path, "r+b") as tar:
        tar.seek(record.image_offset + 15)  # of the JFIF density
        (byte,) = tar.read(1)
        tar.seek(record.image_offset + 15)
        tar.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    SampleReader(manifest).image(7)
    assert np.flatnonzero(extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache.state() == 2).tolist() == [7]


def test_a_row_without_a_caption_has_features_but_is_not_calibrated_on(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    cache = extract(make_manifest(18, captionless=(4,)), vit, tmp_path / "t.zarr", SETTINGS).cache
    assert cache.state()[4] == 1
    assert 4 not in [*cache.calibration_rows, *cache.heldout_rows]


def test_a_tar_that_is_gone_is_an_error_and_not_a_thousand_bad_images(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(22)
    whole = extract(manifest, vit, tmp_path / "t.zarr", SETTINGS, limit=10).cache
    tar = manifest.root / "1.tar"
    tar.rename(tmp_path / "away.tar")
    with pytest.raises(PipeError, match=r"cannot open a source.*1\.tar"):
        extract(manifest, vit, tmp_path / "t.zarr", SETTINGS)
    (tmp_path / "away.tar").rename(tar)
    assert (extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache.state() == 1).all()
    assert whole.digest == open_cache(tmp_path / "t.zarr").digest


# ---- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "asked", "fitted", "held"),
    [
        (20_000, 8192, 8192, 1024),
        (10_000, 4000, 4000, 500),
        (10_000, 500, 500, 256),
        (100, 8192, 80, 20),
        (5, 8192, 3, 2),
        (3, 9, 1, 2),
    ],
)
def test_calibration_takes_four_fifths_at_most_and_holds_others_out(rows: int, asked: int, fitted: int, held: int):
    of = np.arange(rows) * 3
    calibration, heldout = choose_rows(of, asked, seed=1)
    assert (len(calibration), len(heldout)) == (fitted, held)
    assert not set(calibration) & set(heldout)
    assert set(calibration) | set(heldout) <= set(of)
    assert len(set(heldout)) == len(heldout)


def test_calibration_rows_follow_the_seed():
    of = np.arange(100)
    assert np.array_equal(choose_rows(of, 50, 1)[0], choose_rows(of, 50, 1)[0])
    assert not np.array_equal(choose_rows(of, 50, 1)[0], choose_rows(of, 50, 2)[0])


def test_too_few_rows_to_calibrate_on_are_refused(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    with pytest.raises(PipeError, match="2 usable training rows are too few"):
        extract(make_manifest(2, val=4), vit, tmp_path / "t.zarr", SETTINGS)


def test_the_spool_gives_back_what_it_was_given_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.teacher.calibration.BLOCK_BYTES", 4 * 3 * 16)  # blocks of 3 rows
    rng = np.random.default_rng(0)
    fine, vector = rng.normal(size=(7, 3, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)
    with Spool(tmp_path) as spool:
        for start, end in ((0, 2), (2, 7)):
            spool.append({"fine": fine[start:end], GLOBAL: vector[start:end]})
        for _ in range(2):
            blocks = list(spool.blocks())
            assert [len(block[GLOBAL]) for block in blocks] == [3, 3, 1]
            assert np.array_equal(np.concatenate([block["fine"] for block in blocks]), fine)
            assert np.array_equal(np.concatenate([block[GLOBAL] for block in blocks]), vector)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path) -> tuple[Manifest, Cache]:
    manifest = make_manifest(28)
    return manifest, extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache


def test_the_basis_is_fitted_on_the_calibration_rows_alone(small: tuple[Manifest, Cache], vit: Teacher):
    manifest, cache = small
    features = live(manifest, vit, cache.calibration_rows.tolist())["mid"].astype(np.float64).reshape(-1, 48)
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    basis = cache.basis("mid")
    assert basis is not None
    np.testing.assert_allclose(np.abs((basis * vectors[:, ::-1][:, :16]).sum(0))[:8], 1, atol=1e-3)
    explained = {scale.name: scale.explained for scale in cache.scales}["mid"]
    assert explained == pytest.approx(values[::-1][:16].sum() / values.sum(), rel=1e-4)


def test_baselines_are_those_of_the_stored_targets(small: tuple[Manifest, Cache]):
    _, cache = small
    fitted, held = cache.read(cache.calibration_rows), cache.read(cache.heldout_rows)
    mean = gram(fitted["fine"].astype(np.float64)).mean(0)
    np.testing.assert_allclose(cache.baselines["fine_gram_mean"], mean, atol=1e-4)
    loss = ((mean - gram(held["fine"].astype(np.float64))) ** 2).mean()
    assert cache.baseline_losses["gram"]["fine"] == pytest.approx(loss, rel=1e-2)
    assert set(cache.baseline_losses["rkd"]) == {"fine", "mid", "coarse", "global"}


def test_fidelity_is_measured_against_the_raw_teacher_on_held_out_rows(small: tuple[Manifest, Cache], vit: Teacher):
    manifest, cache = small
    rows = cache.heldout_rows.tolist()
    raw, stored = live(manifest, vit, rows)["coarse"], cache.read(rows)["coarse"]
    basis = cache.basis("coarse")
    assert basis is not None
    restored = stored @ basis.T
    cosine = (raw * restored).sum(-1) / np.linalg.norm(raw, axis=-1) / np.linalg.norm(restored, axis=-1)
    found = cache.fidelity["coarse"]
    assert found["images"] == len(rows)
    assert found["cosine_mean"] == pytest.approx(cosine.mean(), abs=1e-3)
    assert found["gram_rms"] == pytest.approx(np.sqrt(((gram(stored) - gram(raw)) ** 2).mean()), rel=0.05)


# ---- stopping and going on -------------------------------------------------------------------------------------------


def test_two_extractions_are_the_same_to_the_byte(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest = make_manifest(22, broken=(5,))
    extract(manifest, vit, tmp_path / "a.zarr", SETTINGS)
    extract(manifest, vit, tmp_path / "b.zarr", replace(SETTINGS, workers=1))
    assert store_bytes(tmp_path / "a.zarr") == store_bytes(tmp_path / "b.zarr")


def test_batches_never_straddle_a_shard(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[int]] = []
    add = ShardEncoder.add
    monkeypatch.setattr(
        ShardEncoder, "add", lambda self, batch: (seen.append(batch.rows.tolist()), add(self, batch))[1]
    )
    extract(make_manifest(22), vit, tmp_path / "t.zarr", SETTINGS)
    sizes = [4, 4, 2, 4, 4, 2, 4]
    ends = np.cumsum(sizes)
    assert seen == [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def test_limit_extracts_exactly_the_first_rows_and_a_full_run_completes_them(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    part = extract(manifest, vit, out, SETTINGS, limit=13)
    assert part.rows == 13
    assert np.flatnonzero(part.cache.state()).tolist() == list(range(13))
    assert part.cache.rows == 24
    assert extract(manifest, vit, out, SETTINGS, limit=12).rows == 0  # all there
    assert extract(manifest, vit, out, SETTINGS).rows == 14  # the shard in which the limit fell is written again
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


def test_a_finished_cache_is_left_alone(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("c/*/*")}
    assert extract(manifest, vit, out, SETTINGS).rows == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("c/*/*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_batch_and_the_same_command_goes_on(
    number: signal.Signals, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest, out = make_manifest(28), tmp_path / "t.zarr"
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        add = ShardEncoder.add

        def signalled(self: ShardEncoder, batch: object) -> None:
            add(self, batch)  # type: ignore[arg-type]
            if batch.rows[0] == 14:  # type: ignore[attr-defined]
                signal.raise_signal(number)

        patch.setattr(ShardEncoder, "add", signalled)
        with pytest.raises(Stopped, match="10 of 30 rows"):
            extract(manifest, vit, out, SETTINGS)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert extract(manifest, vit, out, SETTINGS).rows == 20
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


def test_a_signal_stops_the_calibration_too(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    forward, calls = Feed._features, []

    def signalled(self: Feed, pixels: object) -> object:
        calls.append(signal.raise_signal(signal.SIGTERM))
        return forward(self, pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(Feed, "_features", signalled)
    with pytest.raises(Stopped, match="calibration"):
        extract(make_manifest(22), vit, tmp_path / "t.zarr", SETTINGS)
    assert len(calls) == 1
    assert [file.name for file in (tmp_path / "t.zarr").iterdir()] == [".lock"]
    assert not list(tmp_path.glob(".calibration*"))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import pipeline.cache.writer as writer
    from pipeline.cache.layout import ScaleSpec
    from pipeline.data.manifest import read_manifest
    from pipeline.teacher.extract import Settings, extract
    from pipeline.teacher.teacher import load_teacher

    torch.set_num_threads(1)
    publish = writer.publish

    def publish_until_the_second_shards_global(root, file, *parts):
        if str(file).endswith("global/c/1/0"):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(root, file, *parts)

    writer.publish = publish_until_the_second_shards_global
    manifest, checkpoint, out = map(Path, sys.argv[1:])
    scales = [ScaleSpec("fine", -1, 4), ScaleSpec("mid", 1, 2), ScaleSpec("coarse", 2, 2)]
    arguments = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    teacher = load_teacher(NAME, model_args=arguments, checkpoint=checkpoint, image_size=64, scales=scales)
    settings = Settings(pca=16, batch_size=4, workers=2, shard_rows=10, calibration_rows=16)
    extract(read_manifest(manifest), teacher, out, settings)
"""


def test_a_killed_extraction_goes_on_to_the_same_bytes(
    make_manifest: MakeManifest, vit: Teacher, vit_checkpoint: Path, tmp_path: Path
):
    manifest, out = make_manifest(28, broken=(12,)), tmp_path / "t.zarr"
    script = textwrap.dedent(KILLED).replace("NAME", repr(VIT))
    command = [sys.executable, "-c", script, str(manifest.path), str(vit_checkpoint), str(out)]
    killed = subprocess.run(command, capture_output=True, timeout=120, cwd=Path(extract_module.__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert np.flatnonzero(open_cache(out).state()).tolist() == list(range(10))
    first = (out / "fine/c/0/0/0").stat().st_mtime_ns
    assert extract(manifest, vit, out, SETTINGS).rows == 20
    assert (out / "fine/c/0/0/0").stat().st_mtime_ns == first
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")
    assert not list(tmp_path.glob(".calibration*"))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_cache_of_something_else_is_refused_naming_the_field(
    make_manifest: MakeManifest, vit: Teacher, vit_checkpoint: Path, tmp_path: Path
):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS, limit=10)

    def refused(field: str, teacher: Teacher = vit, settings: Settings = SETTINGS, of: Manifest = manifest) -> None:
        with pytest.raises(PipeError, match=field):
            extract(of, teacher, out, settings)

    other = load_teacher(VIT, model_args=VIT_ARGS, random_weights=True, image_size=SIZE, scales=SCALES)
    refused(r"teacher\.weights_sha256", other)
    scales = [*SCALES[:2], ScaleSpec("coarse", 0, 2)]
    deeper = load_teacher(VIT, model_args=VIT_ARGS, checkpoint=vit_checkpoint, image_size=SIZE, scales=scales)
    refused(r"scales\[2\]\.layer", deeper)
    grey = load_teacher(
        VIT, model_args=VIT_ARGS, checkpoint=vit_checkpoint, image_size=SIZE, scales=SCALES, mean=(0.5, 0.5, 0.5)
    )
    refused(r"teacher\.mean", grey)
    refused("view", settings=replace(SETTINGS, view="squash"))
    refused(r"settings\.pca", settings=replace(SETTINGS, pca=8))
    refused(r"settings\.seed", settings=replace(SETTINGS, seed=3))
    refused(r"settings\.precision", settings=replace(SETTINGS, precision="bfloat16"))
    refused("manifest_fingerprint", of=make_manifest(22, first=100))


def test_the_same_weights_from_another_place_go_on(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS, limit=10)
    again = copy.deepcopy(vit)
    again.origin = {"origin": "pretrained"}
    assert (extract(manifest, again, out, SETTINGS).cache.state() == 1).all()


def test_a_resumed_extraction_keeps_the_precision_it_began_in(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, replace(SETTINGS, precision="bfloat16"), limit=10)
    cache = extract(manifest, vit, out, SETTINGS).cache
    assert cache.settings["precision"] == "bfloat16"
    extract(manifest, vit, tmp_path / "exact.zarr", SETTINGS)
    exact, rough = open_cache(tmp_path / "exact.zarr").read([20])[GLOBAL], cache.read([20])[GLOBAL]
    assert 1e-4 < np.abs(exact - rough).max() < 0.3


# ---- the feed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [AHEAD_ON_CPU, AHEAD])
def test_decoding_runs_only_a_few_batches_ahead(
    ahead: int, make_manifest: MakeManifest, vit: Teacher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.teacher.feed.AHEAD_ON_CPU", ahead)
    decoded: list[int] = []
    pixels = Feed._look
    monkeypatch.setattr(Feed, "_look", lambda self, row, views: (decoded.append(row), pixels(self, row, views))[1])
    feed = Feed(SampleReader(make_manifest(38)), vit, View("crop", SIZE), workers=2)
    stream = feed(in_batches(np.arange(40), 4))
    for count in range(1, 4):
        batch = next(stream)
        assert batch.rows.tolist() == list(range(4 * count - 4, 4 * count))
        assert len(decoded) <= 4 * (count + ahead)
    stream.close()


def test_the_feed_keeps_the_order_of_rows_whatever_the_threads(make_manifest: MakeManifest, vit: Teacher):
    manifest = make_manifest(10)
    rows = np.array([7, 1, 11, 4])
    feed = Feed(SampleReader(manifest), vit, View("crop", SIZE), workers=4)
    (batch,) = feed([rows])
    expected = live(manifest, vit, rows.tolist())
    np.testing.assert_allclose(batch.features["fine"].numpy(), expected["fine"], atol=1e-4, rtol=1e-4)
