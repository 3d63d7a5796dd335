"""Where the weights of an hf: teacher come from, what is refused, and that nothing in a folder is executed."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import MEAN, STD, TINY, dinov2, dinov3_vit, save, saved
from safetensors.torch import load_file
from tiny_teacher import SCALES, SIZE
from transformers import Dinov2Config, Dinov2ForImageClassification

from pipeline.errors import PipeError
from pipeline.teacher.huggingface_folder import asked_origin, label
from pipeline.teacher.teacher import Teacher, load_teacher

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(dinov3_vit(), tmp_path / "tiny-dinov3")


def load(name: object, **changes: Any) -> Teacher:
    return load_teacher(f"hf:{name}", **({"image_size": SIZE, "scales": SCALES} | changes))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        saved({k: v for k, v in load_file(folder / WEIGHTS).items() if k != name}, folder / WEIGHTS)

    return change


def with_tensor(name: str, shape: tuple[int, ...]) -> Callable[[Path], object]:
    return lambda folder: saved(load_file(folder / WEIGHTS) | {name: torch.zeros(shape)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("norm.weight"), r"do not fit DINOv3ViTModel \(1 missing: norm\.weight\)"),
        (with_tensor("extra.weight", (2,)), r"do not fit DINOv3ViTModel \(1 unexpected: extra\.weight\)"),
        (with_tensor("norm.weight", (3,)), r"of another shape: norm\.weight"),
        (lambda folder: edit(folder / CONFIG, num_register_tokens=0), r"of another shape: embeddings\.register_tokens"),
        (lambda folder: edit(folder / CONFIG, query_bias=False), r"4 unexpected: .*q_proj\.bias.*, \.\.\."),
        (lambda folder: edit(folder / CONFIG, model_type="llama"), r"'llama' are no teachers.*dinov3_vit"),
        (lambda folder: edit(folder / CONFIG, hidden_size="wide"), r"cannot use this configuration"),
        (lambda folder: edit(folder / CONFIG, model_type=["dinov3_vit"]), r"are no teachers"),
        (lambda folder: edit(folder / CONFIG, num_attention_heads=7), r"cannot use .*num_attention_heads is 7"),
        (lambda folder: edit(folder / CONFIG, num_channels=4), r"cannot use .*num_channels is 4"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), r"holds no model"),
        (lambda folder: (folder / CONFIG).write_text("{"), r"holds no model"),
        (lambda folder: (folder / CONFIG).write_text("[]"), r"holds no model"),
        (lambda folder: (folder / CONFIG).unlink(), r"holds no model.*save_pretrained"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"no model\*\.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x93 garbage" * 99), r"cannot load these weights"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), r"cannot load these"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), r"cannot read this file"),
    ],
)
def test_what_does_not_fit_is_refused_naming_it(folder: Path, damage: Callable[[Path], object], message: str):
    """The library itself would fill a missing tensor with random numbers, and only log it."""
    load(folder)
    damage(folder)
    with pytest.raises(PipeError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"patch_size": 0}, {"hidden_act": "nonsense"}, {"num_register_tokens": -1}])
def test_a_configuration_that_no_network_can_have_is_one_line(folder: Path, changes: dict[str, Any]):
    edit(folder / CONFIG, **changes)
    with pytest.raises(PipeError, match="cannot build this network"):
        load(folder, random_weights=True)


@pytest.mark.parametrize("mean", ["abc", 0.5, [0, 0], [0, 0, float("nan")], [0, 0, [0]], {"a": 0}])
def test_a_mean_that_is_no_three_numbers_is_refused(folder: Path, mean: Any):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [1, 1, 1]}))
    with pytest.raises(PipeError, match=r"teacher\.mean"):
        load(folder)


@pytest.mark.parametrize("std", [[0, 0, 0], [-1, 1, 1], [float("inf"), 1, 1]])
def test_pixels_are_not_divided_by_nothing(folder: Path, std: list[float]):
    """Whatever such features are, they are finite or become so on their way to the disk: nobody would notice."""
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0, 0], "image_std": std}))
    with pytest.raises(PipeError, match=r"std must be three finite numbers, all positive.*teacher\.std"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("/nowhere/at/all", {}, r"there is no such folder.*hf:/nowhere/at/all"),
        ("./nowhere", {}, r"there is no such folder"),
        ("nobody/nothing", {}, r"cannot get this model from the hub.*licence"),
        ("not a name", {}, r"cannot get this model from the hub"),
        ("nobody/nothing", {"checkpoint": "w.pth"}, r"teacher\.checkpoint is for timm"),
        ("nobody/nothing", {"model_args": {"depth": 2}}, r"teacher\.model_args are for timm"),
    ],
)
def test_what_is_not_there_is_one_line_and_quick(
    name: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(PipeError, match=message) as caught:
        load(name, **changes)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 3


def test_a_repository_in_the_hubs_cache_is_used_without_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    expected = load(folder)
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = load("someone/tiny")
    assert found.name == "hf:someone/tiny"
    assert found.weights_sha256 == expected.weights_sha256
    assert found.origin == expected.origin


def test_weights_in_several_files_are_the_same_weights(folder: Path, tmp_path: Path):
    dinov3_vit().save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert load(tmp_path / "parts", mean=MEAN, std=STD).weights_sha256 == load(folder).weights_sha256


def test_a_fine_tuned_classifier_lends_its_body(tmp_path: Path):
    sizes = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    model = Dinov2ForImageClassification(Dinov2Config(image_size=56, patch_size=14, num_labels=3, **sizes))
    body = dinov2(0, 56)
    model.dinov2.load_state_dict(body.state_dict())
    model.save_pretrained(tmp_path / "classifier")
    args = {"mean": MEAN, "std": STD, "image_size": 56}
    assert (
        load(tmp_path / "classifier", **args).weights_sha256 == load(save(body, tmp_path / "b"), **args).weights_sha256
    )


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sprung"),))


def test_nothing_in_a_folder_is_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (folder / "trap.py").write_text("from pathlib import Path\nPath('sprung').touch()\n\nclass Trap: ...\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(), protocol=2))
    edit(folder / CONFIG, auto_map={"AutoModel": "trap.Trap", "AutoConfig": "trap.Trap"})
    load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(PipeError, match="safetensors"):
        load(folder)
    edit(folder / CONFIG, model_type="trap")
    with pytest.raises(PipeError, match="no teachers"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


# ---- random weights --------------------------------------------------------------------------------------------------


def test_random_weights_need_no_more_than_a_configuration(folder: Path):
    (folder / WEIGHTS).unlink()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load(folder, random_weights=True, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert load(folder, random_weights=True, seed=1).weights_sha256 == first.weights_sha256
    assert load(folder, random_weights=True, seed=2).weights_sha256 != first.weights_sha256
    assert first.origin["origin"] == "random"


# ---- what a cache records of them ------------------------------------------------------------------------------------


def test_a_folder_may_move_and_keeps_its_fingerprint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = load(folder).describe()
    assert before["name"] == "hf:tiny-dinov3"
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / folder.name)
    monkeypatch.chdir(moved.parent)
    for name in (moved, "./tiny-dinov3", "tiny-dinov3"):
        assert load(name).describe() == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:org/model", "hf:org/model"),
        ("hf:/a/b/model", "hf:model"),
        ("hf:./b/model/", "hf:model"),
        ("hf:~/model", "hf:model"),
    ],
)
def test_a_path_is_recorded_by_its_last_part(name: str, expected: str):
    assert label(name) == expected


def test_the_origin_follows_weights_and_configuration_but_no_other_file(folder: Path):
    origin = load(folder).origin
    assert origin["origin"] == "pretrained"
    (folder / "README.md").write_text("hello")
    (folder / "other.safetensors").write_bytes(b"another network's")
    assert load(folder).origin == origin == asked_origin(f"hf:{folder}", random_weights=False)
    edit(folder / CONFIG, num_attention_heads=4)  # leaves no trace in the weights
    heads = load(folder)
    assert heads.origin != origin
    saved({k: v + 1e-3 for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert load(folder).origin != heads.origin


def test_what_is_asked_of_weights_that_are_not_at_hand(folder: Path):
    assert asked_origin("hf:someone/tiny", random_weights=False) == {"origin": "pretrained"}
    assert asked_origin("hf:/gone/tiny", random_weights=False) == {"origin": "pretrained"}
    assert asked_origin("hf:/gone/tiny", random_weights=True) == {"origin": "random"}
    assert asked_origin(f"hf:{folder}", random_weights=True) == load(folder, random_weights=True).origin


def test_the_evaluations_key_follows_the_folders_weights(folder: Path, tmp_path: Path):
    from pipeline.evaluation.subjects import teacher_subject

    def key() -> str:
        arguments = {"name": f"hf:{folder}", "checkpoint": None, "random_weights": False}
        subject = teacher_subject(arguments, view="crop", store=tmp_path, batch_size=1, workers=0)
        return str(subject.embedder.digest)

    before = key()
    assert key() == before
    with_tensor("norm.weight", (48,))(folder)
    assert key() != before
