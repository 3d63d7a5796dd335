"""Tiny and full-size models of the transformers library with every parameter random, and their timm twins.

The conversions are written for these tests from the two libraries' parameter names alone; timm then loads them
strictly, so a name that is forgotten is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

State = dict[str, Tensor]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TINY = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Every parameter random, none at its initial value: matrices that keep lengths, vectors and scales around 1 or 0.

    The layer-scales of timm's and of the authors' networks start at 1e-5: left there, a block would do nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim in (2, 4):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1:
                centre = (
                    1.0 if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name else 0.0
                )
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_(noise)
    return model.eval()


def dinov3_vit(seed: int = 0, **changes: Any) -> Any:
    """A DINOv3 ViT, tiny unless `changes` say otherwise, 4 registers."""
    return randomise(DINOv3ViTModel(DINOv3ViTConfig(**(TINY | {"num_register_tokens": 4} | changes))), seed)


def dinov3_convnext(seed: int = 0, **changes: Any) -> Any:
    return randomise(DINOv3ConvNextModel(DINOv3ConvNextConfig(**changes)), seed)


def dinov2(registers: int, size: int) -> Any:
    kinds = (Dinov2WithRegistersConfig, Dinov2WithRegistersModel) if registers else (Dinov2Config, Dinov2Model)
    extra = {"num_register_tokens": registers} if registers else {}
    sizes = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    return randomise(kinds[1](kinds[0](image_size=size, patch_size=14, **sizes, **extra)))


def save(model: Any, folder: Path, *, normalisation: bool = True) -> Path:
    """A folder as it would be downloaded: config, weights, and the preprocessor's mean and std."""
    model.save_pretrained(folder)
    if normalisation:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def saved(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _renamed(state: State, names: dict[str, str]) -> State:
    """Longest names first, so that a part of a name is not taken for the whole."""
    out = {}
    for key, tensor in state.items():
        for theirs, ours in sorted(names.items(), key=lambda pair: -len(pair[0])):
            key = key.replace(theirs, ours)
        out[key] = tensor.detach().clone()
    return out


def timm_dinov3_vit(model: Any) -> State:
    """Weights for timm's vit_*_patch16_dinov3_qkvb: one matrix of q, k and v, biases of q and v."""
    state = _renamed(
        {key: value for key, value in model.state_dict().items() if not key.endswith("mask_token")},
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.patch_embeddings": "patch_embed.proj",
            "model.layer.": "blocks.",
            "attention.o_proj": "attn.proj",
            "attention.q_proj.bias": "attn.q_bias",
            "attention.v_proj.bias": "attn.v_bias",
            "layer_scale1.lambda1": "gamma_1",
            "layer_scale2.lambda1": "gamma_2",
            "mlp.gate_proj": "mlp.fc1_g",
            "mlp.up_proj": "mlp.fc1_x" if model.config.use_gated_mlp else "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    )
    for index in range(model.config.num_hidden_layers):
        parts = [state.pop(f"blocks.{index}.attention.{which}_proj.weight") for which in "qkv"]
        state[f"blocks.{index}.attn.qkv.weight"] = torch.cat(parts)
    if not model.config.num_register_tokens:
        del state["reg_token"]
    return state


def timm_convnext(model: Any) -> State:
    """Weights for timm's convnext_*.dinov3_lvd1689m; its `norm_pre` and `head` take no part in the features."""
    names = {
        "model.stages.0.downsample_layers.": "stem.",
        "model.stages.": "stages.",
        "downsample_layers.": "downsample.",
        "layers.": "blocks.",
        "depthwise_conv": "conv_dw",
        "layer_norm": "norm",
        "pointwise_conv1": "mlp.fc1",
        "pointwise_conv2": "mlp.fc2",
    }
    state = model.state_dict()
    final = {f"head.norm.{key}": state.pop(f"layer_norm.{key}").clone() for key in ("weight", "bias")}
    return _renamed(state, names) | final


def timm_dinov2(model: Any) -> State:
    """Weights for timm's vit_*_patch14_dinov2 (the CLS token has a position) and its reg4 twin (it carries it)."""
    state = _renamed(
        {key: value for key, value in model.state_dict().items() if not key.endswith("mask_token")},
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "encoder.layer.": "blocks.",
            "attention.o_proj": "attn.proj",
            "layer_scale1.lambda1": "ls1.gamma",
            "layer_scale2.lambda1": "ls2.gamma",
            "layernorm": "norm",
        },
    )
    for index in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{index}.attention.{which}_proj.{kind}") for which in "qkv"]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    if "reg_token" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state
