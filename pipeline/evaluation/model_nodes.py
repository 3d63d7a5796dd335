"""From any model with `encode_image` and `encode_text` to the nodes of one side.

A benchmark has one image for five captions, or texts without an image, so each side is asked for alone. Our models
give `image_nodes` and `text_nodes`; any other pair of encoders is one node.
Legend: B images or texts, D the width of a node, S image size, L context length.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

OUTPUT = "trunk"  # of a model that is one plain pair of encoders


def image_nodes(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of images (B, 3, S, S)."""
    return _unit(model.image_nodes(images) if hasattr(model, "image_nodes") else {OUTPUT: model.encode_image(images)})


def text_nodes(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of tokens (B, L)."""
    return _unit(model.text_nodes(tokens) if hasattr(model, "text_nodes") else {OUTPUT: model.encode_text(tokens)})


def _unit(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {node: F.normalize(vectors.float(), dim=-1) for node, vectors in found.items()}
