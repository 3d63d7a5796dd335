"""Batches larger than memory: rows are encoded a few at a time, the loss sees all of them.

GradCache (Gao et al., arXiv 2101.06983): encode every chunk without keeping activations; take the loss and its gradient
on the features of all rows, of all processes; run each chunk again, now with activations, and send its features'
gradients on into the network. Here autograd does the book-keeping: a chunk is a checkpoint, and its features are what
the loss's graph begins with. One forward and one backward in the eyes of DDP, of a gradient scaler and of clipping, so
gradients are reduced once; parameters that the loss uses directly are in its own graph and run once.

The price is a second forward pass. Results are those of the whole batch but for rounding, and but for what looks across
rows: batch norms see a chunk, and dropout draws other masks (the same ones in both passes).

Legend: B own rows, M rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.losses.plackett_luce import at_least_float32
from pipeline.models.recompute import recomputed


def in_chunks(
    encode: Callable[..., Any], inputs: Sequence[Tensor | None], rows: int | None, *, inside: nn.Module
) -> Any:
    """encode(*inputs) of all B rows, at most M of them at once.

    Args:
        encode: row-wise: tensors (B, ...) or None → tensors (B, ...), numbers () that are the same for all rows, and
            None, in tuples, dicts and objects with attributes. No collective communication: processes may have
            different numbers of chunks.
        inputs: what it takes; the first is a tensor.
        rows: M; None takes all at once, in the ordinary way.
        inside: the module that `encode` runs.
    """
    first = inputs[0]
    assert first is not None
    if rows is None or len(first) <= rows:
        return encode(*inputs)
    count = -(-len(first) // rows)  # chunks of one size, where it divides: no straggler of one row
    cut = [[None] * count if x is None else x.tensor_split(count) for x in inputs]
    if not torch.is_grad_enabled():
        return _joined([encode(*chunk) for chunk in zip(*cut, strict=True)])
    parts = []
    for chunk in zip(*cut, strict=True):
        # Autocast keeps its copies of weights until it ends. With copies of its own for each chunk, their gradients
        # are added in the weights' float32 and not in the copies' 16 bits.
        torch.clear_autocast_cache()
        parts.append(recomputed(encode, *chunk, inside=inside))
    return _joined(parts)


def nothing(encoded: Any) -> Tensor:
    """0, (), with an edge to everything that has been encoded.

    A gradient of a part of the outputs would leave a chunk's other activations behind, of one chunk after another.
    """
    parts = [0.0 * at_least_float32(x).sum() for x in _tensors(encoded) if x.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros(())  # nothing learns but what the loss uses directly


def has_batch_norm(module: nn.Module) -> bool:
    """Whether chunks make a difference to it; not where its batch norms are frozen."""
    return any(isinstance(inner, _BatchNorm) and inner.training for inner in module.modules())


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs of several chunks as those of one: rows follow each other, numbers are the first chunk's."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.ndim else first
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    return type(first)(**{key: _joined([vars(part)[key] for part in parts]) for key in vars(first)})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None:
        return
    inner = value if isinstance(value, tuple) else (value if isinstance(value, dict) else vars(value)).values()
    for part in inner:
        yield from _tensors(part)
