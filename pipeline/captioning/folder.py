"""A captioner's folder: configuration, weights, tokenizer and processor, and the hash that identifies them all.

config.json says which network. Nothing in the folder is executed: no remote code, no pickles; and weights must fit key
by key, because the library itself would fill a gap with random numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import sha256_file
from pipeline.teacher.huggingface_folder import CONFIG, WEIGHTS
from pipeline.teacher.huggingface_load import model_type, quiet, refuse_misfits, short
from pipeline.teacher.weights import first_keys

TEXT_FILES = (  # of tokenizer and processor
    "*preprocessor_config.json",  # of images, of videos
    "processor_config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.json",
    "chat_template.jinja",
)
FILES = (CONFIG, *WEIGHTS, *TEXT_FILES)
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
ENCODER_DECODER = "vision-encoder-decoder"
UNUSED = ("encoder.pooler.",)  # weights that captions do not pass through, which some checkpoints lack


def config_of(folder: Path) -> tuple[Any, str]:
    """The network's configuration and the name of its class.

    Raises:
        PipeError: the folder has none, or one of something that writes no captions.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    path, kind = folder / CONFIG, model_type(folder)
    if kind not in KNOWN:
        raise PipeError(
            f"models of type {kind!r} write no captions",
            where=path,
            fix=f"use an image-text-to-text model (blip, git, llava, qwen2_vl ...) or a {ENCODER_DECODER}",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # the library checks fields by exceptions of its own
        raise PipeError(f"cannot use this configuration ({short(error)})", where=path, fix="correct it") from error
    name = KNOWN[kind]
    return config, name if isinstance(name, str) else name[0]


def refuse_no_weights(folder: Path) -> None:
    """PipeError where the folder has no safetensors, told apart from pickled weights."""
    if not any(folder.glob(WEIGHTS[0])):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = " (pickled weights are not opened: they can run any program)" if pickled else ""
        raise PipeError(
            f"there are no {WEIGHTS[0]} in this folder{why}", where=folder, fix="save or download them there"
        )


def processors_of(folder: Path, config: Any) -> tuple[Any, Any, Any]:
    """Processor (None for a vision encoder with a text decoder), image processor and tokenizer."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        with quiet():
            if config.model_type == ENCODER_DECODER:
                tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
                return None, AutoImageProcessor.from_pretrained(folder, **LOCAL), tokenizer
            processor = AutoProcessor.from_pretrained(folder, **LOCAL)
            images, tokenizer = processor.image_processor, processor.tokenizer
    except Exception as error:  # the library's, the tokenizers', JSON's
        raise PipeError(
            f"this folder has no processor that can be used ({short(error)})",
            where=folder,
            fix="save or download tokenizer and processor there, too",
        ) from error
    if not config.is_encoder_decoder:
        tokenizer.padding_side = "left"  # what is generated follows the prompt without a gap
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor, images, tokenizer


def network_of(folder: Path, architecture: str, dtype: torch.dtype) -> Any:
    """The network with its weights, in eval mode, on the CPU."""
    import transformers

    try:
        with quiet():
            model, info = getattr(transformers, architecture).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be named below
                **LOCAL,
            )
    except Exception as error:  # safetensors, the library and torch share no base
        raise PipeError(
            f"cannot load these weights ({short(error)})", where=folder, fix="save or download them again"
        ) from error
    missing = [key for key in info["missing_keys"] if not key.startswith(UNUSED)]
    refuse_misfits(folder, architecture, {**info, "missing_keys": missing, "unexpected_keys": []})
    if unexpected := info["unexpected_keys"]:  # buffers of older versions, heads of other tasks
        log.warning("%s has no use for %d of the weights: %s", architecture, len(unexpected), first_keys(unexpected))
    return model.eval()


def files_sha256(folder: Path) -> str:
    """SHA-256 over the names and SHA-256 of all files that shape captions."""
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    files = sorted(found | {path for path in _shards(folder) if path.is_file()})
    listed = json.dumps([[path.name, sha256_file(path)] for path in files])
    return hashlib.sha256(listed.encode()).hexdigest()


def _shards(folder: Path) -> set[Path]:
    """The files of weights that the folder's index names, whatever they are called; none where there is no index."""
    try:
        names = json.loads((folder / WEIGHTS[1]).read_text())["weight_map"].values()
        return {folder / name for name in names}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # loading tells of a broken one
        return set()
