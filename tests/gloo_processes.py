"""Two and four gloo processes, started once for all tests that need them: importing torch costs seconds.

A module of tests takes part by a function `as_one_of(number, world) -> dict` of tensors and plain values.
"""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HERE = Path(__file__).parent
MODULES = ("test_distributed", "test_baselines_distributed", "test_training_distributed")
WORLDS = (4, 2)

Found = dict[str, dict[int, list[dict[str, Any]]]]  # module → number of processes → what each of them found


def start(folder: Path) -> Found:
    """Run every module's part in every world; this process is rank 0."""
    others = [mp.get_context("spawn").Process(target=_as_process, args=(n, str(folder))) for n in range(1, max(WORLDS))]
    for other in others:
        other.start()
    threads = torch.get_num_threads()
    try:
        _as_process(0, str(folder))
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.join(timeout=60)
            other.kill()
    load = lambda module, world, n: torch.load(folder / f"{module}-{world}-{n}.pt", weights_only=True)  # noqa: E731
    return {module: {world: [load(module, world, n) for n in range(world)] for world in WORLDS} for module in MODULES}


def _as_process(number: int, folder: str) -> None:
    sys.path[:0] = [str(HERE), str(HERE / "losses")]
    torch.set_num_threads(1)
    for world in WORLDS:
        if number >= world:
            continue
        meeting, patience = f"file://{folder}/meet{world}", timedelta(minutes=2)
        dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=world, timeout=patience)
        try:
            for module in MODULES:
                found = importlib.import_module(module).as_one_of(number, world)
                torch.save(found, Path(folder) / f"{module}-{world}-{number}.pt")
        finally:
            dist.destroy_process_group()
