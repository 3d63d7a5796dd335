"""A linear map from the teacher's `global` into a space that it shares with text, read from a safetensors file.

Some teachers come with one (dino.txt, arXiv 2412.16334, aligns DINO's vectors with text). Where it is given, the text
branch predicts the projected vector (`loss.text_target: projected`): words are asked for what words can say.

Legend: n vectors, C width of `global`, P width of the projected space.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PipeError

FIX = "write weight (P, C) and, if there is one, bias (P,) with safetensors"


class TextProjection(nn.Module):
    """y = W g + b, fixed: buffers that are saved with the model and never learn.

    Args:
        width: C. out: P. Zeros until `set_to`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out, width))
        self.register_buffer("bias", torch.zeros(out))

    def forward(self, vectors: Tensor) -> Tensor:
        """(n, C) → (n, P)."""
        return nn.functional.linear(vectors, self.weight.to(vectors.dtype), self.bias.to(vectors.dtype))

    @torch.no_grad()
    def set_to(self, other: TextProjection) -> None:
        """Take another one's values, of the same shape."""
        self.weight.copy_(other.weight)
        self.bias.copy_(other.bias)


def read_projection(path: str | Path, width: int) -> TextProjection:
    """The map in a file, in float32.

    Args:
        path: safetensors with `weight` (P, C) and perhaps `bias` (P,), of any float type.
        width: C, of the cache's `global`.

    Raises:
        PipeError: there is no such file, it is damaged, holds other tensors, or does not fit `width`.
    """
    where = f"loss.text_projection {path}"
    if not Path(path).is_file():
        raise PipeError("there is no such file", where=where, fix=FIX)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipeError(f"the projection cannot be read ({reason})", where=where, fix=FIX) from None
    return _checked(tensors, width, where)


def _checked(tensors: dict[str, Tensor], width: int, where: str) -> TextProjection:
    names = ", ".join(sorted(tensors)) or "nothing"
    if "weight" not in tensors or set(tensors) - {"weight", "bias"}:
        raise PipeError(
            f"a linear map is a weight and perhaps a bias; the file holds {names[:100]}", where=where, fix=FIX
        )
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.ndim != 2 or weight.shape[1] != width or not len(weight):
        shape = tuple(weight.shape)
        raise PipeError(f"weight has the shape {shape}, the cache's global has {width} numbers", where=where, fix=FIX)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if bias.shape != weight.shape[:1]:
        shape = tuple(bias.shape)
        raise PipeError(f"bias has the shape {shape}, weight has {len(weight)} rows", where=where, fix=FIX)
    if not all(x.is_floating_point() and x.isfinite().all() for x in (weight, bias)):
        raise PipeError("the projection's numbers are not all finite floats", where=where, fix=FIX)
    if not weight.any():
        raise PipeError("the projection's weight is zero: it says nothing of the image", where=where, fix=FIX)
    found = TextProjection(width, len(weight))
    with torch.no_grad():
        found.weight.copy_(weight)
        found.bias.copy_(bias)
    return found
