"""Exported folders: they load to the same bits, appear whole or not at all, and take nobody's work away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import batch, build, shaken, with_gamma

from pipeline.errors import PipeError
from pipeline.models.dinorankclip import load, save
from pipeline.models.export import CONFIG, export_weights, new_folder, rounded
from pipeline.run_folder import sha256_file


@pytest.fixture
def source(tmp_path: Path) -> tuple[Any, Path]:
    model = with_gamma(shaken(build()), 0.3)
    path = tmp_path / "run" / "model.safetensors"
    save(model, path, view="squash", extra={"run": "first"})
    return model, path


def test_float32_is_the_file_to_the_byte(source: tuple[Any, Path], tmp_path: Path) -> None:
    export_weights(source[1], tmp_path / "out.safetensors")
    assert sha256_file(tmp_path / "out.safetensors") == sha256_file(source[1])


@pytest.mark.parametrize(("dtype", "cosine"), [("bfloat16", 0.999), ("float16", 0.99999)])
def test_a_smaller_dtype_rounds_matrices_alone_and_loads_in_float32(
    source: tuple[Any, Path], tmp_path: Path, dtype: Any, cosine: float
) -> None:
    model, path = source
    out = tmp_path / "out" / "model.safetensors"
    export_weights(path, out, dtype)
    before, after = load_file(path), load_file(out)
    for name, value in before.items():
        matrix = value.is_floating_point() and value.ndim >= 2
        expected = value.to(getattr(torch, dtype)) if matrix else value
        assert after[name].dtype == expected.dtype, name
        assert torch.equal(after[name], expected), name
    assert out.stat().st_size < 0.6 * path.stat().st_size
    loaded, preprocess, _ = load(out)
    assert preprocess.view.kind == "squash"
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    images, tokens = batch(model)
    with torch.no_grad():
        assert (loaded.encode_image(images) * model.encode_image(images)).sum(-1).min() > cosine
        assert (loaded.encode_text(tokens) * model.encode_text(tokens)).sum(-1).min() > cosine


def test_a_smaller_dtype_can_be_exported_again_in_float32(source: tuple[Any, Path], tmp_path: Path) -> None:
    export_weights(source[1], tmp_path / "half.safetensors", "float16")
    export_weights(tmp_path / "half.safetensors", tmp_path / "single.safetensors", "float32")
    half, single = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "single.safetensors")
    assert {v.dtype for v in single.values()} <= {torch.float32, torch.int64}
    assert all(torch.equal(single[name], value.to(single[name].dtype)) for name, value in half.items())


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(PipeError, match=r"head\.weight does not fit float16.*bfloat16"):
        rounded("head.weight", torch.full((2, 2), 1e6), "float16")
    assert rounded("bias", torch.full((2,), 1e6), "float16").dtype == torch.float32
    with pytest.raises(PipeError, match="no dtype 'int8'"):
        rounded("w", torch.ones(2, 2), "int8")  # type: ignore[arg-type]


def write(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(folder, overwrite=overwrite) as new:
        (new / CONFIG).write_text(text)


def test_a_folder_appears_whole_and_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(PipeError, match="--overwrite"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / CONFIG).read_text() == "one"
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / CONFIG).read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(PipeError, match="not an exported model"):
        write(tmp_path / "thesis", "x", overwrite=True)
    assert (tmp_path / "thesis" / "chapter").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_end_on_the_way_leaves_what_was_there(tmp_path: Path, error: Any) -> None:
    write(tmp_path / "out", "one")

    def fail() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as new:
            (new / CONFIG).write_text("half")
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else PipeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / CONFIG).read_text() == "one"
