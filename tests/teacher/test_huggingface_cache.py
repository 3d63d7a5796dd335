"""Both stages with an hf: teacher: the cache is the one timm's network writes, and training compares what it can.

Tolerance of the caches. The two networks' features differ in their last bits (about 1e-6, see the tests of features),
so a coefficient that lies on the border of two stored values may fall to either side: one step of int8, one unit in the
last place of float16 (which near 0 is finer than the difference itself: 1e-5 more), and in few places. The bases agree
to 1e-4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_models import dinov3_vit, save, saved, timm_dinov3_vit
from safetensors.torch import load_file
from tiny_config import TINY_CONFIG

from pipeline.cache.reader import Cache, open_cache
from pipeline.config import load_config
from pipeline.errors import PipeError
from stages import extract_teacher, index, train, train_data

SIZES = {"patch_size": 8, "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
TIMM = {
    "name": "vit_small_patch16_dinov3_qkvb",
    "model_args": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "checkpoint": "timm.safetensors",
}
OWN = ("name", "model_args", "random_weights")  # what each teacher says itself
SETTINGS = {key: value for key, value in TINY_CONFIG["teacher"].items() if key not in OWN}
STUDENT: dict[str, Any] = {
    "model": TINY_CONFIG["model"],
    "train": {"batch_size": 8, "max_steps": 1, "warmup_steps": 0, "transition_depth": 4},
}


def config_file(folder: Path, teacher: dict[str, Any], **settings: Any) -> Path:
    """pipe.yaml beside `tars/`, with a workspace of its own for each teacher."""
    values = {
        "workspace": "workspace",
        "data": {"source": "tars", "workers": 0},
        "teacher": teacher | SETTINGS | settings,
    }
    path = folder / "pipe.yaml"
    path.write_text(yaml.safe_dump(values | STUDENT))
    return path


def extracted(folder: Path, name: str, teacher: dict[str, Any], **settings: Any) -> Cache:
    config = load_config(config_file(folder, teacher, **settings), sets=[f"workspace={folder / name}"])
    index.run(config)
    extract_teacher.run(config)
    return open_cache(config.workspace / "teacher.zarr", verify=True)


@pytest.fixture
def pair(tiny_tars: Path) -> Path:
    """The folder of `tars/`, with a transformers model in `model/` and its timm twin in timm.safetensors."""
    model = dinov3_vit(**SIZES)
    save(model, tiny_tars.parent / "model")
    saved(timm_dinov3_vit(model), tiny_tars.parent / "timm.safetensors")
    return tiny_tars.parent


@pytest.mark.parametrize(("pca", "dtype"), [(16, "int8"), (None, "float16")])
def test_the_cache_of_a_folder_is_timms(pair: Path, pca: int | None, dtype: str):
    mine = extracted(pair, "mine", {"name": "hf:./model"}, pca=pca, dtype=dtype)
    theirs = extracted(pair, "theirs", TIMM, pca=pca, dtype=dtype)
    rows = np.arange(48)
    stored, expected = mine.read_raw(rows), theirs.read_raw(rows)
    assert list(stored) == list(expected) == ["fine", "mid", "global"]
    for name, values in expected.items():
        assert len(np.unique(values)) > 100
        assert (stored[name] == values).mean() > 0.99
        found, wanted = stored[name].astype(np.float64), values.astype(np.float64)
        step = 1.0 if values.dtype == np.int8 else np.spacing(np.abs(values)).astype(np.float64) + 1e-5
        assert (np.abs(found - wanted) <= step).all()
    for scale, other in zip(mine.scales, theirs.scales, strict=True):
        assert (scale.layer, scale.grid) == (other.layer, other.grid)
        assert scale.explained == pytest.approx(other.explained, abs=1e-6)
        if pca:
            np.testing.assert_allclose(mine.basis(scale.name), theirs.basis(scale.name), atol=1e-4)
    assert mine.teacher["name"] == "hf:model"
    extract_teacher.run(load_config(pair / "pipe.yaml", sets=[f"workspace={pair / 'theirs'}"]))  # nothing left to do


def test_training_compares_the_folder_where_it_is_at_hand_and_the_name_where_it_is_not(pair: Path):
    extracted(pair, "workspace", {"name": "hf:./model"})
    path = config_file(pair, {"name": "hf:./model"})
    flags = {"train.order": 1}

    def run(*sets: str, name: str) -> None:
        train.run(load_config(path, sets=list(sets), flags=flags), name=name, resume=False)

    run(name="at-hand")
    weights = load_file(pair / "model" / "model.safetensors")
    (pair / "model").rename(pair / "model-away")
    run(name="not-at-hand")
    assert train_data.asked_teacher(load_config(path), 3)["weights"] == {"origin": "pretrained"}
    with pytest.raises(PipeError, match=r"does not match: teacher\.name"):
        run("teacher.name=hf:someone/model", name="another-name")
    with pytest.raises(PipeError, match=r"does not match: teacher\.weights\.origin"):
        run("teacher.random_weights=true", name="random")
    save(dinov3_vit(**SIZES), pair / "model")
    saved({k: v + 1e-3 for k, v in weights.items()}, pair / "model" / "model.safetensors")
    with pytest.raises(PipeError, match=r"does not match: teacher\.weights\.file_sha256"):
        run(name="other-weights")


def test_extraction_goes_on_only_with_the_same_folder(pair: Path):
    extracted(pair, "workspace", {"name": "hf:./model"})
    config = load_config(config_file(pair, {"name": "hf:./model"}))
    save(dinov3_vit(seed=1, **SIZES), pair / "model")
    with pytest.raises(PipeError, match=r"something else: teacher\.weights_sha256"):
        extract_teacher.run(config)


def test_a_folders_path_is_relative_to_its_yaml(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = config_file(pair, {"name": "hf:./model"})
    assert load_config(path).teacher.name == f"hf:{pair / 'model'}"
    assert load_config(path, sets=["teacher.name=hf:./model"]).teacher.name == f"hf:{tmp_path / 'elsewhere' / 'model'}"
    assert load_config(path, sets=["teacher.name=hf:org/model"]).teacher.name == "hf:org/model"


def test_what_is_timms_alone_is_refused_with_hf(pair: Path):
    path = config_file(pair, {"name": "hf:./model"})
    for setting in ("teacher.checkpoint=timm.safetensors", "teacher.model_args.depth=2"):
        with pytest.raises(PipeError, match=r"checkpoint and model_args are for timm's networks"):
            load_config(path, sets=[setting])
