"""Features that `cache_fidelity.py` stores, drawn here and of networks on photographs; `roi.py` has the networks too.

Legend: n images, T = grid² tokens, C channels.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.cache.layout import GLOBAL, ScaleSpec

if TYPE_CHECKING:
    from pipeline.teacher.teacher import Teacher

Features = dict[str, np.ndarray]  # scale → (n, T, C) float32

GRIDS, WIDTH = {"fine": 14, "mid": 7, "coarse": 7}, 768  # of the default configuration
SMALL_YAML = (ScaleSpec("fine", 3, 7), ScaleSpec("coarse", 4, 7))
VIT_SCALES = (ScaleSpec("fine", -1, 14), ScaleSpec("mid", 8, 7), ScaleSpec("coarse", 4, 7))
OUTLIERS = 4  # channels with a large mean and variance
BATCH = 64


def synthetic(images: int, width: int, grids: dict[str, int], seed: int = 0) -> Features:
    """Features with the traits of a self-supervised ViT's patch tokens; only traits, so no evidence about DINOv3.

    * Covariance with eigenvalues falling as 1 / k along random directions, shared by an image's tokens in parts: one
      image-wide, one smooth over the grid, one of each token.
    * A mean that is not zero, and a norm that varies by some 20 % between tokens.
    * `OUTLIERS` channels whose mean is 8 to 20 and whose deviation is 3 times that of the others, the same for all
      tokens: reported as feature-dimension outliers of DINOv3 (arXiv 2508.10104, appendix) and massive activations
      of vision transformers, whose place and sign hardly depend on the input (arXiv 2402.17762).
    """
    rng = np.random.default_rng(seed)
    found: Features = {}
    for name, grid in grids.items():
        spectrum = np.arange(1, width + 1) ** -0.5
        spectrum *= np.sqrt(width / (spectrum**2).sum())
        rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
        whole = rng.normal(size=(images, 1, 1, width))
        patches = rng.normal(size=(images, -(-grid // 3), -(-grid // 3), width)).repeat(3, 1).repeat(3, 2)
        own = rng.normal(size=(images, grid, grid, width))
        mixed = (0.3**0.5 * whole + 0.4**0.5 * patches[:, :grid, :grid] + 0.3**0.5 * own).reshape(images, -1, width)
        x = (mixed * spectrum) @ rotation.T + 0.5 * rng.normal(size=width)
        outliers = rng.choice(width, OUTLIERS, replace=False)
        x[..., outliers] = 3 * x[..., outliers] + rng.choice([-1, 1], OUTLIERS) * rng.uniform(8, 20, OUTLIERS)
        x *= np.exp(0.2 * rng.normal(size=(*x.shape[:2], 1)))
        found[name] = x.astype(np.float32)
    return found


def images_of(folder: Path, count: int) -> Iterator[Image.Image]:
    """The first `count` photographs of the tars, RGB."""
    seen = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if seen < count and member.name.endswith((".jpg", ".png")):
                    data = tar.extractfile(member)
                    assert data is not None
                    yield Image.open(io.BytesIO(data.read())).convert("RGB")
                    seen += 1


def photographs(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    """(up to 64, size, size, 3) uint8 at a time, `count` in all: the first of the tars' photographs."""
    from pipeline.data.views import View

    view, waiting = View("crop", size), []
    for image in images_of(folder, count):
        waiting.append(np.asarray(view(image)))
        if len(waiting) == BATCH:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)


def mobilenet(folder: Path, scales: Sequence[ScaleSpec]) -> Teacher:
    """The trained MobileNetV2 of `folder`, at 224 pixels."""
    from pipeline.teacher.teacher import load_teacher

    return load_teacher(
        "mobilenetv2_100",
        model_args={"num_classes": 1001, "pad_type": "same"},
        checkpoint=folder / "teacher" / "mobilenetv2_100.tf_in1k.fp16.safetensors",
        image_size=224,
        scales=scales,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def random_dinov3(scales: Sequence[ScaleSpec]) -> Teacher:
    """timm's DINOv3 ViT-S with every parameter random, at 224 pixels."""
    from pipeline.teacher.teacher import load_teacher

    teacher = load_teacher("vit_small_patch16_dinov3_qkvb", random_weights=True, image_size=224, scales=scales)
    randomise(teacher)
    return teacher


def real(folder: Path, images: int) -> dict[str, Features]:
    """Features of the photographs below `folder` by the two networks."""
    import torch

    networks = {"mobilenet": mobilenet(folder, SMALL_YAML), "dinov3 random": random_dinov3(VIT_SCALES)}
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in networks}
    for pixels in photographs(folder / "flickr8k" / "train", images, 224):
        for name, network in networks.items():
            features = network(network.normalise(torch.from_numpy(pixels)))
            parts[name].append({scale: v.numpy() for scale, v in features.items() if scale != GLOBAL})
    return {
        name: {scale: np.concatenate([part[scale] for part in found]) for scale in found[0]}
        for name, found in parts.items()
    }


def randomise(network: object, seed: int = 0) -> None:
    """Every parameter drawn anew: as created, DINOv3's layer scale of 1e-5 leaves little but the patch embedding."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():  # type: ignore[attr-defined]
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:  # norms, layer scales, biases
                parameter.copy_(noise.mul(0.3).exp() if parameter.mean() > 0 else noise * 0.1)
