"""The ranking loss of training: four families of Plackett-Luce lists over a batch, fused, in bounded memory.

Each modality's similarities are ranked by the other's (RankCLIP, arXiv 2404.09387). For own row i over candidates j,
v images, w texts:

    cross      x_j = ⟨v_i, w_j⟩ ranked by ⟨w_i, v_j⟩       and the reverse
    in-modal   x_j = ⟨v_i, v_j⟩ ranked by ⟨w_i, w_j⟩       and the reverse

    L_list = Σ_k ω_k nll_k of one list,     L_cross, L_in = the sum of the group's two means over all N lists

The ranking is a reference: it takes no gradient. In-modal lists leave the item itself out (its similarity 1 would
always be first and teach nothing) unless `include_self`. Transitions (order ≥ 2) speak about the candidates, so each
candidate modality has tables of its own; they act on the head, the first T positions.

The loss is one scalar, so its gradients are computed in the forward pass, chunk by chunk, and the backward only scales
them: memory is set by the chunk, never by B × T × N. A group's cosines serve both its families, being the utilities of
one and the reference of the other (pipeline/losses/products.py).

Legend: B own rows, N candidates, b rows of a chunk, D width, T head positions, P listed positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.losses.head_kernel import Head, head_kernel
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import Positions, position_weights, worst_first
from pipeline.losses.precision import full_precision
from pipeline.losses.products import GROUPS, OTHER, Chunked, Family, Products, WholeCross, WholeInModal, fits_whole
from pipeline.losses.ranking import Ranked, first_order
from pipeline.losses.transitions import Tables, position_queries

ROW_SLOT, ALL_SLOT, SCALE_SLOT = {"image": 0, "text": 1}, {"image": 2, "text": 3}, 4  # places among the inputs
CELLS = {"cpu": 1 << 18, "cuda": 1 << 23}  # scores held at once, in each of a handful of buffers
HEAD_CELLS = 4  # times as many of the head, whose products are slow when they are small


@dataclass(frozen=True)
class ListSettings:
    """How lists are cut and weighted: `position_weights` for `positions` and `head_share`.

    Attributes:
        transition_depth: T, the head; the same for every order.
        list_depth: lists are cut to their first K positions (None: whole); denominators stay over all candidates.
        include_self: whether in-modal lists keep the row's own item.
        head: which code scores positions with transitions; see head_kernel.
    """

    transition_depth: int = 32
    positions: Positions = "head_tail"
    head_share: float = 0.5
    list_depth: int | None = None
    include_self: bool = False
    head: Head = "auto"


@dataclass
class ListLoss:
    """The weighted loss, and what it is made of.

    Attributes:
        loss: Σ_groups weight · L_group, (), with gradient.
        terms: detached scalars: "cross", "in_modal", and each with "/head_nll", "/tail_nll" behind (mean over lists and
            positions of both directions; a tail is absent where no list has one).
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def list_loss(
    pairs: Pairs,
    settings: ListSettings,
    weights: dict[str, float],
    tables: dict[str, Tables] | None = None,
    *,
    cells: int | None = None,
) -> ListLoss:
    """The weighted sum of the groups' losses over own rows, (W / N) Σ over them.

    Similarities and references are computed in the pairs' dtype (float32, or float64) with TF32 off: reduced precision
    leaves so few distinct values that the index would decide the order.

    Args:
        weights: group ("cross", "in_modal") → its weight now; a group that is not named, or has no candidates (a lone
            pair), is not computed.
        tables: candidate modality → its transitions; None for order 1.
        cells: scores held at once, about; the default suits the device.
    """
    weights = {group: weight for group, weight in weights.items() if _candidates(pairs, settings, group) > 0}
    state = _State(pairs, settings, tables, cells or CELLS.get(pairs.image_rows.device.type, 1 << 22))
    with torch.no_grad(), full_precision(), torch.autocast(pairs.image_rows.device.type, enabled=False):
        terms, value = _sum_chunks(state, weights)
    if state.gradients is None:
        return ListLoss(value, terms)
    attached: Tensor = _Attach.apply(value, state.gradients, *state.inputs)
    return ListLoss(attached, terms)


class _State:
    """The differentiable inputs in one flat list, and a gradient for each while the chunks are summed."""

    def __init__(self, pairs: Pairs, settings: ListSettings, tables: dict[str, Tables] | None, cells: int) -> None:
        self.pairs, self.settings, self.cells = pairs, settings, cells
        self.inputs = [pairs.image_rows, pairs.text_rows, pairs.image_all, pairs.text_all, pairs.scale]
        self.tables: dict[str, Tables] = {}
        self.first_table: dict[str, int] = {}
        for name, of_modality in (tables or {}).items():
            self.first_table[name] = len(self.inputs)
            self.inputs += of_modality.tensors()
            self.tables[name] = of_modality
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in self.inputs)
        self.whole = fits_whole(pairs.image_rows, len(pairs.sizes))
        self.gradients = self._zeros() if wanted else None
        # One Python object may stand for rows and candidates both; each has its own slot all the same.
        detached = [x.detach() for x in self.inputs]
        self.rows = {name: detached[slot] for name, slot in ROW_SLOT.items()}
        self.all = {name: detached[slot] for name, slot in ALL_SLOT.items()}
        self.scale = detached[SCALE_SLOT]

    def _zeros(self) -> list[Tensor | None]:
        """One for each input; none for the candidates where they are the rows and gradients go there."""
        unused = set(ALL_SLOT.values()) if self.whole else set()
        return [None if slot in unused else torch.zeros_like(x) for slot, x in enumerate(self.inputs)]

    def products(self, group: str) -> Products:
        """The group's cosines and the way of their gradients."""
        gradients = self.gradients
        of_rows = None if gradients is None else {name: _there(gradients[slot]) for name, slot in ROW_SLOT.items()}
        if self.whole:
            return (WholeCross if group == "cross" else WholeInModal)(self.rows, of_rows)
        of_all = None if gradients is None else {name: _there(gradients[slot]) for name, slot in ALL_SLOT.items()}
        return Chunked(group, self.rows, self.all, of_rows, of_all)

    def add(self, slot: int, gradient: Tensor) -> None:
        assert self.gradients is not None
        _there(self.gradients[slot]).add_(gradient)


def _there(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _sum_chunks(state: _State, weights: dict[str, float]) -> tuple[dict[str, Tensor], Tensor]:
    """Values (terms, weighted loss); gradients go to `state`."""
    terms: dict[str, Tensor] = {}
    value = state.scale.new_zeros(())
    for group, weight in weights.items():
        plan = _plan(state, group, weight)
        nll = _sum_group(state, group, plan) * state.pairs.share  # (2, P)
        terms[group] = (nll @ plan.share_of_position).sum().to(value.dtype)
        terms[f"{group}/head_nll"] = nll[:, : plan.head].mean().to(value.dtype)
        if plan.head < nll.shape[1]:
            terms[f"{group}/tail_nll"] = nll[:, plan.head :].mean().to(value.dtype)
        value = value + weight * terms[group]
    return terms, value


def _sum_group(state: _State, group: str, plan: _Plan) -> Tensor:
    """nll (2, P) of the group's two families, summed over own rows: 0 where there are none.

    What it holds is gone when it returns: the groups' N × N matrices never stand beside each other.
    """
    sums = {family: plan.share_of_position.new_zeros(plan.depth) for family in GROUPS[group]}
    own, rows = len(state.pairs.image_rows), max(1, state.cells // len(state.pairs.image_all))
    products = state.products(group)
    for start in range(0, own, rows):
        chunk = slice(start, min(start + rows, own))
        x, gradients = products.cosines(chunk), {}
        for family in GROUPS[group]:
            reference = x[OTHER[family[0]], OTHER[family[1]]]
            nll, gradient = _family_chunk(state, plan, family, x[family], reference, chunk)
            sums[family] += nll
            if gradient is not None:
                gradients[family] = gradient
        if gradients:
            products.add(chunk, gradients)
    products.finish()
    return torch.stack(list(sums.values()))


@dataclass(frozen=True)
class _Plan:
    """One family's positions.

    Attributes:
        depth, head: P and T ≤ P.
        share_of_position: ω (P,) float64.
        weights: the same times the group's weight and the row's share, for gradients.
        leaves_self_out: whether row i's own candidate is no candidate.
        transitions: whether the head has transition terms.
    """

    depth: int
    head: int
    share_of_position: Tensor
    weights: Tensor
    leaves_self_out: bool
    transitions: bool


def _plan(state: _State, group: str, weight: float) -> _Plan:
    settings, available = state.settings, _candidates(state.pairs, state.settings, group)
    depth = min(settings.list_depth or available, available)
    head = min(settings.transition_depth, depth)
    omega = position_weights(
        depth, head, positions=settings.positions, head_share=settings.head_share, device=state.scale.device
    )
    return _Plan(
        depth,
        head,
        omega,
        omega * (weight * state.pairs.share),
        available < len(state.pairs.image_all),
        bool(state.tables),
    )


def _candidates(pairs: Pairs, settings: ListSettings, group: str) -> int:
    """How many items a list of this group ranks; none where a lone pair leaves itself out."""
    return len(pairs.image_all) - (group == "in_modal" and not settings.include_self)


def _family_chunk(
    state: _State, plan: _Plan, family: Family, x: Tensor, reference: Tensor, chunk: slice
) -> tuple[Tensor, Tensor | None]:
    """nll (P,) summed over the chunk's lists, and the gradient for x. x, reference: (b, N)."""
    u = state.scale * x
    if plan.leaves_self_out:
        own = torch.arange(len(x), device=x.device)
        column = own + state.pairs.first + chunk.start
        u[own, column] = -torch.inf
        reference = reference.clone()
        reference[own, column] = -torch.inf  # the worst of the list, beyond every listed position
    order = worst_first(reference)
    wanted = state.gradients is not None
    if not plan.transitions:
        ranked = first_order(u, order, plan.weights, gradient=wanted)
        nll = ranked.nll
    else:
        ranked = _head(state, plan, family[1], u, order)
        nll = ranked.nll
        if plan.head < plan.depth:
            tail = first_order(u, order, plan.weights, skip=plan.head, gradient=wanted)
            nll = torch.cat([nll, tail.nll])
            if ranked.utilities is not None and tail.utilities is not None:
                ranked.utilities += tail.utilities
    g = ranked.utilities
    if g is None:
        return nll, None
    state.add(SCALE_SLOT, (g * x).sum(dtype=torch.float64).to(g.dtype))
    return nll, g.mul_(state.scale)


def _head(state: _State, plan: _Plan, of_candidates: str, u: Tensor, order: Tensor) -> Ranked:
    """The head's positions with their transition terms; gradients for the tables go to `state`."""
    tables = state.tables[of_candidates]
    ranking = order[:, order.shape[1] - plan.head :].flip(1)
    leaves = [x.detach().requires_grad_(state.gradients is not None) for x in tables.tensors()]
    with torch.set_grad_enabled(state.gradients is not None):
        queries = position_queries(tables.replaced(leaves), ranking)
    ranked = head_kernel(state.settings.head, u.device, u.dtype, queries.shape[2])(
        u,
        queries.detach(),
        leaves[0].detach(),
        ranking,
        state.scale,
        plan.weights[: plan.head],
        gradient=state.gradients is not None,
        cells=HEAD_CELLS * state.cells,
    )
    if state.gradients is not None and ranked.scale is not None and ranked.keys is not None:
        first = state.first_table[of_candidates]
        if queries.requires_grad:
            found = torch.autograd.grad(queries, leaves, ranked.queries, allow_unused=True)
            for slot, gradient in enumerate(found, start=first):
                if gradient is not None:
                    state.add(slot, gradient)
        state.add(first, ranked.keys)
        state.add(SCALE_SLOT, ranked.scale.to(state.scale.dtype))
    return ranked


class _Attach(torch.autograd.Function):
    """Gives a value that is already known the gradients that are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would let constants through where `scale` has no graph
            raise RuntimeError("the ranking loss has no second derivative: create_graph=True cannot be served")
        wanted = ctx.needs_input_grad[2:]
        pairs = zip(ctx.gradients, wanted, strict=True)
        scaled = (scale * g if needed and g is not None else None for g, needed in pairs)
        return (None, None, *scaled)
