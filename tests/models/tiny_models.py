"""Small models that the tests of pipeline/models build on: ResNet and ViT trunks, parameters off their start."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.dinorankclip import DinoRankCLIP

TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
RESNET: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "text_cfg": TEXT,
}
VIT: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": TEXT,
}
CUSTOM = VIT | {"custom_text": True}
TRUNKS = {"resnet": RESNET, "vit": VIT, "custom": CUSTOM}

STUDENT: dict[str, Any] = {"name": "vit_tiny_patch16_224", "patch": 16, "depth": 2, "text_width": 32, "text_layers": 1}
SCALES: list[dict[str, Any]] = [
    {"name": "fine", "grid": 4, "depth_fraction": 1.0},
    {"name": "coarse", "grid": 2, "depth_fraction": 0.5},
]
SIZE = 64
CAPTIONS = ["a dog", "two red cats on a mat", "x", "a green square left of a small striped blue circle"]
WIDTH_GLOBAL = 24


def build(trunk: str = "resnet", *, student: bool = True, seed: int = 0, **parts: Any) -> Any:
    """A tiny DinoRankCLIP in eval mode."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"trunk": copy.deepcopy(TRUNKS[trunk]), "image_size": SIZE}
    if student:
        arguments |= {"student": STUDENT, "scales": SCALES, "global_width": WIDTH_GLOBAL, "gate": {"hidden": 16}}
    return DinoRankCLIP(**arguments, parts=parts).eval()


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 1, size: float = 0.02) -> Any:
    """The same model with noise on every parameter but γ, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("gamma"):
            parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return model


@torch.no_grad()
def with_gamma(model: Any, gamma: float) -> Any:
    for fusion in model.fusion.values():
        fusion.gamma.fill_(gamma)
    return model


def batch(model: Any, n: int = 4, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 64, 64) and tokens (n, 16)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return images, model.trunk.tokenizer([CAPTIONS[i % len(CAPTIONS)] for i in range(n)])
