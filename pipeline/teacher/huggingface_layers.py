"""Networks of the transformers library as layers of tokens: what differs between them and timm's is settled here.

* ViTs: `hidden_states` are the embeddings and then every block's output, none of them normed; block i is entry i + 1.
  CLS and the registers (`num_register_tokens` in the config) come first, and exactly these are dropped.
* ConvNeXt: layer i is stage i's map, without any norm, as with timm. (The library's `last_hidden_state` is the last
  stage after a norm, behind a pooled token that it calls CLS: neither is used.)

All hidden states of a ViT's forward are in memory at once if an inner layer is asked for: L + 1 times (B, P + G², C).

Legend: B images, G native grid, C channels, P prefix tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.errors import PipeError

FINAL_NORM = {"dinov3_vit": "norm", "dinov2": "layernorm", "dinov2_with_registers": "layernorm"}


class HuggingFaceViT(nn.Module):
    """A DINOv3 or DINOv2 ViT, `pipeline.teacher.features.Layered`.

    Args:
        model: a transformers model whose config's `model_type` is a key of FINAL_NORM.

    Raises:
        PipeError: its patches are no squares.
    """

    is_vit = True
    has_cls = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        patch = config.patch_size if isinstance(config.patch_size, int) else sorted(set(config.patch_size))
        if not isinstance(patch, int):
            if len(patch) != 1:
                raise PipeError(f"patches of {config.patch_size} pixels are no squares", where="config.json")
            patch = patch[0]
        self.model, self.patch = model, int(patch)
        self.layers = int(config.num_hidden_layers)
        self.prefix = 1 + int(getattr(config, "num_register_tokens", 0))
        self.norm_name = FINAL_NORM[config.model_type]

    def stride(self, layer: int) -> int:
        """See `Layered`."""
        return self.patch

    def forward(self, images: Tensor, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """See `Layered`. Every block runs, because CLS is the network's output."""
        last = self.layers - 1
        inner = set(layers) - {last}
        found = self.model(pixel_values=images, output_hidden_states=bool(inner))
        output = found.last_hidden_state  # (B, P + G², C), normed
        self._check(images, output, found.hidden_states if inner else None)
        norm = getattr(self.model, self.norm_name)
        tokens = {k: norm(found.hidden_states[k + 1][:, self.prefix :]).float() for k in inner}
        if last in layers:
            tokens[last] = output[:, self.prefix :].float()
        return {k: tokens[k] for k in layers}, output[:, 0].float()

    def _check(self, images: Tensor, output: Tensor, hidden: Sequence[Tensor] | None) -> None:
        """Another release of the library might count tokens or states otherwise; nobody would see it in the features.

        Raises:
            PipeError: it does.
        """
        patches = (images.shape[-2] // self.patch) * (images.shape[-1] // self.patch)
        states = self.layers + 1
        if output.shape[1] != self.prefix + patches or (hidden is not None and len(hidden) != states):
            raise PipeError(
                f"{type(self.model).__name__} gave {output.shape[1]} tokens and "
                f"{'no' if hidden is None else len(hidden)} hidden states where {self.prefix} + {patches} and {states} "
                "are expected",
                where="teacher.name",
                fix="use another release of transformers",
            )


class HuggingFaceConvNeXt(nn.Module):
    """A DINOv3 ConvNeXt, `pipeline.teacher.features.Layered`; only the stages needed are run.

    Args:
        model: a `DINOv3ConvNextModel`.
    """

    is_vit = False
    has_cls = False
    norm_name = "none"

    def __init__(self, model: Any) -> None:
        super().__init__()
        from transformers.models.dinov3_convnext.modeling_dinov3_convnext import DINOv3ConvNextStage

        self.model = model
        # By their type: releases keep them in different places.
        self.stages = [module for module in model.modules() if isinstance(module, DINOv3ConvNextStage)]
        self.layers = len(self.stages)

    def stride(self, layer: int) -> int:
        """See `Layered`: a stem of 4 pixels, then each stage halves the map."""
        return int(4 * 2**layer)

    def forward(self, images: Tensor, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """See `Layered`."""
        maps: dict[int, Tensor] = {}  # layer → (B, C, G, G)
        features = images
        for index, stage in enumerate(self.stages[: max(layers) + 1]):
            features = stage(features)
            maps[index] = features
        return {k: maps[k].flatten(2).transpose(1, 2).float() for k in layers}, None
