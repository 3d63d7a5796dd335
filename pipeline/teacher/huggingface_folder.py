"""What `teacher.name: hf:...` means, and what its folder says, without loading the model.

hf:./dinov3-vitb16, hf:/models/dinov3-vitb16, hf:~/dinov3    a folder as `save_pretrained` writes it
hf:facebook/dinov3-vitb16-pretrain-lvd1689m                  a repository (a folder of that name goes first)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import sha256_file

PREFIX = "hf:"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def is_huggingface(name: str) -> bool:
    """Whether `teacher.name` names a model of the transformers library."""
    return name.startswith(PREFIX)


def is_path(name: str) -> bool:
    """Whether what stands behind hf: can only be a folder."""
    return name.removeprefix(PREFIX).startswith((".", "/", "~"))


def label(name: str) -> str:
    """The name as a cache records it: of a path only the last part, so that the folder may move."""
    return PREFIX + Path(os.path.abspath(Path(name.removeprefix(PREFIX)).expanduser())).name if is_path(name) else name


def local_folder(name: str) -> Path | None:
    """The folder that `name` means, if it is on this machine."""
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    return folder if folder.is_dir() else None


def folder_origin(folder: Path, *, random_weights: bool) -> dict[str, str]:
    """`origin`: pretrained or random; `file_sha256`: over the names and hashes of config.json and, if pretrained, of
    the weights. (The configuration shapes the features too: heads and epsilons leave no trace in the weights.)"""
    patterns = (CONFIG,) if random_weights else (CONFIG, *WEIGHTS)
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    listed = json.dumps([[path.name, sha256_file(path)] for path in files])
    return {
        "origin": "random" if random_weights else "pretrained",
        "file_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def asked_origin(name: str, *, random_weights: bool) -> dict[str, str]:
    """What a configuration says of the weights; their hash only where the folder is on this machine."""
    if folder := local_folder(name):
        return folder_origin(folder, random_weights=random_weights)
    if is_path(name):
        log.info("%s is not on this machine: not compared with the teacher cache's weights", name)
    return {"origin": "random" if random_weights else "pretrained"}


def folder_normalisation(folder: Path) -> dict[str, Any]:
    """mean and std in preprocessor_config.json; empty where there is none, or where it says not to normalise.

    Its sizes and filters are not used: the view is `data.view`, the same for everyone.
    """
    path = folder / PROCESSOR
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
        if not values.get("do_normalize", True):
            return {}
        return {"mean": values.get("image_mean"), "std": values.get("image_std")}
    except (ValueError, AttributeError) as error:
        raise PipeError("cannot read this file", where=path, fix="give teacher.mean and teacher.std") from error
