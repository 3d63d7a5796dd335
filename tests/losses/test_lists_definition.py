"""The fused loss against its definition where sizes, dtypes and ways of computing it vary."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from brute_force import ranking_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import heads, unit_pairs

from pipeline.losses import products
from pipeline.losses.contrastive import info_nce
from pipeline.losses.lists import ListSettings, list_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import plackett_luce_nll
from pipeline.losses.transitions import Tables, Transitions, position_queries, transition_scores

BOTH = {"cross": 0.7, "in_modal": 1.3}


def loss_of(
    pairs: Pairs, maps: dict[str, Transitions] | None, cells: int | None = None, **options: Any
) -> torch.Tensor:
    tables = None
    if maps is not None:
        tables = {"image": maps["image"](pairs.image_all), "text": maps["text"](pairs.text_all)}
    return list_loss(pairs, ListSettings(**options), BOTH, tables, cells=cells).loss


def leaves(v: torch.Tensor, w: torch.Tensor, s: float, maps: dict[str, Transitions] | None) -> list[torch.Tensor]:
    found = [v.clone().requires_grad_(), w.clone().requires_grad_(), torch.tensor(s, dtype=v.dtype, requires_grad=True)]
    return found + [p for head in (maps or {}).values() for p in head.parameters()]


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True, retain_graph=True))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 6),
    order=st.integers(1, 5),
    depth=st.integers(1, 7),
    list_depth=st.sampled_from([None, 1, 2, 4]),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    levels=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 999),
)
def test_every_dtype_equals_the_float64_definition_where_products_are_exact(
    n, order, depth, list_depth, scale, dtype, levels, seed
) -> None:
    # Multiples of 1/levels: exact in bfloat16, their products exact in float32, and many of them equal.
    exact = (unit_pairs(n, 4, seed=seed) * levels).round() / levels
    given = exact.to(dtype)
    assert torch.equal(given.double(), exact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # what the objective makes of it
    maps = heads(order, 4, dim=2, seed=seed, beta=0.3) if order > 1 else None
    options = {"transition_depth": depth, "list_depth": list_depth}
    of_definition = leaves(*exact, scale, maps)
    expected = sum(
        weight * ranking_loss(*of_definition[:3], maps, group=group, **options) for group, weight in BOTH.items()
    )
    of_expected = gradients(expected, of_definition)
    maps = {name: head.to(wide) for name, head in maps.items()} if maps else None
    inputs = leaves(*given.to(wide), scale, maps)
    found = loss_of(Pairs.alone(*inputs[:3]), maps, **options)
    assert found.dtype == wide
    close = {"rtol": 1e-9, "atol": 1e-9} if wide == torch.float64 else {"rtol": 2e-4, "atol": 1e-4 * scale}
    torch.testing.assert_close(found.double(), expected, **close)
    for ours, theirs in zip(gradients(found, inputs), of_expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **close)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_gradcheck_through_scale_embeddings_and_tables(order: int) -> None:
    v, w = unit_pairs(5, 3, seed=order)
    tables: dict[str, Tables] = {}
    if order > 1:
        maps = heads(order, 3, dim=2, beta=0.3)
        tables = {name: maps[name](h.detach()) for name, h in (("image", v), ("text", w))}
    given = [x.detach().clone().requires_grad_() for of in tables.values() for x in of.tensors()]
    size = len(given) // 2
    # Rows and candidates apart, as several processes have them: each is an input of its own.
    embeddings = [x.clone().requires_grad_() for x in (v[1:4], w[1:4], v, w)]
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)

    def loss(s: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        of_tables = inputs[4:]
        replaced = {
            name: old.replaced(list(of_tables[i * size : (i + 1) * size]))
            for i, (name, old) in enumerate(tables.items())
        }
        pairs = Pairs(*inputs[:4], s, first=1, share=0.2, sizes=(1, 3, 1))
        return list_loss(pairs, ListSettings(transition_depth=4), BOTH, replaced or None).loss

    assert torch.autograd.gradcheck(loss, (s, *embeddings, *given), atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_gradcheck_of_position_queries(order: int) -> None:
    old = heads(order, 3, dim=2)["text"](unit_pairs(6, 3)[0])
    inputs = [x.detach().clone().requires_grad_() for x in old.tensors()]
    ranking = torch.tensor([[4, 0, 3, 5, 1], [1, 2, 5, 0, 4]])
    assert torch.autograd.gradcheck(lambda *x: position_queries(old.replaced(list(x)), ranking), tuple(inputs))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("panels", [1, 3])
def test_rows_that_are_candidates_equal_rows_beside_them(
    order: int, panels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process multiplies half as often; several processes, whose rows are a part, give the same sums."""
    n = 13
    monkeypatch.setattr(products, "BLOCK", 4)
    maps = heads(order) if order > 1 else None
    inputs = leaves(*unit_pairs(n), 30.0, maps)
    v, w, s = inputs[:3]
    together = [loss_of(Pairs.alone(v, w, s), maps, transition_depth=4, cells=cells) for cells in (1 << 19, 5 * n)]
    monkeypatch.setattr(products, "WHOLE_BYTES", 0)  # in chunks, though rows are candidates
    together.append(loss_of(Pairs.alone(v, w, s), maps, transition_depth=4, cells=5 * n))
    bounds = [n * i // panels for i in range(panels + 1)]
    apart = sum(
        loss_of(
            Pairs(v[a:b], w[a:b], v, w, s, first=a, share=1 / n, sizes=tuple(b - a for a, b in pairwise(bounds))),
            maps,
            transition_depth=4,
            cells=2 * n,
        )
        for a, b in pairwise(bounds)
    )
    expected = gradients(apart, inputs)
    for found in together:
        torch.testing.assert_close(found, apart, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(found, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_depth_one_with_the_matched_pair_first_is_info_nce_twice_gradient_too() -> None:
    v = torch.eye(6, dtype=torch.float64)
    w = torch.nn.functional.normalize(v + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    inputs = leaves(v, w, 7.0, None)
    pairs = Pairs.alone(*inputs[:3])
    ours = list_loss(pairs, ListSettings(list_depth=1), {"cross": 1.0}).loss
    order_0 = 2 * pairs.mean(info_nce(pairs))
    torch.testing.assert_close(ours, order_0, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, inputs), gradients(order_0, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def vector_list_mle(u: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """ListMLE with 1e-10 inside the logarithm, mean over lists, float32 as it is trained."""
    u = u.gather(1, reference.argsort(dim=1, descending=True, stable=True))
    u = u - u.amax(1, keepdim=True)
    return ((u.exp().flip(1).cumsum(1).flip(1) + 1e-10).log() - u).sum(1).mean()


@pytest.mark.parametrize("s", [1.0, 100.0])
def test_learned_rankings_agree_with_the_published_loss_at_s_1_and_are_exact_at_s_100(s: float) -> None:
    """Texts are images: each list is ranked as its utilities are, so that the worst lie 200 nats below the best."""
    n = 64
    angle = torch.linspace(0, torch.pi, n, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    inputs = leaves(circle, circle, s, None)
    options = {"positions": "uniform", "include_self": True}
    found = n * list_loss(Pairs.alone(*inputs[:3]), ListSettings(**options), {"cross": 1.0, "in_modal": 1.0}).loss
    x = (inputs[0] @ inputs[1].T, inputs[0] @ inputs[0].T, inputs[1] @ inputs[1].T)
    lists = [(x[0], x[0].T), (x[0].T, x[0]), (x[1], x[2]), (x[2], x[1])]
    ranking = [r.detach().argsort(dim=1, descending=True, stable=True) for _, r in lists]
    exact = sum(plackett_luce_nll(inputs[2] * u, order).mean() for (u, _), order in zip(lists, ranking, strict=True))
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=0)
    of_exact = gradients(exact, inputs)
    for ours, theirs in zip(gradients(found, inputs), of_exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    published = sum(vector_list_mle(inputs[2] * u, r.detach()) for u, r in lists)
    of_published = gradients(published, inputs)
    off = abs(float((published / exact).detach()) - 1)
    off_scale = abs(float(of_published[2] / of_exact[2]) - 1)
    if s == 1.0:
        assert max(off, off_scale) < 1e-8
    else:
        assert off > 0.5
        assert off_scale > 0.5
    single = leaves(circle.float(), circle.float(), s, None)
    ours = n * list_loss(Pairs.alone(*single[:3]), ListSettings(**options), {"cross": 1.0, "in_modal": 1.0}).loss
    assert float(ours.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    assert float(gradients(ours, single)[2]) == pytest.approx(float(of_exact[2]), rel=1e-3)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_plain_form_with_a_zero_last_beta_is_the_order_below(order: int) -> None:
    maps, (v, w) = heads(order)["text"], unit_pairs(7)
    with torch.no_grad():
        maps.betas[-1] = 0.0
    ranking = torch.tensor([[3, 0, 6, 2, 5, 1, 4], [0, 1, 2, 3, 4, 5, 6]])
    utilities = 5.0 * v[:2] @ w.T
    above = plackett_luce_nll(utilities, ranking, transition_scores(maps(w), ranking, 5.0)).sum()
    if order == 2:
        torch.testing.assert_close(above, plackett_luce_nll(utilities, ranking).sum(), rtol=1e-13, atol=0)
        assert gradients(above, [maps.key.weight])[0].abs().max() == 0
        return
    below_maps = Transitions(5, order - 1, 3).double()
    state = maps.state_dict()
    state["betas"] = state["betas"][:-1]
    below_maps.load_state_dict(state, strict=False)
    below = plackett_luce_nll(utilities, ranking, transition_scores(below_maps(w), ranking, 5.0)).sum()
    torch.testing.assert_close(above, below, rtol=1e-13, atol=0)
    upper = dict(maps.named_parameters())
    for name, parameter in below_maps.named_parameters():
        ours, theirs = gradients(above + 0 * upper[name].sum(), [upper[name]])[0], torch.autograd.grad(
            below, parameter, retain_graph=True
        )[0]  # fmt: skip
        torch.testing.assert_close(ours[: len(theirs)] if name == "betas" else ours, theirs, rtol=1e-10, atol=1e-12)
