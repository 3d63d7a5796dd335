"""From any model with `encode_image` and `encode_text` to the nodes of one side.

Our model's `nodes(images, tokens)` gives both sides. A benchmark has one image for five captions, or texts without an
image, so one side is asked for at a time here, with a single blank in the place of the other: no side looks at the
other, so the blank costs one row and changes nothing.
Legend: B images or texts, D the width of a node, S image size, L context length.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

OUTPUT = "trunk"  # of a model that is one plain pair of encoders


def image_nodes(model: Any, images: Tensor, blank_text: Tensor | None) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of images (B, 3, S, S); `blank_text` (1, L), None: no texts."""
    if hasattr(model, "image_nodes"):
        found: dict[str, Tensor] = model.image_nodes(images)
    elif hasattr(model, "nodes") and blank_text is not None:
        found = {node: side[0] for node, side in model.nodes(images, blank_text).items()}
    else:
        found = {OUTPUT: model.encode_image(images)}
    return _unit(found)


def text_nodes(model: Any, tokens: Tensor, blank_image: Tensor) -> dict[str, Tensor]:
    """Node → (B, D) float32 unit vectors of tokens (B, L); `blank_image` (1, 3, S, S)."""
    if hasattr(model, "text_nodes"):
        found: dict[str, Tensor] = model.text_nodes(tokens)
    elif hasattr(model, "nodes"):
        found = {node: side[1] for node, side in model.nodes(blank_image, tokens).items()}
    else:
        found = {OUTPUT: model.encode_text(tokens)}
    return _unit(found)


def _unit(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {node: F.normalize(vectors.float(), dim=-1) for node, vectors in found.items()}
