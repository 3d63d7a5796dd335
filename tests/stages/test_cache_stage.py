"""`pipe cache` as a user meets it: exit codes, what is printed, and a repair that gives back every byte."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from pipeline.cache import layout
from pipeline.cache.reader import open_cache
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest, write_manifest
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace
from stages import cache as stage
from stages import cli, extract_teacher, train_data

ROWS, SHARD_ROWS = 48, 8


@pytest.fixture(scope="module")
def many_shards(tiny_stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny workspace with its cache in 6 shards. Read only: copy it."""
    folder = Path(shutil.copytree(tiny_stage_one, tmp_path_factory.mktemp("cache") / "many"))
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SHARD_ROWS", (SHARD_ROWS, 2 * SHARD_ROWS))
        extract_teacher.run(load_config(folder / "pipe.yaml"))
    return folder


@pytest.fixture
def cached(many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to damage; its tars stay where they are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(many_shards / "workspace", tmp_path / "workspace")
    shutil.copy(many_shards / "pipe.yaml", tmp_path / "pipe.yaml")
    return tmp_path / "workspace" / "teacher.zarr"


def pipe(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["cache", *arguments])


def store_bytes(path: Path) -> dict[str, bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != layout.LOCK)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def flip(file: Path, byte: int = 3) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_a_sound_cache_is_exit_0_with_a_config_and_by_its_path_alone(cached: Path, tmp_path: Path) -> None:
    assert len(list((cached / "state" / "c").iterdir())) == 6
    done = pipe("verify")
    assert done.exit_code == 0, done.output
    assert "sound" in done.stdout
    assert "the same rows" in done.stdout
    (tmp_path / "pipe.yaml").unlink()
    assert pipe("verify", str(cached)).stdout == done.stdout
    assert "pipe init" in pipe("verify").stderr


def test_damage_is_exit_1_and_every_shard_and_row_is_named(cached: Path) -> None:
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    (cached / "global" / "c" / "4" / "0").unlink()
    done = pipe("verify")
    assert done.exit_code == 1
    assert "damage: fine/c/2/0/0 (shard 2): checksums do not fit; 1 row: 16" in done.stdout.splitlines()
    assert "damage: global/c/4/0 (shard 4): the file is missing; 8 rows: 32-39" in done.stdout.splitlines()
    assert "2 findings, 2 shards, 9 rows" in done.stdout
    found = json.loads(pipe("verify", "--json").stdout)
    assert (found["sound"], found["damaged_shards"], found["repair"]) == (False, [2, 4], None)
    assert [finding["rows"] for finding in found["findings"]] == [[16], list(range(32, 40))]


def test_many_findings_are_printed_in_part_and_listed_in_full(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHOWN", 2)
    for shard in range(5):
        flip(cached / "fine" / "c" / str(shard) / "0" / "0")
    said = pipe("verify").stdout
    assert said.count("damage: ") == 2
    assert "... and 3 more" in said
    assert len(json.loads(pipe("verify", "--json").stdout)["findings"]) == 5


def test_an_unfinished_shard_is_exit_0_and_said(cached: Path) -> None:
    (cached / "state" / "c" / "1").unlink()
    done = pipe("verify")
    assert done.exit_code == 0
    assert "unfinished: state/c/1 (shard 1)" in done.stdout
    assert "sound, 1 shards unfinished" in done.stdout


def test_a_cache_of_another_manifest_is_damage(cached: Path) -> None:
    place = Workspace(cached.parent).manifest
    metadata, table = read_manifest(place).metadata, pq.read_table(place)
    keys = ["other", *table.column("key").to_pylist()[1:]]
    write_manifest(place, table.set_column(table.schema.get_field_index("key"), "key", [keys]), metadata)
    done = pipe("verify")
    assert done.exit_code == 1
    assert "its fingerprint does not fit" in done.stdout


def test_no_cache_is_one_line(tmp_path: Path) -> None:
    done = pipe("verify", str(tmp_path / "nothing"))
    assert done.exit_code == 1
    assert done.stderr.count("error: ") == 1
    assert "there is no teacher cache" in done.stderr


# ---- repair ----------------------------------------------------------------------------------------------------------


def test_a_repair_extracts_the_damaged_shards_alone_and_gives_back_every_byte(cached: Path) -> None:
    before = store_bytes(cached)
    untouched = {file: file.stat().st_mtime_ns for file in cached.rglob("c/0/**/*") if file.is_file()}
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    (cached / "global" / "c" / "4" / "0").write_bytes(b"")
    flip(cached / "state" / "c" / "5")
    (cached / "state" / "c" / "3").unlink()  # unfinished: a repair leaves it alone
    done = pipe("verify", "--repair")
    assert done.exit_code == 0, done.output
    assert "repaired: 3 shards were extracted again, read once more and found sound" in done.stdout
    missing = {"state/c/3"}
    assert {name: data for name, data in before.items() if name not in missing} == store_bytes(cached)
    assert untouched == {file: file.stat().st_mtime_ns for file in untouched}
    extract_teacher.run(load_config(cached.parents[1] / "pipe.yaml"))
    assert store_bytes(cached) == before


def test_a_repair_with_json_says_what_was_and_what_is(cached: Path) -> None:
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    done = pipe("verify", "--repair", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (found["damaged_shards"], found["repair"]["shards"]) == ([2], [2])
    assert found["repair"]["after"]["sound"] is True


def test_a_repair_with_another_teacher_is_refused_before_anything_is_given_up(cached: Path) -> None:
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    damaged = store_bytes(cached)
    done = pipe("verify", "--repair", "--set", "teacher.seed=7")
    assert done.exit_code == 1
    assert "the cache there is of something else" in done.stderr
    assert store_bytes(cached) == damaged


def test_damaged_metadata_is_not_repaired_and_says_what_to_do(cached: Path) -> None:
    flip(cached / "fine_basis" / "c" / "0" / "0")
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    damaged = store_bytes(cached)
    done = pipe("verify", "--repair")
    assert done.exit_code == 1
    assert "fine_basis/c/0/0: the checksum does not fit; restore it from a copy" in done.stdout
    assert "not repaired" in done.stdout
    assert store_bytes(cached) == damaged


def test_a_stray_file_does_not_stop_a_repair_but_remains_damage(cached: Path) -> None:
    (cached / "notes.txt").write_text("mine")
    flip(cached / "fine" / "c" / "2" / "0" / "0")
    done = pipe("verify", "--repair")
    assert done.exit_code == 1
    assert "stray: notes.txt" in done.stdout
    assert "checksums" not in done.stdout.split("repaired")[1]


def test_a_shard_that_was_copied_in_part_is_repaired_whole_and_says_so(cached: Path) -> None:
    assert pipe("copy", "copy.zarr", "--rows", "16-18").exit_code == 0
    flip(Path("copy.zarr/fine/c/2/0/0"))
    done = pipe("verify", "copy.zarr", "--repair", "--config", "pipe.yaml")
    assert done.exit_code == 0, done.output
    assert "5 rows of these shards that were absent are there now" in done.stdout
    assert np.flatnonzero(open_cache("copy.zarr").state()).tolist() == list(range(16, 24))


def test_a_repair_that_is_stopped_says_what_goes_on(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Stopped("extraction with 40 rows")

    flip(cached / "fine" / "c" / "2" / "0" / "0")
    monkeypatch.setattr("pipeline.teacher.extract.extract", stopped)
    done = pipe("verify", "--repair")
    assert done.exit_code == cli.RESUMABLE
    assert "pipe extract-teacher goes on from here" in done.stderr
    again = pipe("verify")
    assert again.exit_code == 0
    assert "unfinished: state/c/2" in again.stdout


def test_a_repair_needs_a_config(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe.yaml").unlink()
    assert "pipe init" in pipe("verify", str(cached), "--repair").stderr
    with pytest.raises(PipeError, match="--config"):
        stage.verify(cached, None, repair=True)


# ---- info, stats, copy -----------------------------------------------------------------------------------------------


def test_info_and_stats_as_text_and_as_json(cached: Path) -> None:
    info = json.loads(pipe("info", "--json").stdout)
    assert info["rows"] == {"all": ROWS, "ok": ROWS, "undecodable": 0, "absent": 0}
    assert info["manifest"]["matches"] is True
    said = pipe("info", str(cached)).stdout
    assert "48: 48 ok" in said
    assert f"{info['fidelity']['fine']['cosine_mean']:.4f}" in said
    stats = json.loads(pipe("stats", "--rows", "5", "--json").stdout)
    assert (stats["rows"], stats["of"]) == (5, ROWS)
    assert "share of the energy" in pipe("stats").stdout


@pytest.mark.parametrize("choice", [["--rows", "3-9,47"], ["--rows-file", "rows.txt"], ["--split", "val"]])
def test_a_copy_of_some_rows_serves_the_same_manifest(cached: Path, tmp_path: Path, choice: list[str]) -> None:
    (tmp_path / "rows.txt").write_text("3\n\n47\n4\n")
    manifest = read_manifest(Workspace(cached.parent).manifest)
    val = manifest.rows("val").tolist()
    expected = {"--rows": [*range(3, 10), 47], "--rows-file": [3, 4, 47], "--split": val}[choice[0]]
    done = pipe("copy", "copy.zarr", *choice)
    assert done.exit_code == 0, done.output
    assert np.flatnonzero(open_cache("copy.zarr").state()).tolist() == expected
    assert pipe("verify", "copy.zarr").exit_code == 0


def test_training_reads_a_copy_with_rows_cached(cached: Path, tmp_path: Path) -> None:
    assert pipe("copy", "copy.zarr", "--rows", "0-19").exit_code == 0
    shutil.rmtree(cached)
    (tmp_path / "copy.zarr").rename(cached)
    config = load_config(tmp_path / "pipe.yaml", sets=["data.rows=cached"])
    data = train_data.open_data(Workspace(cached.parent), config)
    usable = read_manifest(Workspace(cached.parent).manifest).rows("train")
    assert data.train_rows.tolist() == [row for row in usable if row < 20]


@pytest.mark.parametrize(
    ("arguments", "clause"),
    [
        (["--rows", "9-3"], "A-B"),
        (["--rows", "x"], "A-B"),
        (["--rows", "0-99"], "rows 0 to 47"),
        (["--rows", "0-3", "--split", "val"], "more than one choice"),
        (["--rows-file", "rows.txt"], "line 2 is not a row number"),
        (["--rows-file", "nothing.txt"], "cannot read the list"),
        (["--split", "test"], "no such split"),
        (["--scales", "fine,huge"], "no scale huge; the cache has fine, mid"),
        (["--views", "crop1"], "no view crop1; the cache has no further views"),
        (["--compress", "gzip"], "blosc has levels"),
        (["--compress", "zstd", "--level", "0"], "no codec zstd of level 0"),
        (["--level", "3"], "--compress"),
    ],
)
def test_what_cannot_be_copied_is_one_line(cached: Path, tmp_path: Path, arguments: list[str], clause: str) -> None:
    (tmp_path / "rows.txt").write_text("3\nfour\n")
    done = pipe("copy", "copy.zarr", *arguments)
    assert done.exit_code == 1
    assert done.stderr.count("error: ") == 1
    assert clause in done.stderr
    assert not (tmp_path / "copy.zarr").exists()


@pytest.mark.parametrize("options", [["blosc"], ["zstd", "--level", "9"]])
def test_a_compressed_copy_is_read_verified_and_not_repaired(cached: Path, options: list[str]) -> None:
    done = pipe("copy", "copy.zarr", "--rows", "3-30", "--scales", "mid", "--compress", *options)
    assert done.exit_code == 0, done.output
    cache, source = open_cache("copy.zarr"), open_cache(cached)
    assert (cache.plain, cache.rows) == (False, ROWS)
    np.testing.assert_array_equal(cache.read_raw([30, 3])["mid"], source.read_raw([30, 3])["mid"])
    sharding = json.loads(Path("copy.zarr/mid/zarr.json").read_text())["codecs"][0]["configuration"]
    assert sharding["codecs"][1]["name"] == options[0]
    assert 9 in sharding["codecs"][1]["configuration"].values() or options == ["blosc"]
    assert "note            a compressed copy" in pipe("verify", "copy.zarr").stdout
    assert "encoded otherwise" in pipe("info", "copy.zarr").stdout
    assert pipe("stats", "copy.zarr").exit_code == 0
    flip(Path("copy.zarr/mid/c/2/0/0"))
    done = pipe("verify", "copy.zarr")
    assert done.exit_code == 1
    assert "damage: mid/c/2/0/0 (shard 2): damaged rows; 1 row: 16" in done.stdout
    assert "--repair" not in done.stdout
    damaged = store_bytes(Path("copy.zarr"))
    done = pipe("verify", "copy.zarr", "--repair", "--config", "pipe.yaml")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "which is not repaired, copy.zarr; copy it again from the plain one" in done.stderr
    assert store_bytes(Path("copy.zarr")) == damaged


def test_a_url_is_a_cache_too(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "cache"))
    with importlib.import_module("file_server").serve(cached.parent) as server:
        url = f"{server.url}/teacher.zarr"
        assert pipe("info", url).stdout.splitlines()[0] == f"cache      {url}"
        assert json.loads(pipe("stats", url, "--rows", "5", "--json").stdout)["rows"] == 5
        assert "sound" in pipe("verify", url).stdout
        assert "the same rows" in pipe("verify", url, "--config", "pipe.yaml").stdout
        assert "a remote cache is not repaired from here" in pipe("verify", url, "--repair").stderr
        done = pipe("copy", "copy.zarr", "--from", url, "--rows", "0-9")
        assert done.exit_code == 0, done.output
        assert np.flatnonzero(open_cache("copy.zarr").state()).tolist() == list(range(10))
        server.status = 500
        done = pipe("verify", url)
    assert (done.exit_code, done.stderr.count("error: ")) == (1, 1)
    assert "500" in done.stderr


def test_views_are_extracted_verified_repaired_and_chosen(tiny_stage_one: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_stage_one / "workspace", tmp_path / "workspace")
    text = (tiny_stage_one / "pipe.yaml").read_text()
    (tmp_path / "pipe.yaml").write_text(text)
    shutil.rmtree(tmp_path / "workspace" / "teacher.zarr")
    sets = ["--config", str(tmp_path / "pipe.yaml"), "--set", "teacher.views=[{name: crop1}, {name: crop2, flip: 1}]"]
    config = load_config(tmp_path / "pipe.yaml", sets=[f"workspace={tmp_path / 'workspace'}", sets[-1]])
    extract_teacher.run(config)
    sets += ["--set", f"workspace={tmp_path / 'workspace'}"]
    cache = Workspace(config.workspace).teacher
    before = store_bytes(cache)
    assert "sound" in pipe("verify", *sets).stdout
    geometry = cache / "views/crop1/geometry/c/0/0"
    flip(geometry)
    done = pipe("verify", *sets, "--repair")
    assert done.exit_code == 0, done.output
    assert store_bytes(cache) == before
    assert json.loads(pipe("stats", *sets, "--view", "crop2", "--json").stdout)["geometry"]["mirrored"] == 1
    assert "view       crop2: " in pipe("info", *sets).stdout
    for names, kept in (("crop2", ["crop2"]), ("none", [])):
        copy = tmp_path / f"{names}.zarr"
        assert pipe("copy", str(copy), *sets, "--views", names).exit_code == 0
        assert open_cache(copy).views == kept


def test_an_existing_copy_is_left_alone(cached: Path, tmp_path: Path) -> None:
    assert pipe("copy", "copy.zarr", "--scales", "mid").exit_code == 0
    before = store_bytes(tmp_path / "copy.zarr")
    assert [scale.name for scale in open_cache("copy.zarr").scales] == ["mid"]
    assert [scale["name"] for scale in open_cache("copy.zarr").teacher["scales"]] == ["mid"]
    assert "something already" in pipe("copy", "copy.zarr").stderr
    assert store_bytes(tmp_path / "copy.zarr") == before


@pytest.mark.parametrize("command", ["info", "verify", "stats", "copy"])
def test_every_command_has_help_without_a_config(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = pipe(command, "--help")
    assert done.exit_code == 0
    assert "--debug" in done.output
