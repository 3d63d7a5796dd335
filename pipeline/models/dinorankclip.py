"""The whole model: a contrastive trunk, a distilled student of two branches, and an injection on each side.

    images ─ trunk ─ z ──────────────┐                     tokens ─ trunk ─ t, token features ─┐
        └─── student ─ tokens, scales ┴ fusion ─ v              student's text branch ─────────┴ fusion ─ w

Training reads a `Forward`; everyone else uses `encode_image` / `encode_text`. Neither needs a teacher or a cache.
(arXiv 2605.06592 and our reading of it; each file says which is which.)

Legend: B pairs, D joint width, L text positions, W text branch's width, E distillation width, C width of `global`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pipeline.data.views import Kind, Preprocess, View
from pipeline.errors import PipeError
from pipeline.models.fusion import Fusion, Side
from pipeline.models.geometry import normalise
from pipeline.models.projection import TextProjection
from pipeline.models.serialise import read_model, write_model
from pipeline.models.student import ImageStudent, TextStudent
from pipeline.models.trunk import build_trunk

SideName = Literal["image", "text"]
Tokenizer = Callable[[list[str]], Tensor]

PARTS = {"pyramid": True, "attention": True, "refiner": True, "gate": True, "text_side": True}
STUDENT = {
    "name": "vit_tiny_patch16_224",
    "patch": 16,
    "depth": 12,
    "stem": "patch",
    "pool": "token",
    "text_width": 256,
    "text_layers": 2,
}
GATE = {"hidden": 128}
FUSION = {"width": 192, "refiner_layers": 1}


@dataclass
class Forward:
    """What one batch yields for the objective. float32 (float64 in a float64 model), with gradients.

    Attributes:
        z, t: the trunk's unit vectors (B, D).
        v, w: the model's image and text output (B, D), unit-norm; z and t themselves on a side without fusion.
        logit_scale: s (), at most 100.
        image, text: the injection on each side; None where there is none.
        student_tokens: scale → (B, g², E), in the space that distillation compares; None without a student.
        image_global, text_global: (B, C) predictions of the teacher's `global`, not normalised.
        text_pooled: (B, W), the text branch's mean, for relational distances and CRD.
        student_features: scale → (B, g², V), the image branch's tokens before their heads; image_pooled: (B, V).
            Both None unless the model's `exposes_features` is set.
    """

    z: Tensor
    t: Tensor
    v: Tensor
    w: Tensor
    logit_scale: Tensor
    image: Side | None = None
    text: Side | None = None
    student_tokens: dict[str, Tensor] | None = None
    image_global: Tensor | None = None
    text_global: Tensor | None = None
    text_pooled: Tensor | None = None
    student_features: dict[str, Tensor] | None = None
    image_pooled: Tensor | None = None


class DinoRankCLIP(nn.Module):
    """Trunk, student and fusion as configured. All arguments are JSON-able and kept in `arguments`.

    Args:
        trunk: an open_clip name, or a mapping of open_clip's model config.
        image_size: side of the square images in pixels.
        student: {name, patch, depth, stem, pool, text_width, text_layers}; None: fusion `none`, exactly the trunk.
        parts: which of pyramid, attention, refiner, gate, text_side exist; all by default.
        scales: [{name, grid, depth_fraction}] of the cached teacher; depth_fraction in (0, 1] is the relative depth
            of the teacher's layer.
        global_width: C.
        text_target_width: P, where the text branch predicts a projection of `global` (see `text_projection`); None: C.
        gate: {hidden}: width of the gate's MLP.
        fusion: {width, refiner_layers} of the fusion's token sequences.

    Raises:
        PipeError: arguments that do not fit together, naming what would.
    """

    def __init__(
        self,
        *,
        trunk: str | Mapping[str, Any],
        image_size: int,
        student: Mapping[str, Any] | None = None,
        parts: Mapping[str, bool] | None = None,
        scales: Sequence[Mapping[str, Any]] = (),
        global_width: int | None = None,
        text_target_width: int | None = None,
        gate: Mapping[str, Any] | None = None,
        fusion: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.parts = _completed(PARTS, parts, "model.parts")
        self.arguments: dict[str, Any] = {
            "trunk": trunk if isinstance(trunk, str) else dict(trunk),
            "image_size": image_size,
            "student": None,
            "parts": self.parts,
            "scales": [dict(scale) for scale in scales],
            "global_width": global_width,
            "gate": _completed(GATE, gate, "model.gate"),
            "fusion": _completed(FUSION, fusion, "model.fusion"),
        }
        if text_target_width is not None:  # unset, it is no key of the files that others wrote before
            self.arguments["text_target_width"] = text_target_width
        # The trunk comes first: methods that share a seed start from the same one.
        self.trunk = build_trunk(trunk, image_size)
        self.has_text_side = student is not None and self.parts["text_side"]
        self.student = nn.ModuleDict()
        self.fusion = nn.ModuleDict()
        self.exposes_features = False  # KD and CRD read them; for others their memory is saved
        self.text_projection: TextProjection | None = (
            None  # of the teacher's `global`, where the text branch predicts that
        )
        if student is not None:
            self._add_student(student)
            self._add_fusion()

    def _add_student(self, student: Mapping[str, Any]) -> None:
        arguments, trunk = self.arguments, self.trunk
        options = _completed(STUDENT, student, "model.student")
        arguments["student"] = options
        if not arguments["scales"] or arguments["global_width"] is None:
            raise PipeError("a student needs a cache's scales and global_width", fix="extract the teacher first")
        self.student["image"] = ImageStudent(
            name=options["name"],
            patch=options["patch"],
            depth=options["depth"],
            stem=options["stem"],
            pool=options["pool"],
            image_size=arguments["image_size"],
            scales=arguments["scales"],
            global_width=arguments["global_width"],
            mean=trunk.mean,
            std=trunk.std,
        )
        if self.has_text_side:
            projected = arguments.get("text_target_width")
            self.student["text"] = TextStudent(
                input_width=trunk.text_width,
                width=options["text_width"],
                layers=options["text_layers"],
                global_width=projected or arguments["global_width"],
            )
            if projected:
                self.text_projection = TextProjection(arguments["global_width"], projected)

    def _add_fusion(self) -> None:
        image: Any = self.student["image"]
        widths = {"image": dict.fromkeys(image.grids, image.width)}
        if self.has_text_side:
            widths["text"] = {"text": self.arguments["student"]["text_width"]}
        for side, token_widths in widths.items():
            self.fusion[side] = Fusion(
                embed_dim=self.trunk.embed_dim,
                token_widths=token_widths,
                width=self.arguments["fusion"]["width"],
                refiner_layers=self.arguments["fusion"]["refiner_layers"],
                gate_hidden=self.arguments["gate"]["hidden"],
                **{part: self.parts[part] for part in ("pyramid", "attention", "refiner", "gate")},
            )

    # ---- training ----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, tokens: Tensor) -> Forward:
        """images (B, 3, H, W) normalised for the trunk, tokens (B, L) int64 from its tokenizer."""
        image, text = self._image(images), self._text(tokens)
        out = Forward(image.base, text.base, image.output, text.output, self.trunk.scale(), image.side, text.side)
        if image.branch is not None:
            student = self._image_student
            out.student_tokens = student.distilled(image.branch)
            out.image_global = student.predict_global(image.branch)
            if self.exposes_features:
                out.student_features, out.image_pooled = image.branch.tokens, image.branch.pooled
        if text.branch is not None:
            out.text_global = self._text_student.predict_global(text.branch)
            out.text_pooled = text.branch.pooled
        return out

    def gate_on(self, side: SideName, base: Tensor, delta: Tensor) -> Tensor:
        """g of any z and Δ, (B, D) each → (B, D); for the conflict loss, on detached inputs."""
        return self._fusion(side).gate_on(base, delta)

    # ---- use ---------------------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """v: images (B, 3, H, W) → (B, D), unit-norm whatever `normalize` says (it is open_clip's signature)."""
        return self._image(images).output

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """w: tokens (B, L) → (B, D), unit-norm whatever `normalize` says."""
        return self._text(tokens).output

    @property
    def logit_scale(self) -> nn.Parameter:
        """log s, the trunk's parameter (); open_clip's name for it."""
        return self.trunk.logit_scale

    def image_nodes(self, images: Tensor) -> dict[str, Tensor]:
        """The image side's nodes: trunk, fused, gated (B, D), student (B, C); unit-norm, those that exist."""
        encoded = self._image(images)
        nodes = self._nodes("image", encoded)
        if encoded.branch is not None:
            predicted = self._image_student.predict_global(encoded.branch)
            # Where texts predict a projection of the teacher's vector, images are compared with them there.
            nodes["student"] = normalise(self.text_projection(predicted) if self.text_projection else predicted)
        return nodes

    def text_nodes(self, tokens: Tensor) -> dict[str, Tensor]:
        """The text side's nodes. Where only images are injected, fused and gated are the trunk's text."""
        encoded = self._text(tokens)
        nodes = self._nodes("text", encoded)
        if encoded.branch is not None:
            nodes["student"] = normalise(self._text_student.predict_global(encoded.branch))
        return nodes

    def nodes(self, images: Tensor, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Node → (image, text), unit-norm: trunk (γ = 0), student (predictions of the teacher's `global`), fused
        (g ≡ 1), gated (the output). (B, D) each, student (B, C), or (B, P) where the text's target is projected. A node
        that either side lacks is left out."""
        image, text = self.image_nodes(images), self.text_nodes(tokens)
        return {node: (image[node], text[node]) for node in image if node in text}

    @torch.no_grad()
    def start_at_baselines(
        self, *, global_mean: Tensor, gram_means: Mapping[str, Tensor], text_mean: Tensor | None = None
    ) -> None:
        """Let every distilled output begin as the predictor that ignores the image (our reading).

        The terms of distillation are weighted in units of that predictor's loss. A random head starts at ten units, and
        at a hundred where the teacher's global vectors are nearly alike: it would drown every other gradient under the
        common clipping, and a short training would end above 1.

        Args:
            global_mean: (C,) the teacher's mean unit vector.
            gram_means: scale → (g², g²) the teacher's mean Gram matrix.
            text_mean: (P,) the mean unit projected vector; None where the text branch predicts `global`.
        """
        for side, branch in self.student.items():
            mean = text_mean if side == "text" and text_mean is not None else global_mean
            branch.global_head.weight.zero_()  # type: ignore[union-attr, operator]
            branch.global_head.bias.copy_(mean)  # type: ignore[union-attr, operator]
        if "image" in self.student:
            for name, mean_gram in gram_means.items():
                self._image_student.start_gram_at(name, mean_gram)

    def parameter_counts(self) -> dict[str, int]:
        """Part → number of parameters; parts do not overlap, `total` is their sum."""
        counts = {"trunk": _count(self.trunk)}
        counts |= {f"student_{side}": _count(module) for side, module in self.student.items()}
        counts |= {f"fusion_{side}": _count(module) for side, module in self.fusion.items()}
        return counts | {"total": sum(counts.values())}

    # ---- one side ----------------------------------------------------------------------------------------------------

    def _image(self, images: Tensor) -> _Encoded:
        base = self.trunk.encode_image(images)
        if "image" not in self.student:
            return _Encoded(base, base)
        branch = self._image_student(images)
        output, side = self._fusion("image")(base, branch.tokens)
        return _Encoded(base, output, side, branch)

    def _text(self, tokens: Tensor) -> _Encoded:
        if "text" not in self.student:
            base = self.trunk.encode_text(tokens)
            return _Encoded(base, base)
        base, features, valid = self.trunk.text_features(tokens)
        branch = self._text_student(features, valid)
        output, side = self._fusion("text")(base, {"text": branch.tokens}, branch.valid)
        return _Encoded(base, output, side, branch)

    def _nodes(self, side: SideName, encoded: _Encoded) -> dict[str, Tensor]:
        nodes = {"trunk": encoded.base}
        if encoded.side is not None:
            nodes["fused"] = self._fusion(side).opened(encoded.base, encoded.side.delta)
            nodes["gated"] = encoded.output
        elif self.fusion:
            nodes["fused"] = nodes["gated"] = encoded.base
        return nodes

    @property
    def student_widths(self) -> dict[str, int]:
        """Branch → V or W, the width of its pooled features; empty without a student."""
        return {side: int(branch.width) for side, branch in self.student.items()}  # type: ignore[arg-type]

    @property
    def _image_student(self) -> ImageStudent:
        return cast(ImageStudent, self.student["image"])

    @property
    def _text_student(self) -> TextStudent:
        return cast(TextStudent, self.student["text"])

    def _fusion(self, side: SideName) -> Fusion:
        return cast(Fusion, self.fusion[side])


@dataclass
class _Encoded:
    """One side's way: the trunk's vector (B, D), the output (B, D), and what stands between them."""

    base: Tensor
    output: Tensor
    side: Side | None = None
    branch: Any = None  # ImageBranch or TextBranch


def save(model: DinoRankCLIP, path: str | Path, *, view: Kind, extra: Mapping[str, str] | None = None) -> None:
    """Write the model as one safetensors file that `load` needs nothing beside.

    Args:
        view: the geometry of images the model was trained on. extra: further metadata, e.g. the run's name.
    """
    preprocess = Preprocess(View(view, model.arguments["image_size"]), model.trunk.mean, model.trunk.std)
    write_model(model, Path(path), arguments=model.arguments, preprocess=preprocess.to_json(), extra=dict(extra or {}))


def load(run: str | Path) -> tuple[DinoRankCLIP, Preprocess, Tokenizer]:
    """The model of a run's folder or of an exported file, in eval mode on the CPU, with what its inputs go through.

    Offline, and without side effects on the random state.

    Raises:
        PipeError: there is no such file, it is not ours, or its weights do not fit its own arguments.
    """
    stored = read_model(run)
    with torch.random.fork_rng(devices=[]):
        model = DinoRankCLIP(**stored.arguments)
    try:
        model.load_state_dict(stored.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PipeError(f"the weights do not fit the model ({reason})", where=run, fix="train again") from None
    return model.eval(), Preprocess.from_json(stored.preprocess), model.trunk.tokenizer


def _completed(defaults: Mapping[str, Any], given: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    unknown = sorted(set(given or {}) - set(defaults))
    if unknown:
        raise PipeError(f"unknown {', '.join(unknown)}", where=where, fix=f"there are {', '.join(defaults)}")
    return {**defaults, **(given or {})}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
