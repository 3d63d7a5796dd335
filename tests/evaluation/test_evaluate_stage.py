"""`pipe evaluate` with real, tiny models: from run folders to records on disk, and its errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from colour_world import write_colours

from pipeline.config import load_config
from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError
from pipeline.evaluation.records import read_records
from pipeline.models.dinorankclip import load, save
from pipeline.run_folder import RunFolder, Workspace, read_json, sha256_file, write_json
from stages import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

SUITE = [
    {"name": "colours", "kind": "zero_shot", "path": "colours"},
    {"name": "colours", "kind": "probe", "path": "colours"},
    {"name": "birds", "kind": "probe", "path": "birds", "obtain": "ask around"},
]


def write_run(folder: RunFolder, *, injected: bool, finished: bool = True) -> None:
    from small_runs import small_model

    folder.path.mkdir(parents=True)
    save(small_model(injected=injected, seed=len(folder.name)), folder.weights, view="crop")
    method = {"method": "dinorankclip", "order": 3, "fusion": "full"}
    record = method if injected else {"method": "clip", "order": 0, "fusion": "none"}
    checkpoint = {"checkpoint_sha256": sha256_file(folder.weights), "samples_seen": 48, "cache": None, "seed": 0}
    write_json(folder.record, {"name": folder.name, "finished": finished, **record, **checkpoint})


@pytest.fixture
def workspace(tmp_path: Path, tiny_tars: Path) -> Workspace:
    """A manifest with validation rows, a plain run, an injected one and an unfinished one; pipe.yaml beside it."""
    made = Workspace(tmp_path / "workspace")
    build_manifest(str(tiny_tars), made.manifest, val_fraction=0.4, workers=1)
    write_run(made.run("clip"), injected=False)
    write_run(made.run("order3"), injected=True)
    write_run(made.run("running"), injected=False, finished=False)
    write_colours(tmp_path / "data" / "colours", {"train": 30, "test": 12})
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"entries": SUITE}))
    (tmp_path / "pipe.yaml").write_text(
        yaml.safe_dump(
            {
                "workspace": "workspace",
                "data": {"workers": 1},
                "evaluate": {"batch_size": 16},
                "teacher": {
                    "name": "vit_small_patch16_dinov3_qkvb",
                    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
                    "random_weights": True,
                    "image_size": 32,
                    "scales": [{"name": "fine", "layer": -1, "grid": 4}],
                },
            }
        )
    )
    return made


def config(workspace: Workspace, **evaluate_section):
    sets = [f"evaluate.{key}={value}" for key, value in evaluate_section.items()]
    return load_config(workspace.root.parent / "pipe.yaml", sets=sets)


def on_datasets(workspace: Workspace):
    folder = workspace.root.parent
    return config(workspace, datasets=folder / "data", suite=folder / "suite.yaml")


def test_with_nothing_configured_all_finished_runs_are_measured_on_validation_rows(workspace, capsys):
    evaluate.run(config(workspace), [], False)
    records = read_records(workspace.report / "records.json")
    assert {r.benchmark for r in records} == {"validation"}
    assert {r.run for r in records} == {"clip", "order3", "chance"}
    nodes = {run: {r.node for r in records if r.run == run and "recall@1" in r.metric} for run in ("clip", "order3")}
    assert nodes == {"clip": {"trunk"}, "order3": {"trunk", "student", "fused", "gated"}}
    found = {(r.run, r.node, r.metric): r for r in records}
    assert found["order3", "gated", "drift/gamma_image"].value == pytest.approx(0.3)
    slope, difference = (found["order3", "gated", f"drift/{k}"].value for k in ("slope", "finite_difference"))
    assert difference == pytest.approx(slope, rel=1e-2, abs=1e-6)
    assert 0 < found["order3", "gated", "gate/text_mean"].value < 1
    assert found["clip", "trunk", "retrieval/i2t_recall@1"].checkpoint_sha256 == sha256_file(
        workspace.run("clip").weights
    )
    assert "order3" in capsys.readouterr().out


def trained_on(workspace: Workspace, name: str) -> None:
    """Say in a run's record that it was trained on the manifest as it is."""
    manifest = read_manifest(workspace.manifest)
    data = {"rows": len(manifest), "manifest_fingerprint": manifest.fingerprint()}
    record = read_json(workspace.run(name).record)
    write_json(workspace.run(name).record, record | {"data": data | {"split_sha256": manifest.split_sha256()}})


def test_validation_rows_that_a_run_was_trained_on_are_refused(workspace, tiny_tars, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(evaluate.log, "warning", lambda text, *values: said.append(text % values))
    chosen = [workspace.run("clip")]
    evaluate.refuse_trained_rows(workspace, chosen)
    assert "another manifest" in said.pop()  # its record does not say which
    trained_on(workspace, "clip")
    evaluate.refuse_trained_rows(workspace, chosen)
    shutil.copy(tiny_tars / "00000.tar", tiny_tars / "00002.tar")
    build_manifest(str(tiny_tars), workspace.manifest, val_fraction=0.4, workers=1)  # grown: the old rows keep theirs
    evaluate.refuse_trained_rows(workspace, chosen)
    assert not said
    workspace.manifest.unlink()
    build_manifest(str(tiny_tars), workspace.manifest, val_fraction=0.8, workers=1)
    with pytest.raises(PipeError, match=r"run clip was trained on rows that are validation rows now"):
        evaluate.refuse_trained_rows(workspace, chosen)


@pytest.mark.parametrize("text", ["{broken", "[]"])
def test_a_broken_record_of_one_run_does_not_keep_others_from_being_measured(workspace, text):
    workspace.run("running").record.write_text(text)
    assert [folder.name for folder in evaluate.choose_runs(workspace, [])] == ["clip", "order3"]
    assert [folder.name for folder in evaluate.choose_runs(workspace, ["clip"])] == ["clip"]
    with pytest.raises(PipeError, match="run running is not finished"):
        evaluate.choose_runs(workspace, ["running"])


def test_a_second_evaluation_loads_nothing_and_writes_the_same_bytes(workspace, monkeypatch, capsys):
    def snapshot() -> dict[str, bytes]:
        files = [workspace.report / "records.json", *sorted((workspace.report / "tables").glob("*"))]
        return {file.name: file.read_bytes() for file in files}

    evaluate.run(on_datasets(workspace), ["order3", "clip"], False)
    first, shown = snapshot(), capsys.readouterr().out
    monkeypatch.setattr("pipeline.evaluation.subjects.load", lambda *_: pytest.fail("a run was loaded"))
    monkeypatch.setattr("pipeline.evaluation.subjects.load_teacher", lambda *_, **__: pytest.fail("teacher loaded"))
    evaluate.run(on_datasets(workspace), ["order3", "clip"], False)
    assert snapshot() == first
    assert capsys.readouterr().out == shown


def test_a_suite_is_measured_with_the_teacher_as_reference_and_gaps_named(workspace, capsys, monkeypatch, caplog):
    monkeypatch.setattr("pipeline.console.log.propagate", True)
    evaluate.run(on_datasets(workspace), ["order3"], True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((workspace.report / "records.json").read_text())
    teacher = [r for r in printed if r["run"] == "teacher"]
    assert {(r["node"], r["metric"]) for r in teacher} == {
        ("global", "probe/top1"),
        ("global", "probe/mean_per_class"),
    }
    probed = {r["node"] for r in printed if r["run"] == "order3" and r["metric"] == "probe/top1"}
    assert probed == {"trunk", "student", "fused", "gated"}
    assert "not measured: birds (probe): no folder birds. To obtain it: ask around" in caplog.text


def test_the_nodes_of_each_side_are_those_of_the_pair_and_gated_is_the_output(workspace):
    from pipeline.evaluation.model_nodes import image_nodes, text_nodes

    model, _, tokenizer = load(workspace.run("order3").path)
    model.eval()
    images, tokens = torch.randn(5, 3, 32, 32), tokenizer([f"a {k} thing" for k in range(5)])
    with torch.inference_mode():
        both = model.nodes(images, tokens)
        one = image_nodes(model, images)
        other = text_nodes(model, tokens)
        output = model.encode_image(images), model.encode_text(tokens)
    assert set(one) == set(other) == set(both) == {"trunk", "student", "fused", "gated"}
    for node, (image, text) in both.items():
        torch.testing.assert_close(one[node], image, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other[node], text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one["gated"], output[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other["gated"], output[1], atol=1e-5, rtol=1e-4)


def test_a_run_that_is_not_there_names_the_nearest(workspace):
    with pytest.raises(PipeError, match=r"no run 'order33'.*the nearest is order3; there are clip, order3"):
        evaluate.run(config(workspace), ["order33"], False)


def test_an_unfinished_run_says_so(workspace):
    with pytest.raises(PipeError, match="run running is not finished"):
        evaluate.run(config(workspace), ["running"], False)


def test_no_run_at_all_is_one_clear_error(tmp_path):
    (tmp_path / "pipe.yaml").write_text("workspace: workspace\n")
    with pytest.raises(PipeError, match=r"no finished run.*pipe train"):
        evaluate.run(load_config(tmp_path / "pipe.yaml"), [], False)


def test_a_folder_without_any_benchmark_of_the_suite_is_an_error(workspace, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipeError, match="none of the suite's 3 benchmarks is there"):
        evaluate.run(config(workspace, datasets=tmp_path / "empty", suite=tmp_path / "suite.yaml"), [], False)


def test_weights_that_the_run_did_not_write_are_refused(workspace):
    folder = workspace.run("clip")
    write_json(folder.record, {**json.loads(folder.record.read_text()), "checkpoint_sha256": "0" * 64})
    with pytest.raises(PipeError, match=r"model.safetensors is not the one this run wrote"):
        evaluate.run(config(workspace), ["clip"], False)


def test_an_unknown_suite_names_those_there_are(workspace):
    with pytest.raises(PipeError, match=r"no suite 'fulll'"):
        evaluate.run(config(workspace, datasets=workspace.root, suite="fulll"), ["clip"], False)
