"""What do micro-batches and gradient checkpointing save of a training step's memory, and what do they cost in time?

One forward and backward of `--method dinorankclip` (order 3, full fusion) on random images, captions and targets, one
thread, float32, with a ViT trunk, which has no batch norm, so that all four ways compute the same gradients (checked
before timing):

    whole           all pairs at once
    micro           train.micro_batch_size, an eighth of the batch
    checkpointing   train.grad_checkpointing
    both

Peak: growth of the peak resident set of a process of its own, from after model and batch exist to the end of the
backward; the gradients of all parameters, the same for every way, are in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from common import Timing, interleave, load, machine, markdown, parse, parser, report
from loss import CLEAR_PEAK, _peak_bytes
from torch import Tensor

from pipeline.losses.objective import Objective
from pipeline.losses.targets import TargetInfo
from pipeline.losses.weights import LossWeights
from pipeline.models.checkpointing import checkpoint_blocks
from pipeline.models.dinorankclip import DinoRankCLIP

WAYS = ("whole", "micro", "checkpointing", "both")
SIZE, GRID, WIDTH_GLOBAL, COMPONENTS = 112, 7, 64, 32
BASELINES: dict[str, Any] = {"gram": {"fine": 0.1}, "rkd": {"fine": 0.1, "global": 0.1}, "global": 0.5}


def make(way: str, pairs: int, layers: int) -> tuple[Objective, dict[str, Any]]:
    """The objective of a way, and a batch for it; the same for all ways."""
    torch.manual_seed(0)
    model = DinoRankCLIP(
        trunk={
            "embed_dim": 128,
            "vision_cfg": {"layers": layers, "width": 192, "head_width": 64, "patch_size": 16},
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": layers},
        },
        image_size=SIZE,
        student={"patch": 16, "depth": layers, "text_width": 128, "text_layers": 1},
        scales=[{"name": "fine", "grid": GRID, "depth_fraction": 1.0}],
        global_width=WIDTH_GLOBAL,
    )
    targets = TargetInfo(("fine",), {"fine": torch.ones(COMPONENTS)}, BASELINES)
    found = Objective(
        model, order=3, transition_depth=8, transition_dim=32, weights=LossWeights(ramp=0.0), targets=targets
    )
    if way in ("checkpointing", "both"):
        checkpoint_blocks(model)
    if way in ("micro", "both"):
        found.micro_batch_size = max(1, pairs // 8)
    stored = {
        "fine": torch.randint(-9, 9, (pairs, GRID**2, COMPONENTS), dtype=torch.int8),
        "global": torch.randn(pairs, WIDTH_GLOBAL).half(),
    }
    tokens = torch.randint(1, 400, (pairs, 32))
    tokens[:, 20], tokens[:, 21:] = 49407, 0
    return found, {"images": torch.randn(pairs, 3, SIZE, SIZE), "tokens": tokens, "targets": stored, "progress": 1.0}


def step(objective: Objective, batch: dict[str, Any]) -> Tensor:
    """Forward and backward; all gradients in one row."""
    objective.zero_grad(set_to_none=True)
    loss, _ = objective(**batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def peak_mebibytes(way: str, pairs: int, layers: int) -> float:
    """How far a step raises the peak resident memory; call it in a fresh process."""
    torch.set_num_threads(1)
    step(*make(way, 2, layers))  # what libraries allocate once does not count
    objective, batch = make(way, pairs, layers)
    with suppress(OSError):
        CLEAR_PEAK.write_text("5")
    before = _peak_bytes()
    loss, _ = objective(**batch)
    loss.backward()
    return (_peak_bytes() - before) / 2**20


def measure_peaks(pairs: int, layers: int) -> dict[str, float]:
    context = multiprocessing.get_context("forkserver")  # clean processes that need not import torch again
    context.set_forkserver_preload(["torch", "pipeline.losses.objective", "pipeline.models.dinorankclip"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {way: pool.submit(peak_mebibytes, way, pairs, layers).result() for way in WAYS}


def measure_times(pairs: int, layers: int, rounds: int) -> dict[str, Timing]:
    """Time the ways in turns, after checking that their gradients are the same."""
    made = {way: make(way, pairs, layers) for way in WAYS}
    whole = step(*made["whole"])
    for way in WAYS[1:]:
        off = float((step(*made[way]) - whole).norm() / whole.norm())
        if not off < 1e-4:
            raise ValueError(f"the gradients of {way} are off by {off:.1e}")

    def once(way: str, _: int) -> None:
        step(*made[way])

    return interleave({way: partial(once, way) for way in WAYS}, rounds)


def main() -> None:
    counts = {
        "pairs": (128, 8, "pairs in the batch"),
        "layers": (8, 1, "layers of trunk and student"),
        "rounds": (3, 1, "rounds of timing"),
    }
    measure(*parse(parser(__doc__), counts))


def measure(arguments: argparse.Namespace, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    pairs, layers, rounds = numbers
    before = load()
    peaks, times = measure_peaks(pairs, layers), measure_times(pairs, layers, rounds)
    figures, rows = {}, []
    for way in WAYS:
        ratio = times[way].ratio(times["whole"], "cpu")
        figures |= {f"{way}/peak_mebibytes": peaks[way], f"{way}/cpu_seconds": times[way].median("cpu")}
        figures[f"{way}/ratio_of_cpu_time_to_whole"] = ratio
        rows.append([way, f"{peaks[way]:,.0f}", f"{times[way].median('cpu'):.3g}", f"{ratio:.2f}"])
    table = markdown(["way", "peak MiB", "CPU s", "CPU / whole"], rows)
    report(arguments, machine(("torch", "timm", "open_clip_torch")), before, table, figures)


if __name__ == "__main__":
    main()
