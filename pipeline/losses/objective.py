"""The training objective: model, transition heads and every loss in the one module that DDP wraps.

    L = L_InfoNCE + w_c(t) L_cross + w_i(t) L_in
        + λ_gram L_gram + λ_rkd L_rkd + λ_global L_global + λ_gate |γ| L1(g) + λ_conflict L_conflict

InfoNCE and all lists look at the outputs v, w; the trunk's z, t alone serve the conflict. Each distillation term is
divided by what a predictor that ignores the image scores, and averaged over its scales and branches (our reading), so
that a λ means the same for one scale as for three. Every term is a mean over the N pairs of all processes; a process
contributes (W/N) Σ over its own. Nothing here runs under autocast.

Legend: B own pairs, N gathered pairs, D width, T tokens, E student width, C teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pipeline.distributed import mean_over_ranks
from pipeline.errors import PipeError
from pipeline.losses.agreement import order_agreement
from pipeline.losses.contrastive import info_nce
from pipeline.losses.distillation import global_loss, gram_loss, rkd_loss
from pipeline.losses.gate import conflict, gate_l1, info_nce_gradients
from pipeline.losses.lists import ListSettings, list_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import Positions, at_least_float32
from pipeline.losses.targets import GLOBAL, TargetInfo, Targets
from pipeline.losses.transitions import Transitions

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import DinoRankCLIP, Forward, Side

Logs = dict[str, Tensor]


FIRST_RESIDUAL = 8.0  # a random student's contrasts, shrunk by 1 + ρ², are then small beside the teacher's


@dataclass(frozen=True)
class LossWeights:
    """The λ of every term and the shape of the lists; one field per key of the config's `loss`."""

    cross: float = 1.0
    in_modal: float = 1.0
    ramp: float = 0.667
    ramp_shape: Literal["cosine", "linear"] = "cosine"
    positions: Positions = "head_tail"
    head_share: float = 0.5
    list_depth: int | None = None
    include_self: bool = False
    gram: float = 1.0
    rkd: float = 1.0
    global_: float = 1.0
    gate_l1: float = 0.01
    conflict: float = 1.0


def ramp(progress: float, share: float, shape: Literal["cosine", "linear"]) -> float:
    """From 0 to 1 over the first `share` ρ of training, progress t in [0, 1]:

    cosine ½ (1 − cos(π min(t/ρ, 1))),  linear min(t/ρ, 1);  1 throughout where ρ = 0.
    """
    done = min(progress / share, 1.0) if share > 0 else 1.0
    return done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))


class Objective(nn.Module):
    """What `pipe train` minimises. Every parameter takes part in every step, whatever the weights, as DDP requires.

    Args:
        model: the dual encoder with its student and fusion, if it has them.
        order: R; 0 computes no lists, 1 has no transitions.
        transition_depth: T, positions with transitions, and the head in every order's position weights.
        transition_dim: d.
        weights: the λ.
        targets: what is known of the cache; None without distillation.

    Attributes:
        log_details: compute what only a log needs (Kendall's τ); the trainer sets it for the steps it logs. It must be
            the same on every process.
    """

    def __init__(
        self,
        model: DinoRankCLIP,
        *,
        order: int,
        transition_depth: int,
        transition_dim: int,
        weights: LossWeights,
        targets: TargetInfo | None,
    ) -> None:
        super().__init__()
        self.model, self.order, self.loss_weights = model, order, weights
        self.list_settings = ListSettings(
            transition_depth, weights.positions, weights.head_share, weights.list_depth, weights.include_self
        )
        # One head and one set of β for each modality that can be a candidate.
        self.transitions = nn.ModuleDict(
            {name: Transitions(model.trunk.embed_dim, order, transition_dim) for name in ("image", "text")}
            if order >= 2
            else {}
        )
        distils = any((weights.gram, weights.rkd, weights.global_))
        self.targets = Targets(targets) if targets is not None and distils else None
        self.baselines = _baselines(targets) if targets is not None and distils else {}
        # ρ² of each relational term, as its logarithm; see rkd_loss. It starts where the term is near its baseline.
        names = (*targets.scales, GLOBAL) if self.targets is not None and targets is not None and weights.rkd else ()
        self.residuals = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(FIRST_RESIDUAL))) for name in names}
        )
        self.log_details = False

    def weights(self, progress: float) -> tuple[float, float]:
        """w_c and w_i at `progress` in [0, 1] of training."""
        w = self.loss_weights
        reached = ramp(progress, w.ramp, w.ramp_shape)
        return reached * w.cross, reached * w.in_modal

    def forward(
        self, images: Tensor, tokens: Tensor, targets: dict[str, Tensor] | None, progress: float
    ) -> tuple[Tensor, Logs]:
        """The loss of one step.

        Args:
            images: (B, 3, H, W), normalised for the trunk. tokens: (B, L).
            targets: the teacher's rows as the cache stores them, and the boxes of crops (see `Targets.forward`); None
                without distillation. Baselines are those of whole views, in either case.
            progress: share of training done, in [0, 1].

        Returns:
            (W/N) Σ over own pairs, (), with gradient; and detached scalars, averaged over processes where they are to
            be logged (`log_details`, or in evaluation mode), else this process's own.
        """
        out = self.model(images, tokens)
        with torch.autocast(images.device.type, enabled=False):
            v, w, s = (at_least_float32(x) for x in (out.v, out.w, out.logit_scale))
            pairs = Pairs.gathered(v, w, s)
            contrastive = pairs.mean(info_nce(pairs))
            logs: Logs = {"info_nce": contrastive, "logit_scale": pairs.scale}
            loss = contrastive + _touch(out, [*self.transitions.parameters(), *self.residuals.parameters()])
            loss = loss + self._lists(pairs, progress, logs)
            loss = loss + self._distillation(out, targets, pairs, logs)
            loss = loss + self._gate(out, pairs, logs)
            shown = self.log_details or not self.training
            if shown:
                logs |= order_agreement(pairs)
        logs = {"loss": loss} | logs
        return loss, _averaged(logs) if shown else {name: value.detach().clone() for name, value in logs.items()}

    def _lists(self, pairs: Pairs, progress: float, logs: Logs) -> Tensor | float:
        """w_c L_cross + w_i L_in; 0 for order 0 and where both λ are 0."""
        cross, in_modal = self.weights(progress)
        asked = {"cross": (self.loss_weights.cross, cross), "in_modal": (self.loss_weights.in_modal, in_modal)}
        now = {group: weight for group, (final, weight) in asked.items() if final > 0}
        if not self.order or not now:
            return 0.0
        tables = (
            {
                "image": self.transitions["image"](pairs.image_all),
                "text": self.transitions["text"](pairs.text_all),
            }
            if self.order >= 2
            else None
        )
        found = list_loss(pairs, self.list_settings, now, tables)
        logs |= found.terms
        logs |= {f"weight/{group}": pairs.scale.new_tensor(weight) for group, weight in now.items()}
        for name, head in self.transitions.items():
            assert isinstance(head, Transitions)
            logs |= {f"beta/{name}/{r}": beta for r, beta in enumerate(head.betas.detach().clone(), start=2)}
        return found.loss

    def _distillation(self, out: Forward, stored: dict[str, Tensor] | None, pairs: Pairs, logs: Logs) -> Tensor | float:
        """λ_gram L_gram + λ_rkd L_rkd + λ_global L_global, each in units of its baseline."""
        if self.targets is None:
            return 0.0
        if stored is None:
            raise PipeError("a batch without teacher targets cannot be distilled", fix="train with --fusion none")
        w, teacher = self.loss_weights, self.targets(stored)
        students = out.student_tokens or {}
        relational = partial(rkd_loss, first=pairs.first, sizes=pairs.sizes)
        found: dict[str, dict[str, Tensor]] = {"gram": {}, "rkd": {}, "global": {}}
        for name, tokens in students.items():
            if w.gram:
                found["gram"][name] = gram_loss(tokens, teacher[name])
            if w.rkd:
                pooled = tokens.mean(1, dtype=pairs.scale.dtype)
                found["rkd"][name] = relational(pooled, teacher[name].mean(1), residual=self.residuals[name].exp())
        if w.rkd and out.text_pooled is not None:
            unit = nn.functional.normalize(teacher[GLOBAL], dim=1)
            found["rkd"][GLOBAL] = relational(out.text_pooled, unit, residual=self.residuals[GLOBAL].exp())
        if w.global_:
            heads = {"image": out.image_global, "text": out.text_global}
            found["global"] |= {k: global_loss(x, teacher[GLOBAL]) for k, x in heads.items() if x is not None}
        logs |= {f"residual/{name}": value.detach().exp() for name, value in self.residuals.items()}
        total: Tensor | float = 0.0
        for term, weight in (("gram", w.gram), ("rkd", w.rkd), ("global", w.global_)):
            ratios = {k: pairs.mean(x) / self.baselines[f"{term}/{k}"] for k, x in found[term].items()}
            logs |= {f"{term}/{name}": ratio for name, ratio in ratios.items()}
            if ratios:
                total = total + weight * torch.stack(list(ratios.values())).mean()
        return total

    def _gate(self, out: Forward, pairs: Pairs, logs: Logs) -> Tensor | float:
        """λ_gate |γ| L1(g) + λ_conflict L_conflict, both sides averaged."""
        sides: dict[Literal["image", "text"], tuple[Tensor, Side]] = {}
        if out.image is not None:
            sides["image"] = (out.z, out.image)
        if out.text is not None:
            sides["text"] = (out.t, out.text)
        if not sides:
            return 0.0
        w = self.loss_weights
        gates = {name: at_least_float32(side.gate) for name, (_, side) in sides.items()}
        penalty = pairs.mean(gate_l1(list(gates.values()), [side.gamma for _, side in sides.values()]))
        logs |= {"gate_l1": penalty}
        for name, (_, side) in sides.items():
            logs |= {f"gamma/{name}": side.gamma, f"gate_mean/{name}": pairs.mean(gates[name].mean(1))}
        total: Tensor | float = w.gate_l1 * penalty if w.gate_l1 else 0.0
        if w.conflict:
            z, t = (at_least_float32(x.detach()) for x in (out.z, out.t))
            trunk = Pairs.gathered(z, t, pairs.scale.detach(), pairs.sizes)
            gradients = dict(zip(("image", "text"), info_nce_gradients(trunk), strict=True))
            values = [
                conflict(
                    at_least_float32(base),
                    gradients[name],
                    at_least_float32(side.delta),
                    side.gamma,
                    self._gate_on(name),
                )
                for name, (base, side) in sides.items()
            ]
            logs["conflict"] = pairs.mean(torch.stack(values).mean(0))
            total = total + w.conflict * logs["conflict"]
        return total

    def _gate_on(self, side: Literal["image", "text"]) -> Callable[[Tensor, Tensor], Tensor]:
        gate: Callable[[Tensor, Tensor], Tensor] = partial(self.model.gate_on, side)
        return gate


def _baselines(targets: TargetInfo) -> dict[str, float]:
    """The unit of every term, by the name it is logged under."""
    found = {f"gram/{name}": targets.baseline("gram", name) for name in targets.scales}
    found |= {f"rkd/{name}": targets.baseline("rkd", name) for name in (*targets.scales, GLOBAL)}
    of_global = targets.baseline("global")
    return found | {"global/image": of_global, "global/text": of_global}


def _touch(out: Forward, heads: list[nn.Parameter]) -> Tensor:
    """0, with an edge to every head that the weights of the moment may leave unused."""
    outputs = [*(out.student_tokens or {}).values(), out.image_global, out.text_global, out.text_pooled]
    parts = [x.sum() for x in outputs if x is not None] + [p.sum() for p in heads]
    return 0.0 * torch.stack([at_least_float32(p) for p in parts]).sum() if parts else out.v.new_zeros(())


def _averaged(logs: Logs) -> Logs:
    values = mean_over_ranks(torch.stack([value.detach().to(logs["loss"].dtype) for value in logs.values()]))
    return dict(zip(logs, values.unbind(), strict=True))
