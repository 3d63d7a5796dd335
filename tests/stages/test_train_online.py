"""`pipe train` with the teacher in the loop: the run that a cache would have given, and what cannot be had."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from train_runs import losses, run

from pipeline.config import load_config
from pipeline.errors import PipeError
from pipeline.models.cost import teacher_flops
from pipeline.run_folder import Workspace, read_json
from stages import extract_teacher, train_data, train_setup

ONLINE = "teacher.online=true"
SHORT = ["train.max_steps=2", "train.validate_every=2"]


def test_an_online_run_is_the_cached_one_even_where_the_cache_holds_no_row(folder):
    cached = run(folder, name="cached", sets=SHORT)
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    with pytest.raises(PipeError, match="pipe extract-teacher"):
        run(folder, sets=[*SHORT, ONLINE])
    extract_teacher.run(load_config(folder / "pipe.yaml"), limit=1)  # its calibration, and a single row
    online = run(folder, name="online", sets=[*SHORT, ONLINE])
    np.testing.assert_array_equal(losses(online), losses(cached))
    a, b = read_json(online.record), read_json(cached.record)
    assert (a["teacher_online"], b["teacher_online"]) == (True, False)
    assert a["cache"] == b["cache"]
    network = extract_teacher.load(load_config(folder / "pipe.yaml"))
    assert a["flops_per_sample"] - b["flops_per_sample"] == teacher_flops(network) > 0


def test_permuted_targets_and_a_teacher_in_the_loop_exclude_each_other(folder):
    with pytest.raises(PipeError, match=r"teacher\.online and data\.permute_targets .* exclude each other"):
        run(folder, sets=[ONLINE], **{"model.fusion": "shuffled-cache"})


@pytest.mark.parametrize("flags", [{"train.method": "clip"}, {"model.fusion": "no-distill"}], ids=str)
def test_where_nothing_is_distilled_no_teacher_is_loaded(folder, monkeypatch, flags):
    monkeypatch.setattr(extract_teacher, "load", None)
    config = load_config(folder / "pipe.yaml", flags=flags, sets=[ONLINE])
    workspace = Workspace(config.workspace)
    session = train_setup.prepare(config, train_data.open_data(workspace, config), workspace.run("any"))
    assert session.teacher is None
    assert session.with_targets([1, 2]) == [1, 2]
