"""From any model with `encode_image` and `encode_text` to the nodes of one side.

Our model's `nodes(images, tokens)` gives both sides of a pair; a benchmark has one image for five captions, or texts
without an image, so here one side is asked for at a time.
Legend: B images or texts, D the width of a node.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

OUTPUT = "trunk"  # of a model that is one plain pair of encoders


def image_nodes(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of images (B, 3, H, W)."""
    if hasattr(model, "image_nodes"):
        found: dict[str, Tensor] = model.image_nodes(images)
    else:
        found = {OUTPUT: model.encode_image(images)}
    return {node: F.normalize(vectors.float(), dim=-1) for node, vectors in found.items()}


def text_nodes(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of tokens (B, L)."""
    if hasattr(model, "text_nodes"):
        found: dict[str, Tensor] = model.text_nodes(tokens)
    else:
        found = {OUTPUT: model.encode_text(tokens)}
    return {node: F.normalize(vectors.float(), dim=-1) for node, vectors in found.items()}
