"""Where a teacher's weights come from, and that a file that does not fit is never taken for one that does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS
from torch import Tensor

from pipeline.errors import PipeError
from pipeline.run_folder import sha256_file
from pipeline.teacher.teacher import Teacher, load_teacher

State = dict[str, Tensor]


def load(path: Path) -> Teacher:
    return load_teacher(VIT, model_args=VIT_ARGS, checkpoint=path, image_size=SIZE, scales=SCALES)


def saved(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def test_a_checkpoint_is_loaded_tensor_by_tensor(vit: Teacher, vit_state: State):
    loaded = vit.backbone.model.state_dict()
    assert loaded.keys() == vit_state.keys()
    assert all(torch.equal(loaded[name], vit_state[name]) for name in vit_state)


def test_a_torch_file_gives_the_same_teacher_also_where_it_wraps_the_weights(
    vit: Teacher, vit_state: State, tmp_path: Path
):
    torch.save(vit_state, tmp_path / "plain.pth")
    torch.save({"state_dict": vit_state, "epoch": 3}, tmp_path / "wrapped.pth")
    expected = {key: value for key, value in vit.describe().items() if key != "weights"}  # another file, the same hash
    for name in ("plain.pth", "wrapped.pth"):
        found = load(tmp_path / name).describe()
        assert found.pop("weights") == {"origin": "checkpoint", "file_sha256": sha256_file(tmp_path / name)}
        assert found == expected


def test_float16_weights_are_upcast(vit_state: State, tmp_path: Path):
    half = {name: tensor.half() for name, tensor in vit_state.items()}
    teacher = load(saved(half, tmp_path / "half.safetensors"))
    upcast = load(saved({name: tensor.float() for name, tensor in half.items()}, tmp_path / "upcast.safetensors"))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert teacher.weights_sha256 == upcast.weights_sha256


def test_weights_in_the_authors_naming_are_converted(vit: Teacher, vit_state: State, tmp_path: Path):
    theirs = {}
    for name, tensor in vit_state.items():
        if name.endswith("attn.v_bias"):
            continue
        if name.endswith("attn.q_bias"):
            parts = [tensor, torch.zeros_like(tensor), vit_state[name.replace("q_bias", "v_bias")]]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat(parts)
        name = (
            name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        )
        theirs[name] = tensor
    theirs["mask_token"] = torch.zeros(1, 48)
    theirs["rope_embed.periods"] = torch.ones(4)
    assert load(saved(theirs, tmp_path / "theirs.safetensors")).weights_sha256 == vit.weights_sha256


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "norm.weight"), r"1 missing: norm.weight"),
        (lambda state: state | {"head.weight": torch.zeros(2, 48)}, r"1 unexpected: head.weight"),
        (lambda state: state | {"norm.weight": torch.zeros(32)}, r"1 of another shape: norm.weight"),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, r"missing: .*, \.\.\.; .*unexpected: module\."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_naming_keys(
    change: object, message: str, vit_state: State, tmp_path: Path
):
    path = saved(change(vit_state), tmp_path / "w.safetensors")  # type: ignore[operator]
    with pytest.raises(PipeError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("sprung"),))


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps({"weight": _Trap()}, protocol=2))
    with pytest.raises(PipeError, match="cannot read this checkpoint"):
        load(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["garbage.safetensors", "garbage.pth"])
def test_garbage_is_no_checkpoint(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\x93not weights at all" * 9)
    with pytest.raises(PipeError, match="cannot read this checkpoint"):
        load(tmp_path / name)


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(PipeError, match=r"no such checkpoint.*gone\.safetensors"):
        load(tmp_path / "gone.safetensors")


def test_a_checkpoint_and_random_weights_exclude_each_other(vit_checkpoint: Path):
    with pytest.raises(PipeError, match="exclude each other"):
        load_teacher(VIT, checkpoint=vit_checkpoint, random_weights=True, image_size=SIZE, scales=SCALES)


def random_teacher(seed: int) -> Teacher:
    return load_teacher(VIT, model_args=VIT_ARGS, random_weights=True, image_size=SIZE, scales=SCALES, seed=seed)


def test_random_weights_follow_their_seed_and_leave_other_randomness_alone(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = random_teacher(1)
    assert torch.equal(torch.rand(3), expected)
    assert random_teacher(1).weights_sha256 == first.weights_sha256
    assert random_teacher(2).weights_sha256 != first.weights_sha256


def test_one_weight_changes_the_hash(vit: Teacher, vit_state: State, tmp_path: Path):
    changed = {name: tensor.clone() for name, tensor in vit_state.items()}
    changed["blocks.2.norm1.bias"][7] = torch.nextafter(changed["blocks.2.norm1.bias"][7], torch.tensor(9.0))
    assert load(saved(changed, tmp_path / "w.safetensors")).weights_sha256 != vit.weights_sha256


def test_two_exchanged_tensors_change_the_hash(vit: Teacher, vit_state: State, tmp_path: Path):
    a, b = "blocks.0.norm1.bias", "blocks.1.norm1.bias"
    exchanged = vit_state | {a: vit_state[b], b: vit_state[a]}
    assert load(saved(exchanged, tmp_path / "w.safetensors")).weights_sha256 != vit.weights_sha256


def test_the_fingerprint_survives_json(vit: Teacher):
    assert json.loads(json.dumps(vit.describe(), allow_nan=False)) == vit.describe()


def test_mean_and_std_are_the_networks_own_unless_given(vit_checkpoint: Path, vit: Teacher):
    assert vit.mean == (0.485, 0.456, 0.406)
    given = load_teacher(
        VIT,
        model_args=VIT_ARGS,
        checkpoint=vit_checkpoint,
        image_size=SIZE,
        scales=SCALES,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
    )
    assert (given.mean, given.std, vit.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), (0.229, 0.224, 0.225))
