"""Tiny teachers with every parameter random, and pictures to show them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.cache.layout import ScaleSpec

SIZE = 64  # 4 x 4 patches
VIT = "vit_small_patch16_dinov3_qkvb"
VIT_ARGS = {"embed_dim": 48, "depth": 4, "num_heads": 3}
SCALES = (ScaleSpec("fine", -1, 4), ScaleSpec("mid", 1, 2), ScaleSpec("coarse", 2, 2))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: no layer-scale of 1e-5, no bias of 0 hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def jpeg(seed: int) -> bytes:
    """A smooth random picture, 72 x 80 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((80, 72), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_tar(path: Path, numbers: range, *, captionless: tuple[int, ...] = (), first: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            members = {"jpg": jpeg(first + number)}
            if number not in captionless:
                members["txt"] = f"picture {number}".encode()
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
