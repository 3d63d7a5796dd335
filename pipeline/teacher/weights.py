"""A timm teacher's weights: from timm's hub page, from a local file, or random; and the hash that identifies any."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import sha256_file

LISTED = 3  # keys an error names
WRAPPERS = ("state_dict", "model")  # under which training scripts keep the weights in a .pth file


class WeightsUnavailable(PipeError):
    """The weights asked for are not on this machine, and cannot be fetched."""


def create_model(
    name: str,
    model_args: Mapping[str, Any],
    *,
    image_size: int,
    checkpoint: Path | None,
    random_weights: bool,
    seed: int,
) -> nn.Module:
    """A timm network with the weights asked for; see `load_teacher`."""
    _refuse_unknown(name)
    if checkpoint is not None and random_weights:
        raise PipeError("checkpoint and random_weights exclude each other", where="teacher", fix="remove one")
    if checkpoint is not None:
        model = _build(name, model_args, image_size, pretrained=False)
        load_checkpoint(model, checkpoint)
        return model
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(name, model_args, image_size, pretrained=False)
        log.warning(
            "teacher %s has random weights (seed %d): its features say little about images (a DINOv3 whose layer-scale "
            "is still at its initial 1e-5 is in effect a patch embedding)",
            name,
            seed,
        )
        return model
    return _pretrained(name, model_args, image_size)


def network(name: str, model_args: Mapping[str, Any], *, image_size: int) -> nn.Module:
    """A timm network as it is built, for its shapes alone."""
    _refuse_unknown(name)
    return _build(name, model_args, image_size, pretrained=False)


def _refuse_unknown(name: str) -> None:
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        raise PipeError(
            f"timm has no model {name!r}",
            where="teacher.name",
            fix=f"did you mean {near[0]}?" if near else "see timm.list_models()",
        )


def _pretrained(name: str, model_args: Mapping[str, Any], image_size: int) -> nn.Module:
    other = "set teacher.checkpoint to a local file, or teacher.random_weights=true to try things out"
    if not timm.models.is_model_pretrained(name):
        raise WeightsUnavailable(
            "timm knows no pretrained weights of this name", where=f"teacher.name {name}", fix=other
        )
    log.info("loading the weights of %s (from its hub page on first use)", name)
    try:
        _look_up(name)
        return _build(name, model_args, image_size, pretrained=True)
    except PipeError:
        raise
    except Exception as error:  # of the hub's library, of its HTTP library, of torch, of the system: no common base
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise WeightsUnavailable(
            f"cannot get the weights ({reason})", where=f"teacher.name {name}", fix=other
        ) from error


def _look_up(name: str) -> None:
    """Fail at once where there is neither a network nor a copy: timm would try again for most of a minute."""
    page = timm.get_pretrained_cfg(name).hf_hub_id
    if page:
        from huggingface_hub import snapshot_download

        snapshot_download(page, allow_patterns=["config.json"])


def _build(name: str, model_args: Mapping[str, Any], image_size: int, *, pretrained: bool) -> nn.Module:
    """`timm.create_model`, told the image size where the network has use for it (position embeddings)."""
    arguments = {"img_size": image_size, **model_args}
    try:
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
        except TypeError as error:
            if "img_size" in model_args or "img_size" not in str(error):
                raise
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    except (TypeError, AssertionError) as error:
        raise PipeError(
            f"timm cannot make this model ({error})", where=f"teacher.model_args {dict(model_args)}", fix="correct them"
        ) from error
    return model


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Fill `model` from a .safetensors file or a torch file of tensors; every key must fit. float16 is upcast.

    Files in the authors' naming pass timm's own conversion for the network where it has one.

    Raises:
        PipeError: no such file, not a file of weights, or keys or shapes that are not the model's.
    """
    own = model.state_dict()
    state = read_state_dict(path)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if set(state) != set(own) and convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, AttributeError, ValueError, RuntimeError):
            log.debug("timm cannot convert %s; its keys are compared as they are", path)
    differences = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    if listed := misfits(differences):
        raise PipeError(
            f"the checkpoint's weights do not fit the teacher ({listed})",
            where=path,
            fix="set teacher.name and teacher.model_args to the network it was saved from",
        )
    model.load_state_dict(state, strict=True)


def misfits(differences: Mapping[str, Collection[Any]]) -> str:
    """`2 missing: a, b; 1 unexpected: c` of kind → keys; nothing where there are none."""
    return "; ".join(f"{len(keys)} {kind}: {first_keys(keys)}" for kind, keys in differences.items() if keys)


def first_keys(keys: Collection[Any]) -> str:
    """`a, b, c, ...`: the first few of some keys, sorted; of a tuple (a library's report) its first entry."""
    names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU. Nothing in the file is executed."""
    if not path.is_file():
        raise WeightsUnavailable("there is no such checkpoint", where=path, fix="correct teacher.checkpoint")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise PipeError(
            f"cannot read this checkpoint ({type(error).__name__})",
            where=path,
            fix="use a .safetensors file, or a torch file that holds tensors only",
        ) from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PipeError("this file holds no state dict", where=path, fix="save model.state_dict()")
    return state


def weights_origin(checkpoint: Path | None, *, random_weights: bool) -> dict[str, str]:
    """What a configuration says of timm weights, to be compared with a cache where they are not at hand.

    `origin` is random, checkpoint (then `file_sha256` is the file's hash) or pretrained (timm's, by name).
    """
    if checkpoint is not None:
        return {"origin": "checkpoint", "file_sha256": sha256_file(checkpoint)}
    return {"origin": "random" if random_weights else "pretrained"}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict, in the order of the names; "" of a model without
    values (on the meta device)."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
