"""cache_layout.md says what is on disk: its example runs, its metadata is the code's, its tables name what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import layout
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import index_bytes

PAGE = Path(__file__).resolve().parents[2] / "cache_layout.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def block(page: str, language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("row", [0, 2, 4, 19])
def test_the_example_reads_what_the_reader_reads(page: str, whole_store: Path, row: int) -> None:
    code = block(page, "python").replace("workspace/teacher.zarr", str(whole_store))
    code = code.replace('"fine", 0\n', f'"fine", {row}\n')
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["row"] == row
    np.testing.assert_array_equal(names["coefficients"], open_cache(whole_store).read([row])["fine"][0])


def test_the_example_refuses_a_row_without_features(page: str, whole_store: Path) -> None:
    code = (
        block(page, "python").replace("workspace/teacher.zarr", str(whole_store)).replace('"fine", 0\n', '"fine", 3\n')
    )
    with pytest.raises(AssertionError, match="no features"):
        exec(compile(code, str(PAGE), "exec"), {})


def test_the_metadata_on_the_page_is_what_the_writer_writes(page: str) -> None:
    scale = layout.ScaleInfo("fine", -1, 14, 256, "int8", 768, 1.0)
    array = layout.row_arrays([scale], 768)[0]
    assert json.loads(block(page, "json")) == layout.row_array_document(array, 3000, 512)


def test_the_table_names_every_array_with_its_type_and_axes(page: str, whole_store: Path) -> None:
    rows = re.findall(
        r"^\| `(\w+)`(?: \((?:dtype `(\w+)`|absent without PCA)\))? \| (\(.*?\)) \| ([^|]*) \|", page, re.M
    )
    cache = open_cache(whole_store)
    dtypes = {scale.name: scale.dtype for scale in cache.scales}
    expected = {}
    for name, only, shape, types in rows:
        for scale, dtype in dtypes.items() if "NAME" in name else [("", "")]:
            if only in ("", dtype):
                expected[name.replace("NAME", scale)] = (shape.count(",") + (not shape.endswith(",)")), types)
    found = {file.parent.name: json.loads(file.read_text()) for file in whole_store.glob("*/zarr.json")}
    assert set(found) == set(expected) - {"raw_basis"}
    for name, document in found.items():
        axes, types = expected[name]
        assert len(document["shape"]) == axes, name
        assert document["data_type"] in types, name


def test_every_attribute_is_on_the_page(page: str, whole_store: Path) -> None:
    attributes = json.loads((whole_store / "zarr.json").read_text())["attributes"]
    keys = [*attributes, *attributes["scales"][0], *attributes["fidelity"]["fine"], *attributes["baseline_losses"]]
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_shard_files_have_the_length_that_the_page_states(whole_store: Path) -> None:
    cache = open_cache(whole_store)
    for array in cache.arrays:
        for shard in range(cache.shards):
            present = int((cache.state()[shard * 8 : (shard + 1) * 8] == layout.OK).sum())
            expected = present * (array.row_bytes + 4) + 16 * 8 + 4
            assert array.file(whole_store, shard).stat().st_size == expected
    assert index_bytes(8) == 16 * 8 + 4


def test_the_digest_can_be_computed_from_the_page(whole_store: Path) -> None:
    import hashlib

    recorded = json.loads((whole_store / "digest.json").read_text())
    total = hashlib.sha256()
    for name in sorted(recorded["files"]):
        content = (whole_store / name).read_bytes()
        total.update(name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    assert total.hexdigest() == recorded["sha256"] == open_cache(whole_store).digest
    covered = {str(file.relative_to(whole_store)) for file in whole_store.rglob("zarr.json")}
    small = ("basis", "fine_steps", "_mean", "calibration_rows", "heldout_rows")
    covered |= {
        str(file.relative_to(whole_store))
        for array in whole_store.iterdir()
        if array.name.endswith(small)
        for file in array.glob("c/**/*")
        if file.is_file()
    }
    assert set(recorded["files"]) == covered
