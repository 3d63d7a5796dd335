"""Which part of the loss pulls, and on which part of the model: gradient norms to log.

Nothing here changes a step: gradients of single terms are taken from the step's own graph, and `.grad` is only read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed import mean_over_ranks
from pipeline.losses.plackett_luce import at_least_float32

BUCKET = 1 << 24  # numbers in one exchange


def term_norms(
    terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], scaler: Any = None
) -> dict[str, Tensor]:
    """‖∂(λ · term)/∂parameters‖ of every weighted term, over all processes' pairs; the graphs are kept.

    One backward a term. Every process must call it in the same step, with the same terms.

    Args:
        terms: name → (), as `Objective.terms` has them.
        scaler: fp16's gradient scaler; small gradients would be lost without it.
    """
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    norms = {}
    for name, term in terms.items():
        if not term.requires_grad:  # all that it looks at is frozen
            norms[name] = term.detach().new_zeros(())
            continue
        found = torch.autograd.grad(factor * term, parameters, retain_graph=True, allow_unused=True)
        # A parameter that this process's graph does not reach is not reached in any: the graphs are alike.
        squared = [mean.div(factor).square().sum() for mean in _averaged(g for g in found if g is not None)]
        norms[name] = torch.stack(squared).sum().sqrt() if squared else term.new_zeros(())
    return norms


def _averaged(gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    """Their means over processes, flat, many in one exchange."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(at_least_float32(gradient).flatten())
        if sum(map(len, bucket)) >= BUCKET:
            yield mean_over_ranks(torch.cat(bucket))
            bucket = []
    if bucket:
        yield mean_over_ranks(torch.cat(bucket))


def part_norms(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """‖.grad‖ by part: trunk, student, fusion (its gates too), gate, transitions, and whatever else learns."""
    squared: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in named:
        if parameter.grad is None:
            continue
        for part in _parts(name.split(".")):
            squared[part].append(torch.linalg.vector_norm(at_least_float32(parameter.grad.detach())).square())
    return {part: torch.stack(values).sum().sqrt() for part, values in squared.items()}


def _parts(path: list[str]) -> list[str]:
    part = path[1] if path[0] == "model" else path[0]
    return [part, "gate"] if part == "fusion" and "gate" in path[1:] else [part]
