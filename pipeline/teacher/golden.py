"""Is this the DINOv3 that was published? A teacher's numbers for one image, against those its publishers state.

Five numbers of CLS and five of the first patch token, after the final norm, of one COCO photograph at 224 pixels, for
ViT-S/16 and ViT-B/16 (pretrained on LVD-1689M). We had no such weights: the numbers are taken on trust. Source:
huggingface/transformers, src/transformers/models/dinov3_vit/convert_dinov3_vit_to_hf.py at commit
0882cbfddd4683cf90cf03bfcb2ee920443889eb (Apache-2.0). The photograph is number 39769 of COCO val2017; it is not ours to
ship.

The preprocessing is the source's, whatever a cache's view is: pixels to [0, 1], the whole image to 224 x 224
(bilinear, antialiased, as floats), ImageNet's mean and std.

Legend: H, W pixels of the image, G = 14 patches a side, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from pipeline.cache.layout import ScaleSpec
from pipeline.errors import PipeError
from pipeline.teacher.teacher import Teacher

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = ScaleSpec("last", -1, 1)  # every network has it; the tokens compared are those before pooling
MOST_VALUES = 256  # narrower than any network
TOLERANCE = 1e-4  # the source's; absolute
IMAGE = "number 39769 of COCO val2017 (000000039769.jpg, or a .png of it)"
VALUES_FILE = "expected_dinov3.json"
TOKENS = ("cls", "patch0")


@dataclass(frozen=True)
class Network:
    """A network with published values: its title, its parameters (without a mask token), a repository that has it."""

    title: str
    parameters: int
    repository: str


NETWORKS = {
    "vits": Network("DINOv3 ViT-S/16", 21_596_160, "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "vitb": Network("DINOv3 ViT-B/16", 85_659_648, "facebook/dinov3-vitb16-pretrain-lvd1689m"),
}
PARAMETERS_WITHIN = 1e-3  # a mask token and biases of zeros are kept by some libraries and not by others

Values = Mapping[str, tuple[float, ...]]  # "cls", "patch0" → the first numbers of that token
PUBLISHED: dict[str, Values] = {
    "vits": {
        "cls": (0.4635618329, -0.4156093597, 0.4082368910, -0.1266133636, -0.2866369188),
        "patch0": (-0.0387542211, -0.2508954406, -0.0163929053, -0.4554736316, 0.5715821981),
    },
    "vitb": {
        "cls": (1.0346431732, -0.1806092858, -0.3410182595, -0.0663769543, -0.0113839703),
        "patch0": (-0.0825237408, -0.4562727809, -0.7280299664, -0.4306802452, -0.1528801920),
    },
}


@dataclass(frozen=True)
class Golden:
    """What is expected: image file, values by network ("vits", "vitb"), and the absolute tolerance."""

    image: Path
    values: Mapping[str, Values]
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """What came of it: the network's key, the tolerance, and by token the expected and the found numbers."""

    network: str
    tolerance: float
    expected: Values
    found: Values

    def difference(self, token: str) -> float:
        """The largest absolute difference; infinite where a number is not finite."""
        pairs = zip(self.expected[token], self.found[token], strict=True)
        differences = [abs(wanted - found) for wanted, found in pairs]
        return max(d if math.isfinite(d) else math.inf for d in differences)

    @property
    def passed(self) -> bool:
        return all(self.difference(token) <= self.tolerance for token in TOKENS)


def published(image: Path) -> Golden:
    """The published values, for the photograph in the file `image`."""
    return Golden(image, PUBLISHED)


def read_golden(folder: Path) -> Golden:
    """A folder with the image and expected_dinov3.json: `image` (a file name, then any remark), `tolerance`, and lists
    `NETWORK_cls_first5`, `NETWORK_patch0_first5`.

    Raises:
        PipeError: no such file, or it holds something else.
    """
    path = folder / VALUES_FILE
    try:
        stated: dict[str, Any] = json.loads(path.read_text())
        values = {
            network: {token: tuple(map(float, stated[f"{network}_{token}_first5"])) for token in TOKENS}
            for network in NETWORKS
            if any(key.startswith(f"{network}_") for key in stated)
        }
        numbers = [found for of in values.values() for found in of.values()]
        if not numbers or not all(
            0 < len(found) <= MOST_VALUES and all(map(math.isfinite, found)) for found in numbers
        ):
            raise ValueError(f"1 to {MOST_VALUES} numbers for each token are expected")
        tolerance = float(stated["tolerance"])
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"a tolerance of {tolerance} says nothing")
        return Golden(folder / stated["image"].split()[0], values, tolerance)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise PipeError(
            f"cannot read golden values ({type(error).__name__}: {error})",
            where=path,
            fix=f"name a folder with the image and {VALUES_FILE}, or give --image alone for the published values",
        ) from error


def which_network(teacher: Teacher) -> str:
    """The key of the network with published values that the teacher is, told by its kind and size.

    Raises:
        PipeError: there are no published values of such a network.
    """
    count = sum(parameter.numel() for parameter in teacher.backbone.model.parameters())
    if teacher.backbone.is_vit and teacher.backbone.has_cls:
        for key, network in NETWORKS.items():
            if abs(count / network.parameters - 1) <= PARAMETERS_WITHIN:
                return key
    raise PipeError(
        f"no values are published for this network ({count:,} parameters)",
        where=f"teacher.name {teacher.name}",
        fix=f"only {' and '.join(network.title for network in NETWORKS.values())} can be checked",
    )


def picture(path: Path) -> Tensor:
    """The image as the source shows it to the network: (1, 3, 224, 224) float32, normalised.

    Raises:
        PipeError: there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PipeError("the image is missing", where=path, fix=f"it is {IMAGE}; give it by --image FILE") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PipeError(f"cannot decode this image ({type(error).__name__})", where=path, fix=f"use {IMAGE}") from error
    scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255)
    resized = functional.interpolate(scaled, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (resized - mean) / std


def compare(teacher: Teacher, golden: Golden) -> Comparison:
    """Show the image to the teacher, whatever its scales and normalisation; its image size must be SIZE.

    Raises:
        PipeError: the network has no values here, or the image cannot be read.
    """
    network = which_network(teacher)
    if network not in golden.values:
        raise PipeError(
            f"there are no values for {NETWORKS[network].title}", where=golden.image.parent, fix="add them to its file"
        )
    expected = golden.values[network]
    last = teacher.backbone.layers - 1
    with torch.inference_mode():
        patches, cls = teacher.backbone(picture(golden.image), [last])  # (1, G², C), (1, C)
    assert cls is not None  # `which_network` saw to it
    tokens = {"cls": cls[0], "patch0": patches[last][0, 0]}
    found = {token: tuple(tokens[token][: len(expected[token])].tolist()) for token in TOKENS}
    return Comparison(network, golden.tolerance, expected, found)
