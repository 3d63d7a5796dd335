"""`teacher.name: hf:...`: a vision model of the transformers library, from a local folder or from its hub.

A repository is downloaded as a folder first, so that both are the same from there on: config.json says which network,
model*.safetensors hold the weights, preprocessor_config.json the normalisation. Nothing in the folder is executed: no
remote code, no pickles. Weights must fit key by key; the library itself would fill a gap with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.teacher.features import Layered
from pipeline.teacher.huggingface_folder import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    folder_normalisation,
    folder_origin,
    label,
    local_folder,
)
from pipeline.teacher.huggingface_layers import HuggingFaceConvNeXt, HuggingFaceViT
from pipeline.teacher.huggingface_load import download, kept, model_type, quiet, refuse_misfits, short
from pipeline.teacher.weights import WeightsUnavailable

CLASSES = {  # model_type → configuration, network
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "dinov3_convnext": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
}
HEADS = ("classifier.",)  # of a fine-tuned model; the features do not pass through them


@dataclass(frozen=True)
class Found:
    """A network with its weights, its own mean and std (empty where the folder does not say), and their origin."""

    backbone: Layered
    normalisation: Mapping[str, Any]
    origin: dict[str, str]


def load(
    name: str, *, model_args: Mapping[str, Any], checkpoint: Path | None, random_weights: bool, seed: int
) -> Found:
    """The network that `name` means, in float32, on the CPU.

    Args:
        name: hf:FOLDER or hf:REPOSITORY.
        model_args, checkpoint: must be empty; the folder says it all.
        random_weights: only config.json is used; weights are drawn from `seed`.

    Raises:
        PipeError: no such folder, no network, a model that is not supported, weights that do not fit.
    """
    where = f"teacher.name {name}"
    if checkpoint is not None:
        raise PipeError(
            "teacher.checkpoint is for timm's networks",
            where=where,
            fix="name the folder that holds the weights hf:...",
        )
    if model_args:
        raise PipeError(
            "teacher.model_args are for timm's networks", where=where, fix="change the folder's config.json"
        )
    wanted = [CONFIG, PROCESSOR, *(() if random_weights else WEIGHTS)]
    folder = local_folder(name) or download(name, wanted, where)
    config = _config(folder)
    if random_weights:
        model = _random(config, seed, folder / CONFIG)
        log.warning("teacher %s has random weights (seed %d): its features say little about images", label(name), seed)
    else:
        model = _pretrained(folder, config)
    is_convnext = config.model_type == "dinov3_convnext"
    backbone: Layered = HuggingFaceConvNeXt(model) if is_convnext else HuggingFaceViT(model)
    return Found(backbone, folder_normalisation(folder), folder_origin(folder, random_weights=random_weights))


def architecture(name: str) -> Layered:
    """The network that `name` means with whatever weights it is built with, for its shapes alone. Nothing is fetched.

    Raises:
        WeightsUnavailable: neither a folder nor the hub's own cache on this machine has its config.json.
    """
    folder = local_folder(name) or kept(name, CONFIG)
    if folder is None:
        raise WeightsUnavailable(
            "its config.json is not on this machine", where=f"teacher.name {name}", fix="name its folder: hf:./FOLDER"
        )
    config = _config(folder)
    model = _random(config, 0, folder / CONFIG)
    return HuggingFaceConvNeXt(model) if config.model_type == "dinov3_convnext" else HuggingFaceViT(model)


def _config(folder: Path) -> Any:
    """The network's configuration, as the library's own class."""
    import transformers

    path, kind = folder / CONFIG, model_type(folder)
    if kind not in CLASSES:
        raise PipeError(
            f"models of type {kind!r} are no teachers", where=path, fix=f"use one of type {', '.join(CLASSES)}"
        )
    try:
        config = getattr(transformers, CLASSES[kind][0]).from_pretrained(folder, local_files_only=True)
        if config.num_channels != 3:
            raise ValueError(f"num_channels is {config.num_channels}, not 3")
        heads = getattr(config, "num_attention_heads", 1)
        if heads != 1 and (heads < 1 or config.hidden_size % heads):
            raise ValueError(f"num_attention_heads is {heads} for a hidden_size of {config.hidden_size}")
        return config
    except Exception as error:  # the library checks fields by exceptions of its own
        raise PipeError(f"cannot use this configuration ({short(error)})", where=path, fix="correct it") from error


def _random(config: Any, seed: int, where: Path) -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        try:
            return getattr(transformers, CLASSES[config.model_type][1])(config).float()
        except Exception as error:  # whatever the numbers of a configuration lead to
            raise PipeError(f"cannot build this network ({short(error)})", where=where, fix="correct it") from error


def _pretrained(folder: Path, config: Any) -> Any:
    import transformers

    if not any(folder.glob(WEIGHTS[0])):
        raise WeightsUnavailable(
            f"there are no {WEIGHTS[0]} in this folder", where=folder, fix="save or download them there"
        )
    network = getattr(transformers, CLASSES[config.model_type][1])
    options = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            model, info = network.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be named below
                **options,
            )
    except Exception as error:  # safetensors, the library and torch share no base either
        raise PipeError(
            f"cannot load these weights ({short(error)})", where=folder, fix="save or download them again"
        ) from error
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(HEADS)]
    refuse_misfits(folder, network.__name__, info | {"unexpected_keys": unexpected})
    return model
