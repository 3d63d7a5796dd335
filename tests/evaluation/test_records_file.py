"""Records: the file's bytes, its errors, provenance."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from pipeline.errors import PipeError
from pipeline.evaluation.records import (
    Measurement,
    Provenance,
    Record,
    headline_node,
    read_records,
    stamp,
    to_json,
    write_records,
)

PUBLISHED = (
    "run method order fusion seed benchmark split node metric value low high n cache samples_seen "
    "checkpoint_sha256 dataset_sha256 code_version"
)


def records() -> list[Record]:
    found = [
        Measurement("retrieval/i2t_recall@1", "gated", "test", 0.25, 0.2, 0.3, 40),
        Measurement("drift/slope", "gated", "test", -1.5e-7, None, None, 40),
    ]
    provenance = Provenance("é-run", "dinorankclip", 3, "full", 1, None, 512, "ab")
    return stamp(found, provenance, benchmark="flickr8k", dataset_sha256="cd", code_version="0.1")


def test_a_record_has_the_published_fields():
    assert [f.name for f in fields(Record)] == PUBLISHED.split()
    assert set(json.loads(to_json(records()))[0]) == set(PUBLISHED.split())


def test_a_file_reads_back_as_what_was_written(tmp_path):
    write_records(tmp_path / "records.json", records())
    assert sorted(read_records(tmp_path / "records.json"), key=Record.sort_key) == sorted(
        records(), key=Record.sort_key
    )


def test_the_order_of_records_does_not_change_the_bytes():
    assert to_json(records()) == to_json(records()[::-1])
    assert to_json(records()).endswith("]\n")


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"run": "a"}]'])
def test_another_files_content_is_one_clear_error(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(PipeError, match="not a list of result records"):
        read_records(tmp_path / "r.json")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_refused_by_name(bad):
    found = [Measurement("nodes/gap", "trunk", "test", bad, None, None, 4)]
    with pytest.raises(PipeError, match=r"nodes/gap is not a finite number .*run r, coco/test, node trunk"):
        stamp(found, Provenance("r", "clip"), benchmark="coco", dataset_sha256="", code_version="")


def test_provenance_takes_from_a_runs_record_what_it_knows():
    record = {
        "method": "clip",
        "order": 0,
        "fusion": "none",
        "seed": 7,
        "samples_seen": 5,
        "cache": None,
        "machine": "x",
    }
    assert Provenance.of_run("a", record) == Provenance("a", "clip", 0, "none", 7, None, 5, None)


def test_the_headline_is_the_output_of_each_kind_of_run():
    assert headline_node({"trunk", "gated", "student"}) == "gated"
    assert headline_node({"trunk"}) == "trunk"
    assert headline_node({"global"}) == "global"
