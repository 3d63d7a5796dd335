"""The student: a small vision transformer beside the trunk's image tower, a small transformer behind its text tower.

Both learn from the cached teacher and are all that inference needs of it. That there are two lightweight branches, and
that the image one is a ViT-Tiny, is known of arXiv 2605.06592 from summaries; that one is image-side and the other
text-side, the heads and the depths are our reading.

Legend: B pairs, g a scale's grid, n the native grid, L text positions, V the image branch's width, W the text
branch's, E distillation width, C width of the teacher's `global`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.models.blocks import Block, masked_mean
from pipeline.models.stem import conv_stem

# Wide enough for a scale's affinities (which see angles between tokens only), narrow enough to cost nothing.
DISTILLATION_WIDTH = 128
SMALL_START = 0.25  # of torch's initial head: a seventh of a place's length, so that the mean Gram matrix survives it


@dataclass
class ImageBranch:
    """tokens: scale → (B, g², V). pooled: (B, V)."""

    tokens: dict[str, Tensor]
    pooled: Tensor


@dataclass
class TextBranch:
    """tokens: (B, L, W). valid: (B, L) bool, True up to and including the end token. pooled: (B, W), their mean."""

    tokens: Tensor
    valid: Tensor
    pooled: Tensor


class ImageStudent(nn.Module):
    """A timm vision transformer on the trunk's pixels, read at the teacher's relative depths.

    Args:
        name: a timm ViT. patch, depth: replace its own. image_size: side of the images in pixels.
        pool: what the head of `global` reads: "token", as the transformer has it (ViT-Tiny: its class token), or "avg",
            the mean of its patch tokens, which the other losses teach; a class token must first learn to attend.
        stem: how pixels become tokens: "patch", the ViT's own linear map, or "conv" (see `stem`).
        scales: [{name, grid, depth_fraction}]; the scale is read after block round(depth_fraction · depth), at least 1.
        global_width: C. mean, std: those of the pixels that come in.

    Raises:
        PipeError: the patch does not divide the image, or the native grid is no whole multiple of a scale's grid
            (naming a patch size that works), or timm has no such transformer.
    """

    def __init__(
        self,
        *,
        name: str,
        patch: int,
        depth: int,
        image_size: int,
        scales: Sequence[Mapping[str, Any]],
        global_width: int,
        mean: Sequence[float],
        std: Sequence[float],
        stem: str = "patch",
        pool: str = "token",
    ) -> None:
        super().__init__()
        self.grids = {scale["name"]: int(scale["grid"]) for scale in scales}
        self.native_grid = native_grid(image_size, patch, list(self.grids.values()))
        self.blocks = {scale["name"]: student_block(scale["depth_fraction"], depth) for scale in scales}
        options = {"global_pool": "avg"} if pool == "avg" else {}
        self.vit = _vision_transformer(name, image_size=image_size, patch=patch, depth=depth, **options)
        self.width = int(self.vit.embed_dim)  # type: ignore[arg-type]
        if stem == "conv":
            self.vit.patch_embed.proj = conv_stem(patch, self.width)  # type: ignore[union-attr]
        own: Any = self.vit.pretrained_cfg
        incoming_mean, incoming_std = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        own_mean, own_std = torch.tensor(own["mean"]), torch.tensor(own["std"])
        # (x · std + mean − own_mean) / own_std, in one multiplication and one addition
        self.register_buffer("gain", (incoming_std / own_std).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", ((incoming_mean - own_mean) / own_std).view(3, 1, 1), persistent=False)
        self.norms = nn.ModuleDict({name: nn.LayerNorm(self.width) for name in self.grids})
        # With bias: the teacher's mean affinities are far from zero, and a common direction is what makes them so.
        self.heads = nn.ModuleDict({name: nn.Linear(self.width, DISTILLATION_WIDTH) for name in self.grids})
        # What a place in the image looks like before the image is seen; `start_gram_at` gives it the teacher's answer.
        self.places = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(grid**2, DISTILLATION_WIDTH)) for name, grid in self.grids.items()}
        )
        self.global_head = nn.Linear(self.width, global_width)

    def forward(self, images: Tensor) -> ImageBranch:
        """images (B, 3, H, W), normalised for the trunk."""
        vit: Any = self.vit
        pixels = torch.addcmul(self.offset, images, self.gain)  # type: ignore[arg-type]
        wanted = sorted(set(self.blocks.values()))
        final, layers = vit.forward_intermediates(pixels, indices=[block - 1 for block in wanted], output_fmt="NLC")
        after = dict(zip(wanted, layers, strict=True))  # block → (B, n², V)
        tokens = {}
        for name, grid in self.grids.items():
            normed = self.norms[name](after[self.blocks[name]])
            tokens[name] = area_pooled(normed, self.native_grid, grid)
        return ImageBranch(tokens, vit.forward_head(final, pre_logits=True))

    def distilled(self, branch: ImageBranch) -> dict[str, Tensor]:
        """scale → (B, g², E): the tokens in the space where they are compared with the teacher's."""
        return {name: self.heads[name](tokens) + self.places[name] for name, tokens in branch.tokens.items()}

    @torch.no_grad()
    def start_gram_at(self, name: str, mean_gram: Tensor) -> None:
        """Let a scale begin as the predictor that ignores the image: its Gram matrices are about the teacher's mean.

        A random head starts at ten times that predictor's loss and spends a short training on getting there (seen on
        photographs). The places P are the leading factors of the mean Gram matrix S ≈ P Pᵀ (S is positive
        semidefinite as a mean of such; exact for g² ≤ E), the head starts small beside them (our reading).

        Args:
            name: the scale. mean_gram: S (g², g²), of the calibration rows.
        """
        values, vectors = torch.linalg.eigh(mean_gram.double())  # ascending
        kept = min(DISTILLATION_WIDTH, len(values))
        factors = vectors[:, -kept:] * values[-kept:].clamp_min(0).sqrt()
        unit = nn.functional.normalize(factors, dim=1)
        places = self.places[name]
        places.zero_()
        places[:, :kept] = (unit * DISTILLATION_WIDTH**0.5).to(places.dtype)  # as long as a layer-normed token
        head = self.heads[name]
        head.weight.mul_(SMALL_START)  # type: ignore[operator]
        head.bias.zero_()  # type: ignore[operator]

    def predict_global(self, branch: ImageBranch) -> Tensor:
        """(B, C), not normalised."""
        predicted: Tensor = self.global_head(branch.pooled)
        return predicted


class TextStudent(nn.Module):
    """A pre-norm transformer on the trunk's text features; its target is the paired image's teacher `global`.

    Args:
        input_width: of the trunk's features. width: W. layers: number of blocks. global_width: C.
    """

    def __init__(self, *, input_width: int, width: int, layers: int, global_width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(input_width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.global_head = nn.Linear(width, global_width)

    def forward(self, features: Tensor, valid: Tensor) -> TextBranch:
        """features (B, L, input_width), valid (B, L) bool. Positions that are not valid influence nothing."""
        x = self.project(features)
        for block in self.blocks:
            x = block(x, valid)
        tokens = self.norm(x)
        return TextBranch(tokens, valid, masked_mean(tokens, valid))

    def predict_global(self, branch: TextBranch) -> Tensor:
        """(B, C), not normalised."""
        predicted: Tensor = self.global_head(branch.pooled)
        return predicted


def student_block(depth_fraction: float, depth: int) -> int:
    """The block, counted from 1, whose relative depth is the teacher layer's; the last one for 1.0."""
    if not 0 < depth_fraction <= 1:
        raise PipeError(f"depth_fraction must lie in (0, 1], not {depth_fraction}", fix="extract the teacher again")
    return min(max(math.floor(depth_fraction * depth + 0.5), 1), depth)


def native_grid(image_size: int, patch: int, grids: Sequence[int]) -> int:
    """Side n of the student's own map, checked to be a whole multiple of every scale's grid."""
    step = math.lcm(*grids) if grids else 1
    if image_size % patch == 0 and (image_size // patch) % step == 0:
        return image_size // patch
    fitting = [image_size // n for n in range(step, image_size + 1, step) if image_size % n == 0]
    if fitting:
        fix = f"use model.student.patch {min(fitting, key=lambda p: (abs(p - patch), -p))}"
    else:
        fix = f"use a model.image_size that is a multiple of {step * patch}, or scales with another grid"
    shown = " and ".join(f"{grid} × {grid}" for grid in sorted(set(grids))) or "any"
    raise PipeError(
        f"a patch of {patch} on {image_size} px gives no map that pools to the cached {shown}",
        where="model.student.patch",
        fix=fix,
    )


def area_pooled(tokens: Tensor, native: int, grid: int) -> Tensor:
    """Averages of the (native / grid)² patches under each cell: (B, native², V) → (B, grid², V)."""
    if native == grid:
        return tokens
    factor = native // grid
    cells = tokens.unflatten(1, (grid, factor, grid, factor))
    return cells.mean((2, 4)).flatten(1, 2)


def _vision_transformer(name: str, *, image_size: int, patch: int, depth: int, **options: Any) -> nn.Module:
    where = f"model.student.name {name}"
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*"), n=1, cutoff=0.0)
        raise PipeError("timm has no such model", where=where, fix=f"did you mean {near[0]}?")
    try:
        vit = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=image_size, patch_size=patch, depth=depth, **options
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipeError(f"timm cannot build this student ({reason})", where=where, fix="use a plain ViT") from error
    if not (hasattr(vit, "blocks") and hasattr(vit, "patch_embed") and hasattr(vit, "forward_intermediates")):
        raise PipeError("this timm model is no vision transformer", where=where, fix="use vit_tiny_patch16_224")
    return vit
