"""SimCLR's views of an image as SLIP draws them: two random crops, recoloured, blurred and mirrored.

The recipe is that of SLIP's released code (Mu et al., arXiv 2112.12750), whose colours are SimCLR's (Chen et al., arXiv
2002.05709) at half strength. Its transforms draw from global random states; here every number is drawn first, from a
generator of the caller's seed alone, so that a view is the same in every process and order.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.data.geometry import draw_box
from pipeline.data.views import to_tensor

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
JITTER = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
BLUR = (0.1, 2.0)  # radius in pixels of the resized view
P_JITTER, P_GREY, P_BLUR, P_FLIP = 0.8, 0.2, 0.5, 0.5

_STREAM = zlib.crc32(b"simclr")  # so that no other use of the same seed draws the same numbers
_ADJUST = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


@dataclass(frozen=True)
class Augmentation:
    """Everything that is random about one view, in the order in which it is applied.

    Attributes:
        box: (x0, y0, x1, y1), whole pixels of the image.
        jitter: names of `JITTER` with their factors, in random order; empty where colours stay.
        grey: the three channels become one. blur: Gaussian radius, None for no blur. flip: mirrored.
    """

    box: tuple[int, int, int, int]
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur: float | None
    flip: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, width: int, height: int) -> Augmentation:
        """For an image of `width` x `height` pixels."""
        box = draw_box(rng, width, height, AREA, ASPECT)
        names = rng.permutation(list(JITTER)).tolist() if rng.random() < P_JITTER else []
        jitter = tuple((name, float(rng.uniform(*JITTER[name]))) for name in names)
        grey = bool(rng.random() < P_GREY)
        blur = float(rng.uniform(*BLUR)) if rng.random() < P_BLUR else None
        return cls(box, jitter, grey, blur, bool(rng.random() < P_FLIP))

    def __call__(self, image: Image.Image, size: int) -> Image.Image:
        """RGB → RGB, `size` x `size` (bilinear, antialiased, as torchvision resizes PIL images)."""
        x0, y0, x1, y1 = self.box
        view = TF.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size])
        for name, factor in self.jitter:
            view = _ADJUST[name](view, factor)
        if self.grey:
            view = TF.rgb_to_grayscale(view, num_output_channels=3)
        if self.blur is not None:
            view = view.filter(ImageFilter.GaussianBlur(self.blur))  # SLIP's own; torchvision's differs a little
        return TF.horizontal_flip(view) if self.flip else view


@dataclass(frozen=True)
class SimCLRViews:
    """PIL image and seed → two views, normalised for one network. Picklable.

    Args:
        size: of the views, in pixels. mean, std: of each channel, for pixels in [0, 1].
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def draw(self, seed: Sequence[int], width: int, height: int) -> tuple[Augmentation, Augmentation]:
        """The two views' augmentations for an image of `width` x `height` pixels."""
        first, second = (np.random.default_rng([_STREAM, view, *seed]) for view in range(2))
        return Augmentation.draw(first, width, height), Augmentation.draw(second, width, height)

    def __call__(self, image: Image.Image, seed: Sequence[int]) -> Tensor:
        """(2, 3, size, size) float32, a function of the image and the seed alone.

        Args:
            image: made RGB where it is not.
            seed: integers >= 0, as many at every call: the run's seed, the epoch, the row.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")
        views = (augmentation(image, self.size) for augmentation in self.draw(seed, *image.size))
        return torch.stack([to_tensor(view, self.mean, self.std) for view in views])
