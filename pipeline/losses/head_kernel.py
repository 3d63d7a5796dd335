"""Which code scores the head's positions: the chunked one of `ranking`, or on a GPU the Triton kernels.

Compiled kernels are trusted after they have given, once in a process for each width d and on its own device, what the
chunked code gives on a small problem; where Triton is missing or they do not, the chunked code stays, and the log says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.losses import ranking
from pipeline.losses.ranking import Ranked

Head = Literal["auto", "chunked", "triton"]
CLOSE = 1e-4  # of a gradient's largest value


def head_kernel(asked: Head, device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., Ranked]:
    """The function to call as `ranking.with_transitions`.

    Args:
        width: d, the transition width.
        asked: "auto" takes Triton for float32 on a GPU where it can be trusted.

    Raises:
        PipeError: "triton" was asked for and cannot be had.
    """
    possible = dtype == torch.float32
    if asked == "chunked" or (asked == "auto" and not (possible and device.type == "cuda")):
        return ranking.with_transitions
    reason = _reason_against(device, width) if possible else f"it takes float32, not {dtype}"
    if reason is None:
        from pipeline.losses import ranking_triton

        return ranking_triton.with_transitions
    if asked == "triton":
        raise PipeError(f"the Triton kernels cannot be used: {reason}", where="loss.head", fix="set loss.head: chunked")
    return ranking.with_transitions


@cache
def _reason_against(device: torch.device, width: int) -> str | None:
    """Why the kernels cannot be used on a device at a width, None where they can; found out, and logged, once."""
    try:
        reason = _tried(device, width)
    except ImportError:
        reason = "Triton is not installed"
    except Exception as error:  # a compiler's or a driver's, of whatever kind
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason is not None:
        log.warning("transitions are scored by the chunked code, not by Triton: %s", reason)
    return reason


def _tried(device: torch.device, width: int) -> str | None:
    from pipeline.losses import ranking_triton

    if width > ranking_triton.WIDEST:
        return f"they take transitions up to {ranking_triton.WIDEST} wide, not {width}"
    generator = torch.Generator().manual_seed(0)
    lists, candidates, depth = 3, 150, 40

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    ranking_of = torch.stack([torch.randperm(candidates, generator=generator)[:depth] for _ in range(lists)]).to(device)
    weights = torch.full((depth,), 1 / depth, dtype=torch.float64, device=device)
    scale = torch.tensor(14.0, device=device)
    keys = torch.nn.functional.normalize(drawn(candidates, width), dim=1)
    utilities = 100 * (2 * torch.rand(lists, candidates, generator=generator) - 1).to(device)  # as s = 100 gives
    given = (utilities, drawn(lists, depth, width), keys, ranking_of, scale, weights)
    ours = ranking_triton.with_transitions(*given, gradient=True)
    theirs = ranking.with_transitions(*given, gradient=True, cells=1 << 20)
    for name in ("nll", "utilities", "queries", "keys", "scale"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        if not off <= CLOSE:
            return f"its {name} are off by {off:.1e} on {device}"
    return None
