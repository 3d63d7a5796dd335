"""What a student must know of its teacher, from the teacher's architecture alone: no weights, no cache, no download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.cache.layout import ScaleSpec
from pipeline.teacher.features import Backbone, Layered
from pipeline.teacher.huggingface import architecture
from pipeline.teacher.huggingface_folder import is_huggingface
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.weights import network


@dataclass(frozen=True)
class Shape:
    """`scales`: [{name, grid, depth_fraction}], as models.dinorankclip takes them; `global_width`: C."""

    scales: list[dict[str, Any]]
    global_width: int


def teacher_shape(
    name: str, *, model_args: Mapping[str, Any] | None = None, image_size: int, scales: Sequence[ScaleSpec]
) -> Shape:
    """The shape of a teacher's features; its network is built without memory for weights (torch's meta device).

    Args: as for `load_teacher`.

    Raises:
        PipeError: unknown name, a size, layer or grid that is not possible, or a model of transformers whose
            config.json is not on this machine.
    """
    arguments = dict(model_args or {})
    with torch.device("meta"):
        backbone: Layered
        if is_huggingface(name):
            backbone = architecture(name)
        else:
            backbone = Backbone(network(name, arguments, image_size=image_size))
        teacher = Teacher(
            backbone,
            name=name,
            origin={},
            model_args=arguments,
            image_size=image_size,
            scales=scales,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
    found = [{key: scale[key] for key in ("name", "grid", "depth_fraction")} for scale in teacher.describe()["scales"]]
    return Shape(found, teacher.global_width)
