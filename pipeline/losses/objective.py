"""The training objective: model, transition heads and every loss in the one module that DDP wraps.

    L = L_contrastive + w_c(t) L_cross + w_i(t) L_in
        + λ_gram L_gram + λ_rkd L_rkd + λ_global L_global + λ_gate |γ| L1(g) + λ_conflict L_conflict
        + λ_kd L_kd + λ_crd L_crd + λ_cyclic L_cyclic + λ_simclr L_simclr

L_contrastive is InfoNCE, or ALIP's weighted pair of them; L_kd and L_crd are options of distillation; the last two
are CyCLIP's and SLIP's, 0 elsewhere.
Contrastive loss and all lists look at the outputs v, w; the trunk's z, t alone serve the conflict. Each distillation
term is divided by what a predictor that ignores the image scores, and averaged over its scales and branches (our
reading), so that a λ means the same for one scale as for three. Every term is a mean over the N pairs of all processes;
a process contributes (W/N) Σ over its own. Nothing here runs under autocast.

Legend: B own pairs, N gathered pairs, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.distributed import mean_over_ranks
from pipeline.errors import PipeError
from pipeline.losses.agreement import order_agreement
from pipeline.losses.chunks import in_chunks, nothing
from pipeline.losses.contrastive import AdaptiveWeights, alip, cyclic, info_nce, simclr
from pipeline.losses.feature_heads import FeatureHeads
from pipeline.losses.lists import ListSettings, list_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import at_least_float32
from pipeline.losses.targets import GLOBAL, TargetInfo, Targets
from pipeline.losses.terms import Logs, SideName, Sum, add_distillation, add_gate
from pipeline.losses.transitions import Tables, Transitions
from pipeline.losses.weights import LossWeights
from pipeline.models.simclr import SimCLRHead

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import DinoRankCLIP, Forward

FIRST_RESIDUAL = 8.0  # a random student's contrasts, shrunk by 1 + ρ², are then small beside the teacher's


@dataclass
class Encoded:
    """What the model makes of a batch, row by row: all that the losses read.

    Attributes:
        out: of the pairs. second: (B, D), the second captions' outputs; None where no loss asks for them.
        pooled: (B, P) for each of the two augmented views; None without a SimCLR term.
    """

    out: Forward
    second: Tensor | None = None
    pooled: tuple[Tensor, Tensor] | None = None


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
        keep_terms: leave every weighted term of the next training forward in `terms`, name → (), with its graph. Also
            the same on every process.
        micro_batch_size: rows that the model encodes at once; None: all. See losses.chunks.
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
            transition_depth,
            weights.positions,
            weights.head_share,
            weights.list_depth,
            weights.include_self,
            weights.head,
        )
        # One head and one set of β for each modality that can be a candidate.
        self.transitions = nn.ModuleDict(
            {name: Transitions(model.trunk.embed_dim, order, transition_dim) for name in ("image", "text")}
            if order >= 2
            else {}
        )
        distils = targets is not None and weights.distils
        self.targets = Targets(targets) if targets is not None and distils else None
        self.baselines = _baselines(targets) if targets is not None and distils else {}
        # ρ² of each relational term, as its logarithm; see rkd_loss. It starts where the term is near its baseline.
        names = (*targets.scales, GLOBAL) if targets is not None and distils and weights.rkd else ()
        self.residuals = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(FIRST_RESIDUAL))) for name in names}
        )
        self.heads = _feature_heads(model, targets, weights) if distils and (weights.kd or weights.crd) else None
        model.exposes_features = self.heads is not None
        self.adaptive = AdaptiveWeights() if weights.contrastive == "alip" else None
        self.simclr = (
            SimCLRHead(model.trunk.pooled_width, weights.simclr_hidden, weights.simclr_dim) if weights.simclr else None
        )
        self.log_details = self.keep_terms = False
        self.micro_batch_size: int | None = None
        self.terms: dict[str, Tensor] = {}

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        targets: dict[str, Tensor] | None,
        progress: float,
        second_tokens: Tensor | None = None,
        augmented: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """The loss of one step.

        Args:
            images: (B, 3, H, W), normalised for the trunk. tokens: (B, L).
            targets: the teacher's rows as the cache stores them, and the boxes of crops (see `Targets.forward`); None
                without distillation. Baselines are those of whole views, in either case.
            progress: share of training done, in [0, 1].
            second_tokens: (B, L), another caption of each image, where the contrastive loss is ALIP's.
            augmented: (B, 2, 3, H, W), two augmented views of each image, where there is a SimCLR term.

        Returns:
            (W/N) Σ over own pairs, (), with gradient; and detached scalars, averaged over processes where they are to
            be logged (`log_details`, or in evaluation mode), else this process's own.
        """
        inputs = (images, tokens, second_tokens, augmented)
        encoded: Encoded = in_chunks(self._encode, inputs, self.micro_batch_size, inside=self.model)
        out = encoded.out
        projected = self._projected(encoded.pooled)
        with torch.autocast(images.device.type, enabled=False):
            v, w, s = (at_least_float32(x) for x in (out.v, out.w, out.logit_scale))
            pairs = Pairs.gathered(v, w, s)
            found = Sum(_touch(out, [*self.transitions.parameters(), *self.residuals.parameters()]))
            self._contrastive(found, pairs, encoded.second)
            self._lists(found, pairs, progress)
            self._distillation(found, out, targets, pairs)
            add_gate(found, out, pairs, self.loss_weights, self._gate_on)
            if projected is not None:
                self._simclr(found, pairs, *projected)
            shown = self.log_details or not self.training
            if shown:
                found.logs |= order_agreement(pairs)
        self.terms = self._whole(found.terms, encoded) if self._keeps else {}
        logs = {"loss": found.total} | found.logs
        return found.total, _averaged(logs) if shown else {k: value.detach().clone() for k, value in logs.items()}

    @property
    def _keeps(self) -> bool:
        """Validation comes between two steps, of which the first may have been measured."""
        return self.keep_terms and self.training

    def _encode(
        self, images: Tensor, tokens: Tensor, second_tokens: Tensor | None, augmented: Tensor | None
    ) -> Encoded:
        """Everything that is done row by row, and so may be done for a part of the rows."""
        return Encoded(self.model(images, tokens), self._second(second_tokens), self._pooled(augmented))

    def _whole(self, terms: dict[str, Tensor], encoded: Encoded) -> dict[str, Tensor]:
        """The terms; in chunks, each with edges to all outputs, so that its gradient leaves no activation behind."""
        if self.micro_batch_size is None:
            return terms
        none = nothing(encoded)
        return {name: term + none for name, term in terms.items()}

    def _second(self, tokens: Tensor | None) -> Tensor | None:
        """The second captions' outputs (B, D); None where no loss asks for them."""
        if self.adaptive is None:
            return None
        if tokens is None:
            raise PipeError("a batch without second captions cannot be trained on by ALIP", fix="run: pipe caption")
        return at_least_float32(self.model.encode_text(tokens))

    def _pooled(self, augmented: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The augmented views' features (B, P) each; encoded one by one, so that batch norms see one view at a time."""
        if self.simclr is None:
            return None
        if augmented is None:
            raise PipeError("a batch without augmented views has no SimCLR loss", where="loss.simclr")
        first, second = (self.model.trunk.pooled(view) for view in augmented.unbind(1))
        return first, second

    def _projected(self, pooled: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """(B, E) each; the head's batch norms are over all rows of all processes."""
        if self.simclr is None or pooled is None:
            return None
        return self.simclr(pooled[0]), self.simclr(pooled[1])

    def _contrastive(self, found: Sum, pairs: Pairs, second: Tensor | None) -> None:
        """InfoNCE or ALIP's loss, and CyCLIP's terms."""
        each = info_nce(pairs)
        found.logs |= {"info_nce": pairs.mean(each), "logit_scale": pairs.scale}
        if self.adaptive is None or second is None:
            found.add("contrastive", found.logs["info_nce"], 1.0)
        else:
            weights = self.adaptive(pairs, second, update=self.training)
            captions = Pairs.gathered(pairs.image_rows, second, pairs.scale, pairs.sizes)
            found.logs["alip"] = pairs.mean(alip(pairs, captions, weights))
            found.add("contrastive", found.logs["alip"], 1.0)
            shown = {"sample": weights.sample, "image_text": weights.image_text, "image_caption": weights.image_caption}
            found.logs |= {f"alip/weight/{name}": pairs.mean(value) for name, value in shown.items()}
            found.logs |= {f"alip/mean/{name}": value.clone() for name, value in self.adaptive.named_buffers()}
        asked = {"in_modal": self.loss_weights.cyclic_in_modal, "cross": self.loss_weights.cyclic_cross}
        if any(asked.values()):
            values = dict(zip(("in_modal", "cross"), cyclic(pairs), strict=True))
            for name, weight in asked.items():
                found.logs[f"cyclic/{name}"] = pairs.mean(values[name])
                found.add(f"cyclic/{name}", found.logs[f"cyclic/{name}"], weight)

    def _simclr(self, found: Sum, pairs: Pairs, first: Tensor, second: Tensor) -> None:
        temperature = self.loss_weights.simclr_temperature
        each = simclr(first, second, temperature=temperature, sizes=pairs.sizes, first_row=pairs.first)
        found.logs["simclr"] = pairs.mean(each)
        found.add("simclr", found.logs["simclr"], self.loss_weights.simclr)

    def _lists(self, found: Sum, pairs: Pairs, progress: float) -> None:
        """w_c L_cross + w_i L_in; nothing for order 0 and where both λ are 0."""
        now = self.loss_weights.ranking(progress)
        if not self.order or not now:
            return
        tables = self._tables(pairs)
        both = list_loss(pairs, self.list_settings, now, tables)
        found.total = found.total + both.loss
        found.logs |= both.terms
        found.logs |= {f"weight/{group}": pairs.scale.new_tensor(weight) for group, weight in now.items()}
        for name, head in self.transitions.items():
            betas = head.betas.detach().clone()  # type: ignore[operator]
            found.logs |= {f"beta/{name}/{r}": beta for r, beta in enumerate(betas, start=2)}
        if self._keeps:  # the fused loss has one gradient for both groups
            found.terms |= {
                group: list_loss(pairs, self.list_settings, {group: weight}, tables).loss
                for group, weight in now.items()
            }

    def _tables(self, pairs: Pairs) -> dict[str, Tables] | None:
        if self.order < 2:
            return None
        return {"image": self.transitions["image"](pairs.image_all), "text": self.transitions["text"](pairs.text_all)}

    def _distillation(self, found: Sum, out: Forward, stored: dict[str, Tensor] | None, pairs: Pairs) -> None:
        if self.targets is None:
            return
        if stored is None:
            raise PipeError("a batch without teacher targets cannot be distilled", fix="train with --fusion none")
        teacher = self.targets(stored)
        add_distillation(found, out, teacher, pairs, self.loss_weights, self.residuals, self.baselines, self.heads)

    def _gate_on(self, side: SideName) -> Callable[[Tensor, Tensor], Tensor]:
        gate: Callable[[Tensor, Tensor], Tensor] = partial(self.model.gate_on, side)
        return gate


def _baselines(targets: TargetInfo) -> dict[str, float]:
    """The unit of every term, by the name it is logged under."""
    found = {f"gram/{name}": targets.baseline("gram", name) for name in targets.scales}
    found |= {f"rkd/{name}": targets.baseline("rkd", name) for name in (*targets.scales, GLOBAL)}
    of_global = targets.baseline("global")
    found |= {"global/image": of_global, "global/text": of_global}
    return found if targets.measured is None else found | targets.measured.units()


def _feature_heads(model: DinoRankCLIP, targets: TargetInfo | None, weights: LossWeights) -> FeatureHeads:
    if targets is None or targets.measured is None:
        raise PipeError("loss.kd and loss.crd need what is measured of the cache", fix="build the targets with it")
    return FeatureHeads(model.student_widths, targets.measured, weights)


def _touch(out: Forward, heads: list[nn.Parameter]) -> Tensor:
    """0, with an edge to every head that the weights of the moment may leave unused."""
    outputs = [*(out.student_tokens or {}).values(), out.image_global, out.text_global, out.text_pooled]
    parts = [x.sum() for x in outputs if x is not None] + [p.sum() for p in heads]
    return 0.0 * torch.stack([at_least_float32(p) for p in parts]).sum() if parts else out.v.new_zeros(())


def _averaged(logs: Logs) -> Logs:
    values = mean_over_ranks(torch.stack([value.detach().to(logs["loss"].dtype) for value in logs.values()]))
    return dict(zip(logs, values.unbind(), strict=True))
