"""The trunk: an open_clip dual encoder, by name or by configuration, with what the student needs of its text tower.

Legend: B images or texts, L text positions, W text width, P pooled width, D joint width.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer, _tokenizer
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.models.geometry import normalise
from pipeline.models.pooled import pooled, pooled_width, statistics_kept

MAX_SCALE = 100.0
CONFIG_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
STRIDE = 32  # of a ModifiedResNet


class Trunk(nn.Module):
    """An open_clip model with CLIP's own tokenizer.

    Attributes:
        clip: the open_clip module; it trains, saves and exports as such.
        embed_dim: D. text_width: W. context_length: L. mean, std: of the pixels it takes (OpenAI's).
        tokenizer: list of texts → (n, L) int64, padded with zeros; the vocabulary comes with open_clip.
        frozen: whether `freeze` was called; a state of training, which no file keeps.
    """

    def __init__(self, clip: nn.Module, *, embed_dim: int, image_size: int) -> None:
        super().__init__()
        self.clip = clip
        self.embed_dim = embed_dim
        self.image_size = image_size
        self.context_length = int(clip.context_length)  # type: ignore[arg-type]
        self.text_width = int(self._text_tower.ln_final.weight.shape[0])
        self.mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
        self.std: tuple[float, float, float] = OPENAI_DATASET_STD
        self.tokenizer = SimpleTokenizer(context_length=self.context_length)
        self.frozen = False

    def freeze(self) -> None:
        """From now on no parameter learns, the logit scale included, and batch norms stay as they are.

        The logit scale goes with the trunk (our reading): InfoNCE is measured in its unit, and "without disturbing an
        alignment already learned" would mean little if the unit moved. No graph is built, as nothing in it learns.
        """
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Trunk:
        """A frozen trunk stays in eval mode, whatever the module around it does."""
        return super().train(mode and not self.frozen)

    @property
    def _text_tower(self) -> Any:
        return getattr(self.clip, "text", self.clip)

    @property
    def logit_scale(self) -> nn.Parameter:
        """log s, a parameter (); starts at log(1 / 0.07)."""
        return self.clip.logit_scale  # type: ignore[return-value]

    def scale(self) -> Tensor:
        """s = exp(logit_scale), at most 100: ()."""
        return _AtMost.apply(self.logit_scale, math.log(MAX_SCALE)).exp()

    def encode_image(self, images: Tensor) -> Tensor:
        """z: images (B, 3, H, W) normalised → (B, D) unit-norm.

        In float32 to the bit open_clip's encode_image(normalize=True); under autocast open_clip normalises in bfloat16.
        """
        return normalise(self.clip.visual(images))  # type: ignore[operator]

    @property
    def pooled_width(self) -> int:
        """P, the width of `pooled`."""
        return pooled_width(self.clip.visual)

    def pooled(self, images: Tensor) -> Tensor:
        """Image features before the joint projection: images (B, 3, H, W) normalised → (B, P); see models.pooled.

        In training too, batch norms keep the running statistics of `encode_image`'s inputs.
        """
        with statistics_kept(self.clip.visual):  # type: ignore[arg-type]
            return pooled(self.clip.visual, images)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """t: tokens (B, L) → (B, D)."""
        projected, _ = self._encode_text(tokens)
        return normalise(projected) if normalize else projected

    def text_features(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of the text tower: t (B, D) unit-norm, features (B, L, W) of every position, valid (B, L) bool.

        Valid positions reach from the start token up to and including the end token; under the causal mask none of
        them can see what follows.
        """
        projected, features = self._encode_text(tokens)
        end = tokens.argmax(dim=-1, keepdim=True)  # the end token has the vocabulary's highest number
        valid = torch.arange(tokens.shape[1], device=tokens.device) <= end
        return normalise(projected), features, valid

    def _encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """open_clip's own steps, since its encode_text keeps the positions to itself: (B, D), (B, L, W)."""
        if tokens.shape[-1] != self.context_length:
            raise PipeError(
                f"texts have {tokens.shape[-1]} positions and the trunk reads {self.context_length}",
                fix="pad them with the model's own tokenizer",
            )
        tower = self._text_tower
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype)
        x = x + tower.positional_embedding.to(dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        # CLIP and its text tower alone name the same two settings differently.
        pool = getattr(tower, "text_pool_type", None) or tower.pool_type
        eos = getattr(tower, "text_eos_id", None) or tower.eos_id
        pooled = text_global_pool(x, tokens, pool, eos_token_id=eos)
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled), x
        return (pooled @ projection if projection is not None else pooled), x


class _AtMost(torch.autograd.Function):
    """min(x, ceiling), whose gradient lets a value at the ceiling come down again; clamp would hold it there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(x >= ceiling)
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (at_ceiling,) = ctx.saved_tensors
        upward = at_ceiling & (gradients[0] < 0)  # a descent step would raise x
        return gradients[0].masked_fill(upward, 0.0), None


def build_trunk(trunk: str | Mapping[str, Any], image_size: int) -> Trunk:
    """A trunk with random weights; never touches the network.

    Args:
        trunk: a name that open_clip ships ("RN50", "ViT-B-32"), or a mapping of its model config.
        image_size: replaces the config's.

    Raises:
        PipeError: the name is unknown, or the config cannot work; in one line, before any forward pass would fail.
    """
    if isinstance(trunk, str):
        where = f"model.trunk {trunk}"
        config = _named(trunk)
    else:
        where = "model.trunk"
        config = copy.deepcopy({key: dict(v) if isinstance(v, Mapping) else v for key, v in trunk.items()})
    _check(config, image_size, where)
    vision = config["vision_cfg"] | {"image_size": image_size, "timm_model_pretrained": False, "output_tokens": False}
    text = config["text_cfg"] | {"output_tokens": False}
    options = {key: config[key] for key in ("quick_gelu", "init_logit_scale") if key in config}
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    try:
        clip = kind(embed_dim=config["embed_dim"], vision_cfg=vision, text_cfg=text, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PipeError(
            f"open_clip cannot build this trunk ({reason})", where=where, fix="correct its config"
        ) from error
    return Trunk(clip, embed_dim=config["embed_dim"], image_size=image_size)


def _named(name: str) -> dict[str, Any]:
    names = open_clip.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise PipeError(f"open_clip has no model {name!r}", where="model.trunk", fix=f"did you mean {near[0]}?")
    return dict(open_clip.get_model_config(name))


def _check(config: dict[str, Any], image_size: int, where: str) -> None:
    """Everything that open_clip would notice late, or not at all."""
    unknown = sorted(set(config) - CONFIG_KEYS)
    if unknown:
        raise PipeError(f"this trunk asks for {', '.join(unknown)}, which has no place here", where=where)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise PipeError(f"the trunk's config lacks {', '.join(missing)}", where=where, fix="add them")
    _check_vision(config["vision_cfg"], image_size, where)
    _check_text(config["text_cfg"], bool(config.get("custom_text")), where)


def _check_vision(vision: Mapping[str, Any], image_size: int, where: str) -> None:
    if vision.get("timm_model_name"):
        return
    width, head = vision.get("width", 768), vision.get("head_width", 64)
    if isinstance(vision.get("layers", 12), (list, tuple)):
        # The attention pool's width is width · 32, and its map is image_size // 32 on a side.
        if width % 2 or width * STRIDE % head:
            raise PipeError(
                f"a ResNet of width {width} gives {width * STRIDE} channels, which heads of {head} do not divide",
                where=f"{where}.vision_cfg",
                fix="choose an even width, and a head_width that divides width × 32",
            )
        # Its stem rounds up, its pools round down: where the map is not that size, the positions would not fit it.
        if image_size < STRIDE or (image_size + 1) // 2 // 16 != image_size // STRIDE:
            raise PipeError(
                f"a ResNet's map of images of {image_size} px is not {image_size // STRIDE} on a side, as it expects",
                where="model.image_size",
                fix=f"use {max(STRIDE, round(image_size / STRIDE) * STRIDE)}",
            )
        return
    if width % head:
        raise PipeError(
            f"heads of {head} do not divide the width {width}", where=f"{where}.vision_cfg", fix="change head_width"
        )
    patch = vision.get("patch_size", 16)
    if image_size < patch or image_size % patch:
        raise PipeError(
            f"the trunk's patch of {patch} px does not divide images of {image_size} px",
            where="model.image_size",
            fix=f"use {max(patch, round(image_size / patch) * patch)}",
        )


def _check_text(text: Mapping[str, Any], custom: bool, where: str) -> None:
    where = f"{where}.text_cfg"
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise PipeError("the text tower needs a tokenizer or model from a hub", where=where, fix="choose another trunk")
    if custom and text.get("embed_cls"):
        raise PipeError("text towers with a class embedding are not supported", where=where, fix="leave embed_cls out")
    width, heads = text.get("width", 512), text.get("heads", 8)
    if width % heads:
        raise PipeError(f"{heads} heads do not divide the width {width}", where=where, fix="change heads")
    vocabulary, end = _tokenizer.vocab_size, _tokenizer.eot_token_id
    if text.get("vocab_size", vocabulary) < vocabulary:
        raise PipeError(
            f"vocab_size {text['vocab_size']} is smaller than CLIP's vocabulary", where=where, fix=f"use {vocabulary}"
        )
    if text.get("context_length", 77) < 3:
        raise PipeError("context_length must hold a start token, a word and an end token", where=where, fix="use 77")
    pool = text.get("pool_type", "argmax")
    if pool not in {"argmax", "eos", "first", "last"} or (pool == "eos" and text.get("eos_id", 2) != end):
        raise PipeError(f"pool_type {pool!r} does not find the end token", where=where, fix="use argmax")
