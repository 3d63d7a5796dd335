"""`pipe export`: a run becomes a folder that loads anywhere, says what it knows, and nothing of where it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from small_runs import write_run
from typer.testing import CliRunner

from pipeline.errors import PipeError
from pipeline.evaluation.records import Record, write_records
from pipeline.models.dinorankclip import load
from pipeline.run_folder import RunFolder, Workspace, read_json, sha256_file, write_json
from stages import cli, export
from stages.which_model import choose_runs, find_model


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "workspace" / "runs" / "first")


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a README.md."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_folder_alone_loads_to_the_same_bits(run: RunFolder, tmp_path: Path) -> None:
    images, texts = torch.randn(3, 3, 32, 32), ["a red square", "x", "left"]
    model, preprocess, tokenizer = load(run.path)
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(tokenizer(texts))
    export.run(None, str(run.path), out=tmp_path / "out")
    shutil.rmtree(tmp_path / "workspace")
    model, again, tokenizer = load(tmp_path / "out")
    assert again == preprocess
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), expected[0])
        assert torch.equal(model.encode_text(tokenizer(texts)), expected[1])


def test_config_json_says_what_the_run_recorded_and_nothing_of_the_machine(run: RunFolder, tmp_path: Path) -> None:
    export.run(None, str(run.path), out=tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    model, preprocess, _ = load(run.path)
    assert config["arguments"] == model.arguments
    assert config["preprocess"] == preprocess.to_json()
    assert config["tokenizer"]["context_length"] == 16
    assert (config["method"], config["order"], config["fusion"], config["seed"]) == ("dinorankclip", 3, "full", 0)
    assert (config["training"]["samples_seen"], config["training"]["batch_size"]) == (48, 8)
    assert config["training"]["machine"] is None  # the run did not say
    assert config["weights"]["sha256"] == sha256_file(tmp_path / "out" / "model.safetensors")
    assert config["teacher"]["name"] == "hf:dinov3-vits16"
    for file in (tmp_path / "out").glob("*.[jm]*"):
        assert "secret" not in file.read_text(encoding="utf-8"), file.name


def test_the_card_counts_what_was_recorded_and_leaves_open_what_was_not(run: RunFolder, tmp_path: Path) -> None:
    export.run(None, str(run.path), out=tmp_path / "out")
    front, body = card(tmp_path / "out")
    assert front["license"] == "other"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert "| training rows: an image and its captions | 43 |" in body
    assert "| pairs seen | 48 |" in body
    assert "| time | not recorded |" in body
    assert "| precision | float32 |" in body
    assert "`hf:dinov3-vits16`" in body
    assert f"| started from | trained weights: clip.safetensors, SHA-256 {'e' * 64} |" in body
    assert "None: this checkpoint was not evaluated" in body
    assert "TO FILL IN" in body


def record_of(run: str, sha256: str, metric: str, value: float, node: str = "gated") -> Record:
    return Record(
        run=run,
        method="dinorankclip",
        order=3,
        fusion="full",
        seed=0,
        benchmark="flickr",
        split="test",
        node=node,
        metric=metric,
        value=value,
        low=value - 0.01,
        high=value + 0.01,
        n=1000,
        cache=None,
        samples_seen=48,
        checkpoint_sha256=sha256,
        dataset_sha256="d",
        code_version="0",
    )


def test_results_of_this_checkpoint_stand_in_the_card_with_their_interval(run: RunFolder, tmp_path: Path) -> None:
    own, metric = sha256_file(run.weights), "retrieval/i2t_recall@1"
    report = Workspace(tmp_path / "workspace").report / "records.json"
    others = [record_of("other", own, metric, 0.9), record_of("first", own, "nodes/gap", 0.7)]
    others += [
        record_of("first", own, f"{metric}:vs:clip-top1", 0.6),
        record_of("first", own, metric, 0.5, node="trunk"),
    ]
    write_records(report, [record_of("first", own, metric, 0.125), *others])
    export.run(None, str(run.path), out=tmp_path / "out")
    rows = [line for line in card(tmp_path / "out")[1].splitlines() if line.startswith("| flickr")]
    assert rows == [f"| flickr | test | {metric} | 12.5 | 11.5 to 13.5 | 1,000 |"]
    export.run(None, str(run.path), out=tmp_path / "trunk", trunk=True)
    rows = [line for line in card(tmp_path / "trunk")[1].splitlines() if line.startswith("| flickr")]
    assert rows == [f"| flickr | test | {metric} | 50.0 | 49.0 to 51.0 | 1,000 |"]
    write_records(report, [record_of("first", "another", metric, 0.125)])
    export.run(None, str(run.path), out=tmp_path / "out", overwrite=True)
    assert "another checkpoint of this run's name" in card(tmp_path / "out")[1]


def test_an_export_is_itself_exported_and_chosen_by_its_path(run: RunFolder, tmp_path: Path) -> None:
    export.run(None, str(run.path), out=tmp_path / "half", dtype="bfloat16")
    assert "stored in bfloat16" in card(tmp_path / "half")[1]
    export.run(None, str(tmp_path / "half"), out=tmp_path / "again")
    first, second = (read_json(tmp_path / name / "config.json") for name in ("half", "again"))
    assert {**second, "weights": 0} == {**first, "weights": 0}
    workspace = Workspace(tmp_path / "workspace")
    chosen = choose_runs(workspace, ["first", str(tmp_path / "half")])
    assert [folder.name for folder in chosen] == ["first", "half"]
    assert read_json(chosen[1].record)["checkpoint_sha256"] == sha256_file(chosen[1].weights)
    shutil.copytree(tmp_path / "half", tmp_path / "elsewhere" / "first")
    with pytest.raises(PipeError, match="called first"):
        choose_runs(workspace, ["first", str(tmp_path / "elsewhere" / "first")])


def test_a_trunk_is_a_folder_of_open_clips_own(run: RunFolder, tmp_path: Path) -> None:
    export.run(None, str(run.path), out=tmp_path / "trunk", trunk=True)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'trunk'}")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = load(run.path)[0].trunk.encode_image(images)
        assert torch.equal(theirs.eval().encode_image(images, normalize=True), ours)
    front, body = card(tmp_path / "trunk")
    assert front["library_name"] == "open_clip"
    assert "much worse than a plain CLIP" in body
    with pytest.raises(PipeError, match=r"no trained model.*open_clip"):
        find_model(str(tmp_path / "trunk"), None)


def test_what_cannot_be_exported_is_one_line(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unfinished = write_run(tmp_path / "running", injected=False, finished=False)
    with pytest.raises(PipeError, match="run running is not finished"):
        export.run(None, str(unfinished.path))
    with pytest.raises(PipeError, match="no such folder"):
        export.run(None, "./nothing")
    with pytest.raises(PipeError, match=r"no config says in which workspace run 'nothing' is"):
        export.run(None, "nothing")
    write_json(run.record, read_json(run.record) | {"checkpoint_sha256": "0" * 64})
    with pytest.raises(PipeError, match="not the one this run wrote"):
        export.run(None, str(run.path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PipeError, match="needs a login"):
        export.run(None, str(run.path), hub="me/first")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["running", "workspace"]


def test_the_command_finds_a_run_by_name_and_needs_no_config_for_a_path(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["export", str(run.path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == "first-export"
    Path("pipe.yaml").write_text("workspace: workspace\n")
    done = CliRunner().invoke(cli.app, ["export", "first", "--trunk"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "workspace" / "exports" / "first-trunk" / "open_clip_config.json").exists()
    done = CliRunner().invoke(cli.app, ["export", "frist"])
    assert done.exit_code == 1
    assert "the nearest is first" in done.output
