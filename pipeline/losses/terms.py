"""The objective's terms, added up one by one: each with its weight, what is logged of it, and its own graph.

Legend: B own pairs, N gathered pairs, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pipeline.losses.distillation import crd_loss, global_loss, gram_loss, kd_loss, rkd_loss
from pipeline.losses.feature_heads import FeatureHeads
from pipeline.losses.gate import conflict, gate_l1, info_nce_gradients
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import at_least_float32
from pipeline.losses.targets import GLOBAL, TEXT
from pipeline.losses.weights import LossWeights

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import Forward, Side

Logs = dict[str, Tensor]
SideName = Literal["image", "text"]


@dataclass
class Sum:
    """A loss in the making.

    Attributes:
        total: Σ weight · term, (), with gradient.
        terms: name → weight · term, (), with gradient; for their gradients one by one.
        logs: name → value, with or without gradient.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """Add weight · value, value (); a weight of 0 leaves the graph alone."""
        self.logs[f"weight/{name}"] = value.new_tensor(weight)
        if weight:
            self.terms[name] = weight * value
            self.total = self.total + self.terms[name]


def add_distillation(
    found: Sum,
    out: Forward,
    teacher: Mapping[str, Tensor],
    pairs: Pairs,
    weights: LossWeights,
    residuals: nn.ParameterDict,
    baselines: Mapping[str, float],
    heads: FeatureHeads | None = None,
) -> None:
    """λ_gram L_gram + λ_rkd L_rkd + λ_global L_global, each in units of its baseline; means over scales and branches.

    λ_kd L_kd and λ_crd L_crd beside them where their heads are given.

    Args:
        teacher: scale → (B, T, K), "global" → (B, C), "global/text" → the text branch's target. residuals: log ρ² by
            relational term. baselines: by logged name. heads: of the options.
    """
    students = out.student_tokens or {}
    relational = partial(rkd_loss, first=pairs.first, sizes=pairs.sizes)
    values: dict[str, dict[str, Tensor]] = {"gram": {}, "rkd": {}, "global": {}, "kd": {}, "crd": {}}
    for name, tokens in students.items():
        if weights.gram:
            values["gram"][name] = gram_loss(tokens, teacher[name])
        if weights.rkd:
            pooled = tokens.mean(1, dtype=pairs.scale.dtype)
            values["rkd"][name] = relational(pooled, teacher[name].mean(1), residual=residuals[name].exp())
    if weights.rkd and out.text_pooled is not None:
        unit = nn.functional.normalize(teacher[TEXT], dim=1)
        values["rkd"][GLOBAL] = relational(out.text_pooled, unit, residual=residuals[GLOBAL].exp())
    if weights.global_:
        if out.image_global is not None:
            values["global"]["image"] = global_loss(out.image_global, teacher[GLOBAL])
        if out.text_global is not None:
            values["global"]["text"] = global_loss(out.text_global, teacher[TEXT])
    if heads is not None:
        values |= _optional(out, teacher, pairs, weights, heads)
    found.logs |= {f"residual/{name}": value.detach().exp() for name, value in residuals.items()}
    units = {**baselines, **{f"crd/{k}": math.log(max(len(pairs.image_all), 2)) for k in values["crd"]}}
    for term in values:
        ratios = {k: pairs.mean(x) / units[f"{term}/{k}"] for k, x in values[term].items()}
        found.logs |= {f"{term}/{name}": ratio for name, ratio in ratios.items()}
        if ratios:
            weight = getattr(weights, "global_" if term == "global" else term)
            found.add(term, torch.stack(list(ratios.values())).mean(), weight)


def _optional(
    out: Forward, teacher: Mapping[str, Tensor], pairs: Pairs, weights: LossWeights, heads: FeatureHeads
) -> dict[str, dict[str, Tensor]]:
    """KD by scale and CRD by branch, (B,) each."""
    features = out.student_features or {}
    kd = {name: kd_loss(head(features[name]), teacher[name]) for name, head in heads.kd.items()}
    pooled = {"image": (out.image_pooled, teacher[GLOBAL]), "text": (out.text_pooled, teacher[TEXT])}
    crd = {}
    for name, head in heads.crd.items():
        student, target = pooled[name]
        a, b = head(student, target)
        crd[name] = crd_loss(a, b, temperature=weights.crd_temperature, first=pairs.first, sizes=pairs.sizes)
    return {"kd": kd, "crd": crd}


def add_gate(
    found: Sum, out: Forward, pairs: Pairs, weights: LossWeights, gate_on: Callable[[SideName], Callable[..., Tensor]]
) -> None:
    """λ_gate |γ| L1(g) + λ_conflict L_conflict, both sides averaged; nothing where nothing is injected.

    Args:
        gate_on: a side → its gate as a function of detached (z, Δ).
    """
    sides: dict[SideName, tuple[Tensor, Side]] = {}
    if out.image is not None:
        sides["image"] = (out.z, out.image)
    if out.text is not None:
        sides["text"] = (out.t, out.text)
    if not sides:
        return
    gates = {name: at_least_float32(side.gate) for name, (_, side) in sides.items()}
    found.logs["gate_l1"] = pairs.mean(gate_l1(list(gates.values()), [side.gamma for _, side in sides.values()]))
    for name, (_, side) in sides.items():
        found.logs |= {f"gamma/{name}": side.gamma, f"gate_mean/{name}": pairs.mean(gates[name].mean(1))}
    found.add("gate_l1", found.logs["gate_l1"], weights.gate_l1)
    if not weights.conflict:
        return
    z, t = (at_least_float32(x.detach()) for x in (out.z, out.t))
    trunk = Pairs.gathered(z, t, pairs.scale.detach(), pairs.sizes)
    gradients: dict[SideName, Tensor] = dict(zip(("image", "text"), info_nce_gradients(trunk), strict=True))
    values = [
        conflict(at_least_float32(base), gradients[name], at_least_float32(side.delta), side.gamma, gate_on(name))
        for name, (base, side) in sides.items()
    ]
    found.logs["conflict"] = pairs.mean(torch.stack(values).mean(0))
    found.add("conflict", found.logs["conflict"], weights.conflict)
