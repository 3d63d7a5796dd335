"""`pipe model`: what each part of a model has and costs, of a configuration or of a trained model.

Nothing is trained, downloaded or given memory: the network is built without weights (torch's meta device).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config, read_yaml, validate
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.models.dinorankclip import DinoRankCLIP
from pipeline.models.parts import Part, budgets, extra, head, on_meta, parts
from pipeline.run_folder import RunFolder, Workspace

COUNTED = (
    "FLOPs of one image-text pair, two for each multiply-add: products, convolutions and attention, not norms, "
    "activations, losses and the lists themselves"
)


@dataclass
class Described:
    """A model to be counted, and where what is known of it comes from.

    Attributes:
        config: None for an exported model, whose losses are not known.
        notes: for the user.
    """

    model: DinoRankCLIP
    config: Config | None
    notes: list[str] = field(default_factory=list)


def run(config: Config | None, run: str | None, *, as_json: bool) -> None:
    """Print parameters and FLOPs by part.

    Args:
        config: may be None where `run` is a path.
        run: a run's name, its folder, or an exported model; None: what the configuration describes.
    """
    found = of_run(config, run) if run is not None else of_config(config)
    rows = parts(found.model) | losses(found)
    if as_json:
        print(json.dumps(figures(found, rows), indent=2))
    else:
        print(shown(found, rows))


# ---- which model -----------------------------------------------------------------------------------------------------


def of_config(config: Config | None) -> Described:
    """The model that `pipe train` would build."""
    from stages.train_setup import model_arguments

    assert config is not None
    scales: list[dict[str, Any]] = []
    width, notes = None, []
    if config.model.parts.student:
        scales, width, note = teacher_of(config)
        notes.append(note)
    model = on_meta(model_arguments(config, scales, width))
    if config.model.freeze_trunk:
        model.trunk.freeze()
        notes.append("the trunk is frozen: it has no backward pass")
    return Described(model, config, notes)


def teacher_of(config: Config) -> tuple[list[dict[str, Any]], int, str]:
    """The teacher's scales and the width of `global`, from the cache or else its architecture; and which it was."""
    from pipeline.cache.layout import ScaleSpec
    from pipeline.cache.reader import open_cache
    from pipeline.teacher.shape import teacher_shape
    from stages.train_setup import cached_scales

    teacher = config.teacher
    place = config.data.cache or str(Workspace(config.workspace).teacher)
    if "://" not in place and Path(place).exists():
        cache = open_cache(place)
        asked, there = ({(s.name, s.grid) for s in of} for of in (teacher.scales, cache.scales))
        if asked != there:
            log.warning("%s has other scales than the configuration: pipe train will refuse it", place)
        return cached_scales(cache), cache.global_width, f"scales and depths: of the teacher cache {place}"
    specs = [ScaleSpec(s.name, s.layer, s.grid) for s in teacher.scales]
    shape = teacher_shape(teacher.name, model_args=teacher.model_args, image_size=teacher.image_size, scales=specs)
    note = f"scales and depths: of the architecture of {teacher.name}, as no cache is at hand"
    return shape.scales, shape.global_width, note


def of_run(config: Config | None, run: str) -> Described:
    """A trained model, by a run's name, its folder, or its file."""
    from pipeline.models.serialise import read_model

    path = Path(run)
    if not path.exists():
        if config is None:
            raise PipeError("there is no such run, folder or file", where=run, fix="name one, or give --config")
        path = Workspace(config.workspace).run(run).path
    stored = read_model(path)
    model, notes = on_meta(stored.arguments), [f"as trained: {path}"]
    saved = RunFolder(path if path.is_dir() else path.parent).config
    if not saved.is_file():
        return Described(model, None, [*notes, "what belongs to the losses (transitions) is not in a model's file"])
    trained = validate(read_yaml(saved), where=saved)
    if trained.model.freeze_trunk:
        model.trunk.freeze()
        notes.append("the trunk was frozen: it had no backward pass")
    return Described(model, trained, notes)


# ---- what there is besides the model ---------------------------------------------------------------------------------


def losses(found: Described) -> dict[str, Part]:
    """What trains beside the model, and what a method asks of it for each pair."""
    import torch

    from pipeline.losses.transitions import Transitions
    from pipeline.models.simclr import SimCLRHead

    config, model = found.config, found.model
    if config is None:
        return {}
    rows: dict[str, Part] = {}
    loss, order = config.loss, config.train.order
    with torch.device("meta"):
        if order >= 2:
            sides = [Transitions(model.trunk.embed_dim, order, loss.transition_dim) for _ in ("image", "text")]
            rows["transitions"] = head(torch.nn.ModuleList(sides))
        if loss.simclr:
            simclr = SimCLRHead(model.trunk.pooled_width, loss.simclr_hidden, loss.simclr_dim)
            rows["simclr"] = extra(model, simclr=simclr)
    if loss.contrastive == "alip":
        rows["second_caption"] = extra(model, texts=2)
    if model.arguments["scales"] and loss.rkd:
        rows["residuals"] = Part(len(model.arguments["scales"]) + 1, 0, 0)  # a number for each relational term
    return rows


# ---- output ----------------------------------------------------------------------------------------------------------


def total(rows: dict[str, Part]) -> Part:
    return Part(*(sum(getattr(row, name) for row in rows.values()) for name in ("parameters", "forward", "training")))


def figures(found: Described, rows: dict[str, Part]) -> dict[str, Any]:
    """Everything that is printed, as numbers."""
    from pipeline.models.cost import inference_flops

    of_budgets = {
        name: {"parameters": has, "below": most, "kept": has < most} for name, (has, most) in budgets(rows).items()
    }
    return {
        "trunk": found.model.arguments["trunk"],
        "image_size": found.model.arguments["image_size"],
        "scales": found.model.arguments["scales"],
        "notes": found.notes,
        "parts": {name: asdict(row) for name, row in rows.items()},
        "total": asdict(total(rows)),
        "budgets": of_budgets,
        "inference": inference_flops(found.model),
    }


def shown(found: Described, rows: dict[str, Part]) -> str:
    """The same for people."""
    numbers = figures(found, rows)
    trunk = numbers["trunk"] if isinstance(numbers["trunk"], str) else "of its own config"
    lines = [f"trunk {trunk} at {numbers['image_size']} px", *numbers["notes"]]
    lines += [
        f"scale {s['name']}: {s['grid']} x {s['grid']}, at {s['depth_fraction']:.2f} of the teacher's depth"
        for s in numbers["scales"]
    ]
    lines += ["", f"{'part':<16}{'parameters':>14}{'forward GFLOPs':>18}{'training GFLOPs':>18}"]
    for name, row in (*rows.items(), ("total", total(rows))):
        cells = [f"{row.parameters:>14,}", f"{row.forward / 1e9:>18.4f}", f"{row.training / 1e9:>18.4f}"]
        lines.append(f"{name.replace('_', ' '):<16}{''.join(cells)}")
    lines += ["", *(_budget(name, **budget) for name, budget in numbers["budgets"].items())]
    each = numbers["inference"]
    lines.append(f"inference: {each['image'] / 1e9:.4f} GFLOPs an image, {each['text'] / 1e9:.4f} a text")
    return "\n".join([*lines, COUNTED])


def _budget(name: str, *, parameters: int, below: int, kept: bool) -> str:
    verdict = "kept" if kept else "EXCEEDED"
    return f"budget of the {name}: {parameters / 1e6:.2f} of {below / 1e6:g} million parameters, {verdict}"
