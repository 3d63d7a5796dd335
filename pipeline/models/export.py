"""An exported model: a folder that loads with one call on any machine, and says what it is.

    model.safetensors    weights; constructor arguments and preprocessing in its metadata, as in a run's folder
    config.json          the same and the run's facts, for people and other programs
    record.json          the run's record, which `pipe evaluate FOLDER` stamps on its results
    README.md            a model card (pipeline.report.card)

Nothing in it points to the machine it was made on. What a run did not record stands there as null.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pipeline.errors import PipeError
from pipeline.models.serialise import FORMAT, Stored, read_model, write_stored
from pipeline.run_folder import replacing, sync_folder

Dtype = Literal["float32", "float16", "bfloat16"]
CONFIG, CARD, RECORD = "config.json", "README.md", "record.json"
TRUNK_CONFIG = "open_clip_config.json"
OURS = (CONFIG, TRUNK_CONFIG)  # a folder with one of these may be overwritten; any other is somebody's work
CONFIG_VERSION = 1


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `path` when the block ends well; else nothing of it stays.

    Raises:
        PipeError: there is something at `path`, unless it is an export and `overwrite`; or the disk refuses.
    """
    path = path.absolute()
    if path.is_symlink() or (path.exists() and not overwrite):
        raise PipeError("there is something already", where=path, fix="choose another --out, or add --overwrite")
    if path.exists() and not any((path / name).is_file() for name in OURS):
        raise PipeError("this is not an exported model, and stays", where=path, fix="choose another --out")
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise PipeError(f"cannot write the export: {error.strerror or error}", where=path) from error
    finally:
        if old.exists() and not path.exists():  # the second rename failed: what was there stays there
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def export_weights(source: Path, out: Path, dtype: Dtype = "float32") -> Stored:
    """Write the model file `source` to `out` in `dtype`; float32 is a copy to the byte, with the same SHA-256.

    A smaller dtype is a matter of storage: `load` computes in float32 whatever the file holds. Matrices and kernels are
    rounded; vectors (biases, norms and their statistics, γ, logit_scale) keep their dtype: they are less than a
    hundredth of the bytes, and the most sensitive.

    Raises:
        PipeError: no such dtype; `source` is no model of ours; a weight does not fit float16.
    """
    stored = read_model(source)
    if dtype == "float32" and all(value.dtype in (torch.float32, torch.int64) for value in stored.weights.values()):
        with replacing(out) as temporary:
            shutil.copyfile(source, temporary)
        return stored
    kept = {name: rounded(name, value, dtype) for name, value in stored.weights.items()}
    written = replace(stored, weights=kept, extra=stored.extra | {"dtype": dtype})
    write_stored(written, out)
    return written


def rounded(name: str, value: Tensor, dtype: Dtype) -> Tensor:
    """The weight called `name` as it is stored in `dtype`; see `export_weights`."""
    if dtype not in get_args(Dtype):
        raise PipeError(f"there is no dtype {dtype!r}", where="--dtype", fix=f"use {', '.join(get_args(Dtype))}")
    if not value.is_floating_point() or (value.ndim < 2 and dtype != "float32"):
        return value
    cast = value.to(getattr(torch, dtype))
    if value.isfinite().all() and not cast.isfinite().all():
        raise PipeError(f"{name} does not fit {dtype}", where="--dtype", fix="use bfloat16 or float32")
    return cast


def model_config(
    stored: Stored,
    record: Mapping[str, Any],
    *,
    weights: Mapping[str, Any],
    model: Any,
    teacher: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    exported_by: str,
) -> dict[str, Any]:
    """What config.json holds. JSON-able; what is not known is null.

    Args:
        stored: the model file. record: the run's record.json, {} where there is none.
        weights: {file, dtype, sha256, run_sha256}. model: the loaded DinoRankCLIP.
        teacher: what the student learned from; None: nothing.
        training: keys of the recipe worth reading. exported_by: the version of the package that exports.
    """
    trunk = model.trunk
    identity = {key: record.get(key) for key in ("name", "method", "order", "fusion", "seed")}
    facts = ("steps", "samples_seen", "seconds", "world_size", "precision", "machine", "flops_per_sample")
    return {
        "format": FORMAT,
        "config_version": CONFIG_VERSION,
        **identity,
        "arguments": stored.arguments,
        "preprocess": stored.preprocess,
        "tokenizer": {
            "kind": "CLIP's byte pairs (open_clip.tokenizer.SimpleTokenizer)",
            "context_length": trunk.context_length,
            "vocab_size": trunk.tokenizer.vocab_size,
        },
        "embed_dim": trunk.embed_dim,
        "logit_scale": round(float(trunk.scale().detach()), 6),
        "parameters": model.parameter_counts(),
        "weights": dict(weights),
        "training": {key: record.get(key) for key in facts} | dict(training),
        "teacher": None if teacher is None else dict(teacher),
        "data": record.get("data") or {},
        "code_version": record.get("code_version"),
        "exported_by": exported_by,
    }
