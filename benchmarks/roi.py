"""What is a stored map worth for a crop that the teacher never saw?

The teacher looks at whole views and at crops of them that have 1 to 0.2 of the area. Its map of the whole view,
resampled over the crop (`pipeline.data.roi`), is compared with its own map of the crop: mean cosine of tokens, and the
root mean square error of the cosine Gram matrix, which is what distillation learns. Beside it two controls, as tokens
of one network resemble each other whatever they show: the base view's map as it is (not resampled), and the resampled
map of another image. `mirrored` is the control for flips: the whole view's map, mirrored, against the teacher's own map
of the mirrored view.

    mobilenet      a trained MobileNetV2, layers as in configs/small.yaml, `fine` also on its native grid of 14
    dinov3 random  timm's DINOv3 ViT-S with random parameters: the architecture, and no evidence about its weights

Features are raw (no PCA, no quantisation: `cache_fidelity.py` has these). DATA holds flickr8k/train/*.tar and
teacher/mobilenetv2_100.tf_in1k.fp16.safetensors; without --real, drawn pictures and small random networks stand in.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import load, machine, markdown, parse, parser, report
from PIL import Image
from teacher_features import VIT_SCALES, images_of, mobilenet, random_dinov3, randomise

from pipeline.cache.layout import GLOBAL, ScaleSpec
from pipeline.data.roi import SHARES, cosines, probes, resample
from pipeline.data.views import View
from pipeline.teacher.teacher import Teacher, load_teacher

MOBILENET_SCALES = (ScaleSpec("fine 14", 3, 14), ScaleSpec("fine 7", 3, 7), ScaleSpec("coarse 7", 4, 7))
MIRRORED = "mirrored"
WAYS = ("resampled", "base", "other")


def pictures(count: int) -> Iterator[Image.Image]:
    """Drawn: coarse colours, blown up."""
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        yield Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)


def small_networks() -> dict[str, Teacher]:
    """The same architectures, small and random: for --quick and where there are no photographs."""
    cnn = load_teacher("mobilenetv2_050", random_weights=True, image_size=64, scales=[ScaleSpec("fine 4", 3, 4)])
    vit = load_teacher(
        "vit_small_patch16_dinov3_qkvb",
        model_args={"embed_dim": 48, "depth": 4, "num_heads": 3},
        random_weights=True,
        image_size=64,
        scales=[ScaleSpec("fine 4", -1, 4)],
    )
    randomise(vit)
    return {"mobilenet": cnn, "dinov3 random": vit}


# --- measuring --------------------------------------------------------------------------------------------------------


def looked_at(network: Teacher, image: Image.Image, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Features (2 + m, T, C) of the view, the mirrored view, and m crops of the view."""
    view = View("crop", network.image_size)
    base = view(image)
    seen = [base, base.transpose(Image.Transpose.FLIP_LEFT_RIGHT), *(view.part(image, box) for box in boxes.tolist())]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in seen]))
    return {name: x.numpy() for name, x in network(network.normalise(pixels)).items()}


def gram_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,): root mean square difference of the cosine Gram matrices of (n, T, C) maps."""

    def gram(x: np.ndarray) -> np.ndarray:
        unit = x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
        return unit @ unit.swapaxes(1, 2)

    return np.sqrt(((gram(a) - gram(b)) ** 2).mean((1, 2)))


def compared(base: np.ndarray, other: np.ndarray, live: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Way and measure → (m,) figures of one image's crops: maps (T, C) of it and of another image, live (m, T, C)."""
    found = {}
    here, there = (np.repeat(x[None], len(boxes), 0) for x in (base, other))
    over = {
        "resampled": resample(torch.from_numpy(here), torch.from_numpy(boxes)).numpy(),
        "base": here,
        "other": resample(torch.from_numpy(there), torch.from_numpy(boxes)).numpy(),
    }
    for way, maps in over.items():
        found[f"{way}/cosine"] = cosines(maps, live)
        found[f"{way}/gram"] = gram_errors(maps, live)
    return found


def mirrored(map_: np.ndarray) -> np.ndarray:
    """(T, C) → (T, C), columns of the grid in reverse."""
    grid = round(len(map_) ** 0.5)
    return np.ascontiguousarray(map_.reshape(grid, grid, -1)[:, ::-1].reshape(map_.shape))


def measure(network: Teacher, images: list[Image.Image]) -> dict[str, dict[str, np.ndarray]]:
    """Scale (and `global`: cosines alone) → way and measure → (shares + 1,) means over images; the last is mirrored."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    before = looked_at(network, images[-1], probes(0, 0)[:0])
    for row, image in enumerate(images):
        boxes = probes(0, row)
        seen = looked_at(network, image, boxes)
        for name, x in seen.items():
            here = found.setdefault(name, {})
            if name == GLOBAL:
                figures = {"base/cosine": cosines(np.repeat(x[:1], len(boxes), 0), x[2:])}
                figures["other/cosine"] = cosines(np.repeat(before[name][:1], len(boxes), 0), x[2:])
                flipped = {
                    way: cosines(y[:1], x[1:2]) for way, y in (("base/cosine", x), ("other/cosine", before[name]))
                }
            else:
                whole = np.array([[0, 0, 1, 1]], np.float32)
                figures = compared(x[0], before[name][0], x[2:], boxes)
                flipped = compared(mirrored(x[0]), mirrored(before[name][0]), x[1:2], whole)
                unmirrored = compared(x[0], x[0], x[1:2], whole)
                flipped |= {key: value for key, value in unmirrored.items() if key.startswith("base/")}
            for key, values in figures.items():
                here.setdefault(key, []).append(np.concatenate([values, flipped[key]]))
        before = seen
    return {name: {key: np.mean(values, 0) for key, values in of.items()} for name, of in found.items()}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--real", type=Path, metavar="DATA", help="photographs and networks from this folder")
    arguments, (images,) = parse(command, {"images": (64, 4, "images")})
    if images < 2:
        command.error("--images takes whole numbers from 2")
    run(arguments, images)


def run(arguments: argparse.Namespace, count: int) -> None:
    load_before = load()
    if arguments.real is None:
        networks, images = small_networks(), list(pictures(count))
    else:
        networks = {
            "mobilenet": mobilenet(arguments.real, MOBILENET_SCALES),
            "dinov3 random": random_dinov3(VIT_SCALES),
        }
        images = list(images_of(arguments.real / "flickr8k" / "train", count))
    cells: list[list[str]] = []
    figures: dict[str, float] = {"images": len(images)}
    labels = [*(f"{share:g}" for share in SHARES), MIRRORED]
    for name, network in networks.items():
        for scale, found in measure(network, images).items():
            for place, label in enumerate(labels):
                row = {key: float(values[place]) for key, values in found.items()}
                where = f"{name}/{scale}/{label}".replace(" ", "_")
                figures |= {f"{where}/{key.replace('gram', 'gram_rms')}": value for key, value in row.items()}
                shown = [f"{row[key]:.3f}" if key in row else "" for key in _columns()]
                cells.append([f"{name}: {scale}, {label}", *shown])
    columns = [
        "teacher: scale, share",
        "resampled",
        "as it is",
        "another's",
        "Gram: resampled",
        "as it is",
        "another's",
    ]
    packages = ("numpy", "torch", "torchvision", "timm", "pillow")
    report(arguments, machine(packages), load_before, markdown(columns, cells), figures)


def _columns() -> list[str]:
    return [f"{way}/{measure}" for measure in ("cosine", "gram") for way in WAYS]


if __name__ == "__main__":
    main()
