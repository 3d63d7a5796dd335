"""model.safetensors: weights, and in the metadata everything that is needed to build the network they belong to.

Metadata (strings, as the format wants): format, version, arguments (JSON), preprocess (JSON), and what the run adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder, write_bytes

FORMAT = "dinorankclip"
VERSION = "1"
RESERVED = ("format", "version", "arguments", "preprocess")


@dataclass(frozen=True)
class Stored:
    """What a model file holds: constructor arguments, preprocessing, weights, and further metadata."""

    arguments: dict[str, Any]
    preprocess: dict[str, Any]
    weights: dict[str, Tensor]
    extra: dict[str, str]


def write_model(
    model: nn.Module,
    path: Path,
    *,
    arguments: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    extra: Mapping[str, str],
) -> None:
    """Write `path` atomically; weights go to the CPU and keep their dtype.

    Raises:
        PipeError: `extra` uses a reserved name, or the file cannot be written.
    """
    # Channels-last weights are a matter of speed, and the format takes contiguous tensors only.
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_stored(Stored(dict(arguments), dict(preprocess), weights, dict(extra)), path)


def write_stored(stored: Stored, path: Path) -> None:
    """The inverse of `read_model`: write `path` atomically.

    Raises:
        PipeError: the further metadata use a reserved name, or the file cannot be written.
    """
    taken = sorted(set(stored.extra) & set(RESERVED))
    if taken:
        raise PipeError("these metadata names are reserved", where=", ".join(taken), fix="choose other names")
    metadata = {name: str(value) for name, value in stored.extra.items()} | {
        "format": FORMAT,
        "version": VERSION,
        "arguments": json.dumps(stored.arguments, sort_keys=True, allow_nan=False),
        "preprocess": json.dumps(stored.preprocess, sort_keys=True, allow_nan=False),
    }
    write_bytes(path, save(stored.weights, metadata=metadata))


def read_model(run: str | Path) -> Stored:
    """The model file of a run folder, or that file itself. Safe: safetensors and JSON only.

    Raises:
        PipeError: there is none, it is damaged, it is not ours, or it is of another version.
    """
    path = Path(run)
    if path.is_dir():
        path = RunFolder(path).weights
    if not path.is_file():
        raise PipeError("there is no trained model", where=path, fix="train the run, or name a folder that holds one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PipeError("this safetensors file is not a model of ours", where=path, fix="name a run's folder")
            if metadata.get("version") != VERSION:
                raise PipeError(
                    f"this model file has version {metadata.get('version')}, not {VERSION}",
                    where=path,
                    fix="use the version of the package that wrote it",
                )
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise PipeError(f"the model file cannot be read ({reason})", where=path, fix="train or export again") from error
    try:
        arguments, preprocess = json.loads(metadata["arguments"]), json.loads(metadata["preprocess"])
    except (KeyError, json.JSONDecodeError) as error:
        raise PipeError("the model file's metadata are damaged", where=path, fix="train or export again") from error
    extra = {name: value for name, value in metadata.items() if name not in RESERVED}
    return Stored(arguments, preprocess, weights, extra)
