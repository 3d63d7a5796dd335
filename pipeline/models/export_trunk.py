"""The trunk alone as an open_clip checkpoint: open_clip_model.safetensors and open_clip_config.json.

    open_clip.create_model_and_transforms("local-dir:FOLDER")   model, train transform, evaluation transform
    open_clip.get_tokenizer("local-dir:FOLDER")                 with the trunk's context length

What open_clip then computes is the trunk's, to the bit: its weights, its configuration (image size and context length
among it), and a transform that gives the pixels of the run's view: `crop` is resize_mode shortest, `squash` is squash.
Two kinds of images give other pixels there: open_clip resizes an image before it converts its colours (palettes and
transparency), and resizes the whole of images longer than 32 times their height.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import save

from pipeline.data.views import Preprocess
from pipeline.errors import PipeError
from pipeline.models.dinorankclip import DinoRankCLIP
from pipeline.models.export import Dtype, rounded
from pipeline.run_folder import write_bytes

RESIZE_MODES = {"crop": "shortest", "squash": "squash"}


def export_trunk(model: DinoRankCLIP, preprocess: Preprocess, folder: Path, dtype: Dtype = "float32") -> Path:
    """Write the trunk of `model` into `folder`, and have open_clip load it once. Returns the weights' file.

    Raises:
        PipeError: a weight does not fit `dtype`; this version of open_clip does not load what was written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.trunk.clip.state_dict().items()}
    weights = {name: rounded(name, value, dtype) for name, value in state.items()}
    path = folder / HF_SAFE_WEIGHTS_NAME
    write_bytes(path, save(weights, metadata={"format": "pt"}))
    config = open_clip_config(model.arguments["trunk"], preprocess)
    write_bytes(folder / HF_CONFIG_NAME, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())
    try:
        with torch.random.fork_rng(devices=[]):
            open_clip.create_model(f"local-dir:{folder}")
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipeError(
            f"open_clip {open_clip.__version__} does not load this trunk ({reason})", where=folder
        ) from error
    return path


def open_clip_config(trunk: str | Mapping[str, Any], preprocess: Preprocess) -> dict[str, Any]:
    """{model_cfg, preprocess_cfg}: what open_clip_config.json holds.

    Args:
        trunk: an open_clip name or a model config, as DinoRankCLIP takes it.
    """
    named = open_clip.get_model_config(trunk) if isinstance(trunk, str) else trunk
    model = copy.deepcopy({key: dict(value) if isinstance(value, Mapping) else value for key, value in named.items()})
    for tower in ("vision_cfg", "text_cfg"):  # tokens beside the embedding: the trunk is built without, too
        model[tower].pop("output_tokens", None)
    model["vision_cfg"]["image_size"] = preprocess.view.size
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "size": preprocess.view.size,
            "mode": "RGB",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": "bicubic",
            "resize_mode": RESIZE_MODES[preprocess.view.kind],
        },
    }
