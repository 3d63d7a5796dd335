"""`pipe teacher check`: is the configured teacher the DINOv3 that was published?"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipeError
from pipeline.teacher.golden import (
    IMAGE,
    MEAN,
    NETWORKS,
    SCALE,
    SIZE,
    STD,
    TOKENS,
    Comparison,
    Golden,
    compare,
    published,
    read_golden,
)
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.weights import WeightsUnavailable
from stages.extract_teacher import load

CLOSE = 0.05  # with random weights, pixels one grey level off moved a value by 0.01, other weights by 1


def check(config: Config, *, image: Path | None, golden: Path | None, as_json: bool) -> None:
    """Compare the teacher with published values, print both, and fail unless they agree.

    Args:
        image: the photograph of the published values.
        golden: in its place, a folder with values of one's own and their image.

    Raises:
        PipeError: values differ, or the weights or the image are missing.
    """
    if image is not None and golden is not None:
        raise PipeError("--image and --golden exclude each other", fix="give one of them")
    values = read_golden(golden) if golden is not None else None if image is None else published(image)
    missing = [] if values is not None and values.image.is_file() else [f"the image: {_image(values)}"]
    teacher: Teacher | None = None
    try:
        teacher = load(config, image_size=SIZE, scales=[SCALE], mean=MEAN, std=STD)  # as the values were made
    except WeightsUnavailable as error:
        missing.append(f"the weights: {error.what}, {error.where}")
    if missing or teacher is None or values is None:
        repositories = " or ".join(network.repository for network in NETWORKS.values())
        raise PipeError(
            f"cannot check, for want of {'; of '.join(missing)}",
            fix=f"download what is missing (weights: {repositories} on the Hugging Face hub, licence to be accepted "
            "there, as teacher.name hf:./FOLDER; the image by --image FILE)",
        )
    found = compare(teacher, values)
    _show(teacher, found, as_json)
    if not found.passed:
        raise _failure(config, teacher, found)


def _image(values: Golden | None) -> str:
    return f"no file {values.image}" if values is not None else f"{IMAGE}, by --image FILE"


def _show(teacher: Teacher, found: Comparison, as_json: bool) -> None:
    if as_json:
        figures = {
            "teacher": teacher.name,
            "weights_sha256": teacher.weights_sha256,
            "network": NETWORKS[found.network].title,
            "passed": found.passed,
            "tolerance": found.tolerance,
            "differences": {token: found.difference(token) for token in TOKENS},
            "expected": {token: list(found.expected[token]) for token in TOKENS},
            "found": {token: list(found.found[token]) for token in TOKENS},
        }
        print(json.dumps(figures, indent=2))
        return
    print(f"{teacher.name}, weights {teacher.weights_sha256[:12]}, against {NETWORKS[found.network].title}")
    for token in TOKENS:
        print(f"{token:<7} expected {_numbers(found.expected[token])}")
        print(f"{'':<7} found    {_numbers(found.found[token])}   largest difference {found.difference(token):.2g}")
    print(f"tolerance {found.tolerance:g}: {'they agree' if found.passed else 'they differ'}")


def _numbers(values: tuple[float, ...]) -> str:
    return "  ".join(f"{value:9.5f}" for value in values)


def _failure(config: Config, teacher: Teacher, found: Comparison) -> PipeError:
    name = config.teacher.name
    largest = max(found.difference(token) for token in TOKENS)
    if config.teacher.random_weights:
        fix = "these are random weights: unset teacher.random_weights"
    elif largest <= CLOSE:
        fix = "so close, look at the image (its decoding, or another copy of it) and at the weights' precision"
        if "dinov3" in name and name.startswith("vit_") and "_qkvb" not in name:
            fix = f"timm's {name} has no qkv biases: use {name.replace('_dinov3', '_dinov3_qkvb')}"
    else:
        fix = "these are not the published weights, or not in this network; look at teacher.name and teacher.checkpoint"
    differences = ", ".join(f"{token} by up to {found.difference(token):.2g}" for token in TOKENS)
    return PipeError(
        f"the features differ from those of {NETWORKS[found.network].title}: {differences} "
        f"(tolerance {found.tolerance:g})",
        where=teacher.name,
        fix=fix,
    )
