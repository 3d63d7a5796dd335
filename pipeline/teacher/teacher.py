"""The frozen teacher: a network of timm or transformers, its own normalisation, and named scales of its layers.

    teacher = load_teacher("vit_base_patch16_dinov3.lvd1689m", image_size=224, scales=[ScaleSpec("fine", -1, 14)])
    teacher = load_teacher("hf:./dinov3-vitb16", image_size=224, scales=[ScaleSpec("fine", -1, 14)])
    teacher(images)        {"fine": (B, 196, 768), "global": (B, 768)} float32

Legend: B images, S image size, G native grid, g stored grid, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.cache.layout import GLOBAL, ScaleSpec
from pipeline.errors import PipeError
from pipeline.teacher.features import Backbone, Layered, allowed_grids, area_pool, resolve_layer
from pipeline.teacher.huggingface import load as load_huggingface
from pipeline.teacher.huggingface_folder import is_huggingface, label
from pipeline.teacher.weights import create_model, weights_origin, weights_sha256


def load_teacher(
    name: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    checkpoint: Path | str | None = None,
    random_weights: bool = False,
    image_size: int,
    scales: Sequence[ScaleSpec],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Teacher:
    """Make a teacher ready to use, on the CPU.

    Args:
        name: timm name; without `checkpoint` and `random_weights`, timm's pretrained weights of that name are used.
            Or hf:FOLDER, hf:REPOSITORY: a model of the transformers library, see huggingface.py.
        model_args: further arguments of `timm.create_model`.
        checkpoint: local .safetensors file, or torch file of tensors; must fit the network key by key (timm only).
        random_weights: no weights at all, drawn from `seed`: for trying out the plumbing.
        image_size: S, a multiple of the patch (or of a CNN's stride).
        scales: named layers and grids; layers may repeat, be in any order, and be negative (from the end).
        mean, std: of the normalisation, RGB; None: the network's own.

    Raises:
        PipeError: unknown name, no weights, weights that do not fit, or a size, layer or grid that is not possible.
    """
    arguments = dict(model_args or {})
    path = None if checkpoint is None else Path(checkpoint)
    backbone: Layered
    if is_huggingface(name):
        found = load_huggingface(name, model_args=arguments, checkpoint=path, random_weights=random_weights, seed=seed)
        backbone, own, origin = found.backbone, found.normalisation, found.origin
        name = label(name)
    else:
        model = create_model(
            name, arguments, image_size=image_size, checkpoint=path, random_weights=random_weights, seed=seed
        )
        backbone, own = Backbone(model), getattr(model, "pretrained_cfg", None) or {}
        origin = weights_origin(path, random_weights=random_weights)
    return Teacher(
        backbone,
        name=name,
        origin=origin,
        model_args=arguments,
        image_size=image_size,
        scales=scales,
        mean=_rgb("mean", mean, own),
        std=_rgb("std", std, own),
    )


def _rgb(which: str, asked: Sequence[float] | None, own: Mapping[str, Any]) -> tuple[float, float, float]:
    values = own.get(which) if asked is None else asked
    if values is None or not isinstance(values, Sequence) or len(values) != 3:
        raise PipeError(f"no {which} for R, G, B is known", where=f"teacher.{which}", fix="give three numbers")
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        red = green = blue = math.nan
    if not all(math.isfinite(value) and (which == "mean" or value > 0) for value in (red, green, blue)):
        raise PipeError(
            f"{which} must be three finite numbers{'' if which == 'mean' else ', all positive'}",
            where=f"teacher.{which}",
            fix=f"give others than {values}",
        )
    return red, green, blue


class Teacher(nn.Module):
    """Frozen, and in eval mode whatever a parent does (in train mode DINOv3 jitters its position coordinates).

    Attributes:
        name, image_size, mean, std, scales: as asked; the scales' layers resolved to non-negative indices, and of a
            folder's path only the last part kept, so that a cache stays valid when the folder moves.
        widths: scale → C.
        native_grids: scale → G.
        global_width: C of `global`: CLS after the final norm; where there is none, the mean of the tokens of the
            deepest layer listed, at native grid.
        origin: where the weights come from; see `weights_origin`.
        weights_sha256: hash of all weights.
    """

    def __init__(
        self,
        backbone: Layered,
        *,
        name: str,
        origin: Mapping[str, str],
        model_args: Mapping[str, Any],
        image_size: int,
        scales: Sequence[ScaleSpec],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.name, self.model_args, self.image_size = name, dict(model_args), image_size
        self.origin = dict(origin)
        self.mean, self.std = mean, std
        self.weights_sha256 = weights_sha256(backbone.model)
        self.backbone = backbone
        self.requires_grad_(False)
        self.eval()
        if not scales:
            raise PipeError("no scale is asked for", where="teacher.scales", fix="name one layer and grid")
        self.scales = tuple(ScaleSpec(s.name, resolve_layer(s.layer, self.backbone.layers), s.grid) for s in scales)
        self.layers = [scale.layer for scale in self.scales]
        self.register_buffer("_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._refuse_remainders()
        self._measure()

    def _refuse_remainders(self) -> None:
        """A side that the patch does not divide would be cut or padded silently by some networks."""
        for layer in sorted(set(self.layers)):
            stride = self.backbone.stride(layer)
            if self.image_size % stride:
                below = self.image_size // stride * stride
                options = " or ".join(str(size) for size in (below, below + stride) if size)
                raise PipeError(
                    f"an image of {self.image_size} pixels is not divided by the patch of {stride} (layer {layer})",
                    where="teacher.image_size",
                    fix=f"use {options}",
                )

    def _measure(self) -> None:
        """Native grids and widths, from one forward of a blank image: what the network does, not what it declares."""
        blank = torch.zeros(1, 3, self.image_size, self.image_size)
        with torch.no_grad():
            tokens, cls = self.backbone(blank, self.layers)
        self.widths = {s.name: int(tokens[s.layer].shape[-1]) for s in self.scales}
        self.native_grids = {s.name: round(tokens[s.layer].shape[1] ** 0.5) for s in self.scales}
        self.global_width = int((tokens[max(self.layers)] if cls is None else cls).shape[-1])
        for scale in self.scales:
            native = self.native_grids[scale.name]
            if scale.grid not in allowed_grids(native):
                raise PipeError(
                    f"scale {scale.name}: the native grid of layer {scale.layer} is {native} x {native}, which is no "
                    f"whole multiple of grid {scale.grid}",
                    where="teacher.scales",
                    fix=f"use a grid of {', '.join(map(str, allowed_grids(native)))}",
                )

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)

    def compile_network(self) -> None:
        """torch.compile the network; weights and results stay the same, but for rounding."""
        self.backbone.compile()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 → (B, 3, S, S) float32: (x / 255 - mean) / std, as `data.views.to_tensor` does."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32)
        mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
        return images.div_(255).sub_(mean).div_(std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, S, S) float32, normalised → {scale: (B, g², C), in the order asked, "global": (B, C)} float32.

        Raises:
            ValueError: the images have another size.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"expected (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        tokens, cls = self.backbone(images, self.layers)
        features = {scale.name: area_pool(tokens[scale.layer], scale.grid) for scale in self.scales}
        features[GLOBAL] = tokens[max(self.layers)].mean(dim=1) if cls is None else cls
        return features

    def describe(self) -> dict[str, Any]:
        """The fingerprint, JSON-able: what must agree for two teachers' features to be the same."""
        count = self.backbone.layers
        return {
            "name": self.name,
            "weights": self.origin,
            "weights_sha256": self.weights_sha256,
            "model_args": self.model_args,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "norm": self.backbone.norm_name,
            "layers": count,
            "global": "cls" if self.backbone.has_cls else "mean",
            "scales": [
                {
                    "name": scale.name,
                    "layer": scale.layer,
                    "grid": scale.grid,
                    "width": self.widths[scale.name],
                    "depth_fraction": (scale.layer + 1) / count,
                }
                for scale in self.scales
            ],
        }
