"""What does each term of distillation cost a training step?

The whole objective on random pixels, captions and targets: forward, backward and AdamW's update, without reading data.
Tasks differ in the weights of the distillation alone; "none" has them all at 0 (the control `no-distill`: the student
is still computed, as the fusion reads it), "trunk" has no student. Every task's ratio is to "none".

    python benchmarks/distillation.py [--batch 64] [--rounds 7] [--pixels 112] [--quick] [--json FILE]
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import Task, Timing, interleave, load, machine, markdown, parse, parser, report

from pipeline.losses.measured import Measured
from pipeline.losses.objective import Objective
from pipeline.losses.targets import TargetInfo
from pipeline.losses.weights import LossWeights
from pipeline.models.dinorankclip import DinoRankCLIP

GLOBAL, COMPONENTS, GRID = 320, {"fine": 96, "coarse": 256}, 7
ZERO = {"gram": 0.0, "rkd": 0.0, "global_": 0.0}
TASKS: dict[str, dict[str, float]] = {
    "none": ZERO,
    "gram": ZERO | {"gram": 1.0},
    "rkd": ZERO | {"rkd": 1.0},
    "global": ZERO | {"global_": 1.0},
    "kd": ZERO | {"kd": 1.0},
    "crd": ZERO | {"crd": 1.0},
    "gram, rkd, global": {},
    "all five": {"kd": 1.0, "crd": 1.0},
}
TRUNK = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
STUDENT = {"name": "vit_tiny_patch16_224", "patch": 16, "depth": 4, "text_width": 128, "text_layers": 2}


def model(pixels: int, *, student: bool) -> DinoRankCLIP:
    """The network of configs/small.yaml, with targets of a MobileNetV2's shapes."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"trunk": copy.deepcopy(TRUNK), "image_size": pixels}
    if student:
        scales = [{"name": name, "grid": GRID, "depth_fraction": f} for name, f in (("fine", 0.8), ("coarse", 1.0))]
        arguments |= {"student": STUDENT, "scales": scales, "global_width": GLOBAL}
    return DinoRankCLIP(**arguments)


def targets() -> TargetInfo:
    mean = torch.nn.functional.normalize(torch.ones(GLOBAL), dim=0)
    tokens = {name: torch.ones(GRID**2, width) for name, width in COMPONENTS.items()}
    measured = Measured(mean, mean, tokens, dict.fromkeys(COMPONENTS, 0.5))
    ones = dict.fromkeys(COMPONENTS, 1.0)
    steps = {name: torch.ones(width) for name, width in COMPONENTS.items()}
    return TargetInfo(tuple(COMPONENTS), steps, {"gram": ones, "rkd": ones | {"global": 1.0}, "global": 1.0}, measured)


def step_of(weights: dict[str, float], pixels: int, inputs: dict[str, Any], *, student: bool = True) -> Task:
    """A task that takes one training step of an objective of its own, order 0."""
    device = inputs["images"].device
    objective = Objective(
        model(pixels, student=student),
        order=0,
        transition_depth=32,
        transition_dim=64,
        weights=LossWeights(**weights),  # type: ignore[arg-type]
        targets=targets() if student else None,
    ).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    stored = inputs["targets"] if student else None

    def step(_: int) -> None:
        loss, _ = objective(inputs["images"], inputs["tokens"], stored, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def batch(size: int, pixels: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (size, 32), generator=generator)
    tokens[:, 14], tokens[:, 15:] = 49407, 0
    stored = {
        name: torch.randint(-127, 128, (size, GRID**2, width), generator=generator, dtype=torch.int8)
        for name, width in COMPONENTS.items()
    }
    stored["global"] = torch.randn(size, GLOBAL, generator=generator).half()
    return {
        "images": torch.randn(size, 3, pixels, pixels, generator=generator).to(device),
        "tokens": tokens.to(device),
        "targets": {name: value.to(device) for name, value in stored.items()},
    }


def tabulate(timings: dict[str, Timing]) -> tuple[str, dict[str, float]]:
    none, figures, cells = timings["none"], {}, []
    for name, timing in timings.items():
        key = name.replace(", ", "+").replace(" ", "_")
        ratio, cpu_ratio = timing.ratio(none), timing.ratio(none, "cpu")
        figures |= {f"{key}/seconds_per_step": timing.median(), f"{key}/cpu_seconds_per_step": timing.median("cpu")}
        figures |= {f"{key}/ratio_of_time_to_none": ratio, f"{key}/ratio_of_cpu_time_to_none": cpu_ratio}
        cells.append(
            [name, f"{timing.median():.3f}", f"{timing.median('cpu'):.3f}", f"{ratio:.3f}", f"{cpu_ratio:.3f}"]
        )
    return markdown(["terms", "s a step", "CPU s a step", "time / none", "CPU / none"], cells), figures


def main() -> None:
    arguments, (size, rounds, pixels) = parse(
        parser(__doc__),
        {
            "batch": (64, 4, "pairs a step"),
            "rounds": (7, 1, "rounds"),
            "pixels": (112, 112, "side of the images, a multiple of 112"),
        },
    )
    load_before = load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = batch(size, pixels, device)
    tasks = {"trunk": step_of({}, pixels, inputs, student=False)}
    chosen = ("none", "all five") if arguments.quick else tuple(TASKS)
    tasks |= {name: step_of(TASKS[name], pixels, inputs) for name in chosen}
    table, figures = tabulate(interleave(tasks, rounds))
    figures |= {"pairs": size, "pixels": pixels, "threads": torch.get_num_threads()}
    described = f"{machine(('torch', 'timm', 'open_clip_torch'))}; {device}, {torch.get_num_threads()} threads"
    report(arguments, described, load_before, table, figures)


if __name__ == "__main__":
    main()
