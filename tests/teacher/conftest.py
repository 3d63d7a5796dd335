"""Fixtures of the teacher tests: a tiny DINOv3, and tiny tars with their manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS, randomise, write_tar

from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.teacher.teacher import Teacher, load_teacher


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def vit_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = randomise(timm.create_model(VIT, pretrained=False, img_size=SIZE, **VIT_ARGS))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def vit_checkpoint(vit_state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(vit_state, path)
    return path


@pytest.fixture
def vit(vit_checkpoint: Path) -> Teacher:
    return load_teacher(VIT, model_args=VIT_ARGS, checkpoint=vit_checkpoint, image_size=SIZE, scales=SCALES)


MakeManifest = Callable[..., Manifest]


@pytest.fixture
def make_manifest(tmp_path: Path) -> MakeManifest:
    """make_manifest(rows, broken=(...), captionless=(...), val=2, first=0): two tars of `rows` training pictures in
    all, behind them `val` validation pictures.

    `broken` pictures lose their bytes after the index was made: it calls them ok. `first` gives other pictures.
    """

    def make(
        rows: int, *, broken: tuple[int, ...] = (), captionless: tuple[int, ...] = (), val: int = 2, first: int = 0
    ) -> Manifest:
        folder = tmp_path / f"from-{first}"
        for name in ("train", "val"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_tar(folder / "train" / "0.tar", range(rows // 2), captionless=captionless, first=first)
        write_tar(folder / "train" / "1.tar", range(rows // 2, rows), captionless=captionless, first=first)
        write_tar(folder / "val" / "0.tar", range(val), first=first + rows)
        path = folder / "manifest.parquet"
        build_manifest(str(folder / "train"), path, val_source=str(folder / "val"), workers=0)
        manifest = read_manifest(path)
        for row in broken:
            record = manifest.record(row)
            with open(manifest.source_path(record.source), "r+b") as tar:
                tar.seek(record.image_offset)
                tar.write(b"\0" * record.image_bytes)
        return manifest

    return make
