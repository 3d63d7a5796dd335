"""From a network's layers to token grids: which layers, without which tokens, in which order, at which grid.

`Layered` is all that a teacher asks of its network; `Backbone` is timm's, those of transformers are in
huggingface_layers.py. timm's `forward_intermediates` is the one call for all its networks; what differs between them is
settled here:

* ViTs carry prefix tokens (CLS, registers) before the patch tokens; exactly these are dropped, and CLS is kept apart.
* The final norm of a ViT is applied to every layer taken. timm keeps it in `norm`, or, for networks that average
  before normalising, in `fc_norm`; whichever has parameters is meant. CNNs have none.
* Layers come back in network order, whatever the order asked: they are returned by index here.
* CNNs give (B, C, H, W) only.

Legend: B images, G native grid, g stored grid, C channels, P prefix tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import PipeError


def resolve_layer(layer: int, count: int) -> int:
    """The non-negative index of `layer` among `count` feature layers; negative ones count from the end.

    Raises:
        PipeError: there is no such layer.
    """
    if not -count <= layer < count:
        raise PipeError(f"there is no layer {layer}", where="teacher.scales", fix=f"this teacher has 0 to {count - 1}")
    return layer % count


def allowed_grids(native: int) -> list[int]:
    """Grids that a native grid can be averaged to in whole cells: its divisors, ascending."""
    return [grid for grid in range(1, native + 1) if native % grid == 0]


def area_pool(tokens: Tensor, grid: int) -> Tensor:
    """Mean of each cell of (G/g)² tokens: (B, G², C) row-major → (B, g², C), in float32.

    Raises:
        ValueError: the tokens are no square, or g does not divide G.
    """
    batch, count, channels = tokens.shape
    native = math.isqrt(count)
    if native * native != count or native % grid:
        raise ValueError(f"{count} tokens cannot be averaged to {grid} x {grid}")
    cell = native // grid
    tokens = tokens.float()
    if cell == 1:
        return tokens
    return tokens.reshape(batch, grid, cell, grid, cell, channels).mean(dim=(2, 4)).reshape(batch, grid**2, channels)


class Layered(Protocol):
    """A frozen network seen as layers of tokens, of whichever library; an `nn.Module`.

    Attributes:
        model: the library's own module; its state dict is what `weights_sha256` hashes.
        layers: how many feature layers there are.
        is_vit: whether its layers are token sequences.
        has_cls: whether there is a CLS token.
        norm_name: the final norm that every layer passes, by the name the library gives it, or "none".
    """

    model: Any
    layers: int
    is_vit: bool
    has_cls: bool
    norm_name: str

    def stride(self, layer: int) -> int:
        """Pixels a token of `layer` spans: a ViT's patch, a CNN's reduction."""

    def compile(self) -> Any:
        """`nn.Module.compile`: in place, the same weights."""

    def __call__(self, images: Tensor, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """Run the network as far as needed.

        Args:
            images: (B, 3, H, W) float32, normalised.
            layers: non-negative indices, any order, repetitions allowed.

        Returns:
            layer → (B, G², C) float32 at its native grid, the final norm applied; and CLS of the whole network after
            the final norm (B, C) float32, or None where there is none.
        """


class Backbone(nn.Module):
    """A timm network, `Layered`.

    Args:
        model: made by `timm.create_model`.

    Attributes:
        has_cls: whether there is a CLS token (always the first).
        norm_name: "norm", "fc_norm" or "none", where timm keeps the final norm.

    Raises:
        PipeError: the network has no `forward_intermediates`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
            raise PipeError(
                f"{type(model).__name__} gives no intermediate features",
                where="teacher.name",
                fix="use a timm model with forward_intermediates",
            )
        self.model = model
        self.layers = len(self.model.feature_info)
        self.is_vit = "return_prefix_tokens" in inspect.signature(self.model.forward_intermediates).parameters
        prefix: Any = getattr(self.model, "num_prefix_tokens", 0)
        self.has_cls = self.is_vit and prefix > 0 and getattr(model, "cls_token", None) is not None
        self.norm_name = self._find_norm() if self.is_vit else "none"
        if not self.is_vit:
            # The same function, in the layout in which CPU and GPU convolutions are fastest.
            self.model.to(memory_format=torch.channels_last)

    def _find_norm(self) -> str:
        for name in ("norm", "fc_norm"):
            module = getattr(self.model, name, None)
            if isinstance(module, nn.Module) and not isinstance(module, nn.Identity):
                return name
        return "none"

    def stride(self, layer: int) -> int:
        """See `Layered`."""
        return int(self.model.feature_info[layer]["reduction"])

    def forward(self, images: Tensor, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """See `Layered`."""
        wanted = sorted(set(layers))
        if not self.is_vit:
            images = images.contiguous(memory_format=torch.channels_last)
            maps = self._intermediates(images, wanted, output_fmt="NCHW")  # each (B, C, G, G)
            return {k: m.flatten(2).transpose(1, 2).float() for k, m in zip(wanted, maps, strict=True)}, None
        if not self.has_cls:
            found = self._intermediates(images, wanted, output_fmt="NLC")
            return {k: self._normed(x) for k, x in zip(wanted, found, strict=True)}, None
        taken = sorted({*wanted, self.layers - 1})  # CLS is the network's output, so every block must run
        pairs = self._intermediates(images, taken, output_fmt="NLC", return_prefix_tokens=True)
        by_layer = dict(zip(taken, pairs, strict=True))  # layer → patch tokens (B, G², C), prefix (B, P, C)
        cls = self._normed(by_layer[self.layers - 1][1][:, 0])
        return {k: self._normed(by_layer[k][0]) for k in wanted}, cls

    def _intermediates(self, images: Tensor, layers: list[int], **options: Any) -> list[Any]:
        found: list[Any] = self.model.forward_intermediates(
            images, indices=layers, intermediates_only=True, stop_early=True, **options
        )
        return found

    def _normed(self, tokens: Tensor) -> Tensor:
        """A layer norm acts on each token alone, so it may come after the prefix has been taken off."""
        if self.norm_name == "none":
            return tokens.float()
        normed: Tensor = getattr(self.model, self.norm_name)(tokens)
        return normed.float()
