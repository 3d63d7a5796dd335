"""Trading time for memory: what is said to a model before it trains."""

from __future__ import annotations

from pipeline.console import log
from pipeline.distributed import rank, world_size
from pipeline.losses.chunks import has_batch_norm
from pipeline.losses.objective import Objective
from pipeline.models.checkpointing import checkpoint_blocks


def save_memory(
    objective: Objective, *, micro_batch_size: int | None, batch_size: int, grad_checkpointing: bool = False
) -> None:
    """Let a process encode a few pairs at a time (losses.chunks), and blocks keep their inputs alone.

    Args:
        micro_batch_size: pairs at once; None: all. batch_size: of all processes, for what is said.
        grad_checkpointing: see models.checkpointing.
    """
    if grad_checkpointing:
        checkpoint_blocks(objective.model)
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
