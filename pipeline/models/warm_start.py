"""A model filled from another one's weights (`model.init`): the trunk whole or not at all, the rest where it fits.

The trunk must be the same network, seen in the same way: the shapes of weights do not tell how many heads they were
trained with, which activation, or which normalisation of the pixels, so these are compared where the file knows them.
Student and fusion are taken tensor by tensor, where name and shape agree; what is left starts as it would without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor

from pipeline.models.dinorankclip import DinoRankCLIP
from pipeline.models.init_files import TRUNK, Init, refused

OF_TRAINING = {"image_size", "timm_model_pretrained", "output_tokens", "patch_dropout", "init_logit_scale"}
CLOSE = 1e-4  # of mean and std; files round them
LISTED = 3  # names in an error


def warm_start(model: DinoRankCLIP, init: Init, *, view: str) -> str:
    """Fill `model` in place.

    Args:
        model: built with random weights. view: `data.view`, how its images will be seen.

    Returns:
        What was taken and what starts fresh, for the user: one line.

    Raises:
        PipeError: the trunk is another one, or images are seen otherwise; the field or tensor is named.
    """
    _refuse_other_view(model, init, view)
    _refuse_other_trunk(model, init)
    trunk, resized = _fitted(model, init)
    found = {name: value for name, value in init.weights.items() if not name.startswith(TRUNK)}
    own = model.state_dict()
    taken = trunk | {name: x for name, x in found.items() if name in own and own[name].shape == x.shape}
    with torch.no_grad():
        for name, value in taken.items():
            own[name].copy_(value)
    line = _described(own, taken, found)
    return "; ".join([line, *init.said, *resized])


def _refuse_other_view(model: DinoRankCLIP, init: Init, view: str) -> None:
    if init.view is not None and init.view != view:
        raise refused(f"its images were seen as {init.view}, and data.view is {view}", init.path, "set data.view alike")
    for name, theirs in (("mean", init.mean), ("std", init.std)):
        ours = getattr(model.trunk, name)
        if theirs is not None and (
            len(theirs) != 3 or max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > CLOSE
        ):
            raise refused(
                f"its pixels were normalised with {name} {[round(x, 4) for x in theirs]}, and ours are with "
                f"{[round(x, 4) for x in ours]}",
                init.path,
                "name a model that was trained with OpenAI's normalisation",
            )


def _refuse_other_trunk(model: DinoRankCLIP, init: Init) -> None:
    if init.trunk is None:
        return
    theirs, ours = settings(init.trunk), settings(model.arguments["trunk"])
    for key in sorted(set(theirs) | set(ours)):
        if theirs.get(key) != ours.get(key):
            there, here = theirs.get(key), ours.get(key)
            raise refused(
                f"it has another trunk: {key} is {there} there and {here} in model.trunk", init.path, "use its trunk"
            )


def settings(trunk: str | Mapping[str, Any]) -> dict[str, Any]:
    """A trunk's settings with open_clip's defaults filled in, by dotted key; those that shape no forward pass left out.

    Args:
        trunk: an open_clip name, or a mapping of its model config.
    """
    config = dict(open_clip.get_model_config(trunk) or {}) if isinstance(trunk, str) else dict(trunk)
    found = {"embed_dim": config.get("embed_dim"), "quick_gelu": bool(config.get("quick_gelu", False))}
    found["custom_text"] = bool(config.get("custom_text", False))
    for part, defaults in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        given = dict(config.get(part) or {})
        known = {field.name for field in fields(defaults)}
        filled = asdict(defaults(**{key: value for key, value in given.items() if key in known})) | given
        found |= {f"{part}.{key}": _plain(value) for key, value in filled.items() if key not in OF_TRAINING}
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fitted(model: DinoRankCLIP, init: Init) -> tuple[dict[str, Tensor], list[str]]:
    """The trunk's weights under our names, all of them and no others; and what had to be done to them."""
    clip: Any = model.trunk.clip
    weights = {name.removeprefix(TRUNK): x for name, x in init.weights.items() if name.startswith(TRUNK)}
    if "positional_embedding" in weights and not hasattr(clip, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    said = _resize(clip, weights)
    own = clip.state_dict()
    if "logit_scale" in weights and weights["logit_scale"].numel() == own["logit_scale"].numel():
        weights["logit_scale"] = weights["logit_scale"].reshape(own["logit_scale"].shape)  # () or (1,), by version
    problems = {
        "missing": [name for name in own if name not in weights],
        "unknown": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
            for name in own
            if name in weights and own[name].shape != weights[name].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(sorted(names)[:LISTED])}{', …' if len(names) > LISTED else ''}"
            for kind, names in problems.items()
            if names
        )
        raise refused(f"its weights do not fit the trunk ({listed})", init.path, _fix(model, init))
    return {f"{TRUNK}{name}": value for name, value in weights.items()}, said


def _fix(model: DinoRankCLIP, init: Init) -> str:
    if init.image_size not in (None, model.arguments["image_size"]):
        return f"use its image size: model.image_size {init.image_size}"
    return "set model.trunk and model.image_size to the checkpoint's"


def _resize(clip: Any, weights: dict[str, Tensor]) -> list[str]:
    """Positions of a ViT's patches follow the image size, by open_clip's own bicubic resize; in place.

    A ResNet's attention pool and a text's positions have no such resize here: they stay, and are refused by shape.
    """
    key = "visual.positional_embedding"
    old = weights.get(key)
    if old is None or old.ndim != 2:
        return []
    resize_pos_embed(weights, clip)
    new = weights[key]
    return [] if new.shape == old.shape else [f"positions of {len(old) - 1} patches resized to {len(new) - 1}"]


def _described(own: Mapping[str, Tensor], taken: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """`taken: trunk, student image, fusion image 20 of 24 tensors; starts fresh: fusion text`."""
    whole, got, offered = (Counter(map(_part, names)) for names in (own, taken, found))
    lines = {"taken": [], "starts fresh": [], "not used": sorted(set(offered) - set(whole))}
    for part, count in whole.items():
        if not got[part]:
            lines["starts fresh"].append(part)
        else:
            lines["taken"].append(part if got[part] == count else f"{part} {got[part]} of {count} tensors")
    return "; ".join(f"{what}: {', '.join(parts)}" for what, parts in lines.items() if parts)


def _part(name: str) -> str:
    """`student.image.vit.…` → `student image`, `trunk.…` → `trunk`."""
    first, second = name.split(".")[:2]
    return first if first == "trunk" else f"{first} {second}"
