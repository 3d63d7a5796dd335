"""Trading time for memory: what is said to a model before it trains."""

from __future__ import annotations

from pipeline.console import log
from pipeline.distributed import rank, world_size
from pipeline.losses.chunks import has_batch_norm
from pipeline.losses.objective import Objective


def save_memory(objective: Objective, *, micro_batch_size: int | None, batch_size: int) -> None:
    """Let a process encode a few pairs at a time (see losses.chunks).

    Args:
        micro_batch_size: pairs at once; None: all. batch_size: of all processes, for what is said.
    """
    objective.micro_batch_size = micro_batch_size
    share = -(-batch_size // world_size())
    if micro_batch_size is None or micro_batch_size >= share or rank():
        return
    if has_batch_norm(objective.model):
        log.warning(
            "train.micro_batch_size: batch norms see %d pairs at a time, not %d: results differ from whole batches'",
            -(-share // -(-share // micro_batch_size)),
            share,
        )
