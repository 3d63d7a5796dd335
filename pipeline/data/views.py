"""One view of an image for everyone: teacher, student, trunk and evaluation see the same window of it.

Only the normalisation differs from network to network. Without augmentation, as in CyCLIP's and RankCLIP's recipes,
features cached for this view are exact targets for training on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.geometry import replay
from pipeline.errors import PipeError

Kind = Literal["crop", "squash"]

# A ribbon of 10,000 x 1 pixels would be blown up to 500 megapixels of which one square is kept.
LONGEST_RATIO = 32


@dataclass(frozen=True)
class View:
    """A geometry: the whole of an image, or its centre, as an RGB square of `size` pixels.

    crop: the shorter side is resized to `size` (bicubic, antialiased), then the centre is cut out; to the bit what
        torchvision's Resize and CenterCrop make of a PIL image. Of images longer than 32 times their height only the
        window is resized, which may differ from the above by a grey level or two.
    squash: the whole image is resized to the square, as DINOv3's authors do.
    """

    kind: Kind
    size: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PipeError(f"there is no view {self.kind!r}", where="data.view", fix="use crop or squash")
        if self.size < 1:
            raise PipeError("a view needs a positive size", where=f"size {self.size}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB, `size` x `size`."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        if self.kind == "squash":
            return _resize(image, self.size, self.size)
        width, height = image.size
        if max(width, height) > LONGEST_RATIO * min(width, height):
            box = self.window(width, height)
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        long_after, offset = self._centre(width, height)
        lies = width > height
        resized = _resize(image, long_after, self.size) if lies else _resize(image, self.size, long_after)
        left, top = (offset, 0) if lies else (0, offset)
        return resized.crop((left, top, left + self.size, top + self.size))

    def _centre(self, width: int, height: int) -> tuple[int, int]:
        """The longer side once the shorter one is `size`, and where along it the window begins; whole pixels."""
        long_after = int(self.size * max(width, height) / min(width, height))
        return long_after, round((long_after - self.size) / 2.0)

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1): what of an image the view shows, in pixels of the image."""
        if self.kind == "squash":
            return 0.0, 0.0, float(width), float(height)
        long_after, offset = self._centre(width, height)
        scale = max(width, height) / long_after
        start, end = offset * scale, (offset + self.size) * scale
        return (start, 0.0, end, float(height)) if width > height else (0.0, start, float(width), end)

    def part(self, image: Image.Image, box: Sequence[float]) -> Image.Image:
        """A box (x0, y0, x1, y1) of the view, in fractions of its square, from the image at full resolution: RGB,
        `size` x `size` (bicubic, antialiased)."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        x0, y0, x1, y1 = self.window(*image.size)
        left, right = (min(x0 + float(share) * (x1 - x0), image.width) for share in (box[0], box[2]))
        top, bottom = (min(y0 + float(share) * (y1 - y0), image.height) for share in (box[1], box[3]))
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) float32 of an RGB image: (x / 255 - mean) / std, each channel with its own mean and std."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # (3, H, W)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(_per_channel(mean)).div_(_per_channel(std))


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """PIL image → (3, size, size) float32, normalised for one network. Picklable; JSON carries it in a model's file."""

    view: View
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise PipeError(f"{name} must have one number for each of R, G, B", where=str(values))
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise PipeError("std must be positive", where=str(self.std))

    def __call__(
        self, image: Image.Image, geometry: np.ndarray | None = None, *, box: np.ndarray | None = None
    ) -> Tensor:
        """The view that everyone has, or another one.

        Args:
            geometry: (5,), a further view to replay (see data.geometry).
            box: (4,), a part of the view that everyone has (see data.roi).
        """
        if geometry is not None:
            seen = replay(image, geometry, self.view.size)
        else:
            seen = self.view(image) if box is None else self.view.part(image, box.tolist())
        return to_tensor(seen, self.mean, self.std)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: {"view": {"kind", "size"}, "mean": [r, g, b], "std": [r, g, b]}."""
        view = {"kind": self.view.kind, "size": self.view.size}
        return {"view": view, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | str) -> Preprocess:
        """The inverse of `to_json`; takes the mapping or its JSON text."""
        values = json.loads(stored) if isinstance(stored, str) else stored
        return cls(
            View(values["view"]["kind"], int(values["view"]["size"])), tuple(values["mean"]), tuple(values["std"])
        )
