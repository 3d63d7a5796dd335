"""What this machine offers: devices, precision, workers; and what a run took of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from pipeline.errors import PipeError

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["auto", "no", "bf16", "fp16"]


def is_main() -> bool:
    """Whether this is the process that writes, as launchers say it; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def several_gpus_alone() -> bool:
    """Whether several GPUs are visible and no launcher has shared them out."""
    return torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ


def accelerator(asked: Precision, *, ddp: Mapping[str, Any]) -> Accelerator:
    """What places model and batches, speaks to the other processes and keeps the precision.

    Args:
        asked: see `precision`. ddp: keyword arguments of DistributedDataParallel; those at Accelerate's defaults are
            left out by it.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    wrapping = DistributedDataParallelKwargs(**ddp)
    return Accelerator(mixed_precision=precision(asked), cpu=not torch.cuda.is_available(), kwargs_handlers=[wrapping])


def precision(asked: Precision) -> str:
    """`auto`: bf16 where the GPU has it, fp16 on older GPUs, float32 on a CPU.

    Raises:
        PipeError: fp16 without a GPU, which Accelerate would turn into float32 without a word.
    """
    if asked == "fp16" and not torch.cuda.is_available():
        raise PipeError("fp16 needs a GPU", where="train.precision", fix="use auto, bf16 or no")
    if asked != "auto":
        return asked
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for what a step draws from: the CPU's generator, and that of this process's GPU.

    The original also leaves word for every kind of accelerator that is not there, which takes a hundred times as long.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def data_workers(asked: int | Literal["auto"], processes: int) -> int:
    """Worker processes a training process; `auto`: its share of the cores on a GPU node, one on a CPU."""
    if asked != "auto":
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(12, cores // processes - 1)) if torch.cuda.is_available() else min(1, cores - 1)


def peak_memory() -> int:
    """Bytes at this process's peak: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe() -> str:
    """`8 × NVIDIA H100 80GB HBM3` or `x86_64 CPU, 2 threads`."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
