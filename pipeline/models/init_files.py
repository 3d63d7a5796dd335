"""Weights that a model can start from (`model.init`): a model of ours, or an open_clip checkpoint. Read, not applied.

    a run's folder, an exported model    model.safetensors of ours: trunk, student, fusion, and how images were seen
    an open_clip checkpoint              .pt as its trainer writes it (`state_dict`, names behind `module.`), or
                                         .safetensors; of a folder open_clip_model.safetensors with its
                                         open_clip_config.json, which says what trunk and normalisation it is

Nothing in a file is executed: safetensors, JSON, and torch files of tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import PipeError
from pipeline.models.serialise import FORMAT, read_model
from pipeline.run_folder import RunFolder, read_json
from pipeline.teacher.weights import read_state_dict

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's files hold beside them
VIEWS = {"shortest": "crop", "squash": "squash"}  # open_clip's resize_mode → data.view
TRUNK = "trunk.clip."


@dataclass(frozen=True)
class Init:
    """What a file offers.

    Attributes:
        path: the file itself.
        weights: by the names that `DinoRankCLIP` gives them.
        trunk: an open_clip name or model config; None where the file does not say.
        image_size, view, mean, std: how images were seen; None where the file does not say.
        said: what had to be assumed, for the user.
    """

    path: Path
    weights: dict[str, Tensor]
    trunk: str | Mapping[str, Any] | None = None
    image_size: int | None = None
    view: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    said: list[str] = field(default_factory=list)


def refused(what: str, path: Path, fix: str) -> PipeError:
    """The one line that every problem with `model.init` is."""
    return PipeError(what, where=f"model.init {path}", fix=fix)


def locate(path: Path) -> Path:
    """The file that `model.init` means.

    Raises:
        PipeError: there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise refused("there is no such file or folder", path, "name a run's folder, such as workspace/runs/clip")
    candidates = [RunFolder(path).weights, *(path / name for name in OPEN_CLIP_FILES)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if RunFolder(path).record.exists():
        raise refused("this run is not finished", path, "go on with it: pipe train --resume")
    names = ", ".join(candidate.name for candidate in candidates)
    raise refused(f"this folder holds no model ({names})", path, "name a run's folder, or the checkpoint itself")


def read_init(path: Path) -> Init:
    """The weights that `path`, a file or folder, offers.

    Raises:
        PipeError: there are none, or they cannot be read.
    """
    file = locate(path)
    try:
        return _ours(file) if _is_ours(file) else _open_clip(file)
    except PipeError as error:
        if str(error.where).startswith("model.init"):
            raise
        raise refused(error.what, file, error.fix or "name another file") from error


def _is_ours(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise refused(f"this file cannot be read ({reason})", file, "save or copy it again") from error


def _ours(file: Path) -> Init:
    stored = read_model(file)
    preprocess = stored.preprocess
    try:
        return Init(
            path=file,
            weights=stored.weights,
            trunk=stored.arguments["trunk"],
            image_size=int(stored.arguments["image_size"]),
            view=preprocess["view"]["kind"],
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise refused("the model file's metadata are damaged", file, "train or export it again") from error


def _open_clip(file: Path) -> Init:
    weights = {f"{TRUNK}{name}": value for name, value in _bare(read_state_dict(file)).items()}
    config = file.parent / OPEN_CLIP_CONFIG
    if file.name not in OPEN_CLIP_FILES or not config.is_file():
        said = ["a bare checkpoint: normalisation (OpenAI's), view, heads and activation are taken to be the config's"]
        return Init(file, weights, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD, said=said)
    body = read_json(config)
    try:
        trunk, seen = dict(body["model_cfg"]), dict(body.get("preprocess_cfg") or {})
        size = trunk["vision_cfg"].get("image_size", 224)
        mode = seen.get("resize_mode") or "shortest"
        return Init(
            path=file,
            weights=weights,
            trunk=trunk,
            image_size=size if isinstance(size, int) else int(size[0]),
            view=VIEWS.get(mode, mode),
            mean=tuple(seen.get("mean") or OPENAI_DATASET_MEAN),
            std=tuple(seen.get("std") or OPENAI_DATASET_STD),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refused(
            f"{OPEN_CLIP_CONFIG} is not open_clip's", file, "correct it, or name a bare checkpoint"
        ) from error


def _bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wraps a model in training, and without what is no weight."""
    found = dict(weights)
    for prefix in (*PREFIXES, *PREFIXES):  # one around the other, in either order
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return {name: value for name, value in found.items() if name not in NO_WEIGHTS}
