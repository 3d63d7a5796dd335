"""A finished run of a tiny model, as `pipe train` would leave it, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.models.dinorankclip import DinoRankCLIP, save
from pipeline.run_folder import RunFolder, sha256_file, write_json

TRUNK = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STUDENT = {"name": "vit_tiny_patch16_224", "patch": 8, "depth": 2, "text_width": 16, "text_layers": 1}
CONFIG: dict[str, Any] = {
    "workspace": "/home/somebody/secret/workspace",
    "data": {"source": "/home/somebody/secret/tars", "view": "crop"},
    "teacher": {"name": "hf:/home/somebody/secret/dinov3-vits16", "image_size": 32},
    "train": {"batch_size": 8, "lr": 0.001, "weight_decay": 0.1, "warmup_steps": 2, "epochs": 1},
    "loss": {"gram": 1.0, "rkd": 1.0, "global": 1.0, "simclr": 0.0},
}


def small_model(*, injected: bool, seed: int) -> DinoRankCLIP:
    """Random weights; γ = 0.3 on both sides, where there is an injection."""
    scales = [{"name": "fine", "grid": 4, "depth_fraction": 1.0}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extra: dict[str, Any] = {"student": STUDENT, "scales": scales, "global_width": 24} if injected else {}
        model = DinoRankCLIP(trunk=TRUNK, image_size=32, **extra)
    if injected:
        with torch.no_grad():
            for name in ("image", "text"):
                model.get_parameter(f"fusion.{name}.gamma").fill_(0.3)
    return model


def write_run(path: Path, *, injected: bool = True, finished: bool = True, view: Any = "crop") -> RunFolder:
    """Weights of `small_model`, a configuration and a record."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    save(small_model(injected=injected, seed=5), folder.weights, view=view, extra={"run": folder.name})
    folder.config.write_text(yaml.safe_dump(CONFIG))
    record: dict[str, Any] = {"method": "dinorankclip", "order": 3, "fusion": "full", "cache": "c" * 64}
    if not injected:
        record = {"method": "clip", "order": 0, "fusion": "none", "cache": None}
    record |= {"name": folder.name, "finished": finished, "seed": 0, "steps": 6, "samples_seen": 48, "precision": "no"}
    record |= {"init": {"path": "/home/somebody/secret/clip.safetensors", "sha256": "e" * 64}}
    record |= {"checkpoint_sha256": sha256_file(folder.weights), "data": {"train_rows": 43}}
    write_json(folder.record, record)
    return folder
