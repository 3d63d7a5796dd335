from __future__ import annotations

import pytest
import torch
from brute_force import Terms
from loss_inputs import heads, unit_pairs

from pipeline.losses.transitions import Transitions, position_queries, transition_scores


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_queries_against_keys_are_the_defined_terms(order: int) -> None:
    maps, h = heads(order)["text"], unit_pairs(7)[0]
    ranking = [4, 0, 6, 2, 5, 1]
    scores = transition_scores(maps(h), torch.tensor([ranking]), 2.5)[0]
    terms = Terms(maps, h)
    for k in range(len(ranking)):
        expected = 2.5 * torch.stack([terms.added(j, ranking[:k]) for j in range(7)])
        torch.testing.assert_close(scores[k], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_terms_begin_at_the_position_that_completes_their_tuple(order: int) -> None:
    maps, h = heads(order)["image"], unit_pairs(6)[0]
    with torch.no_grad():
        maps.betas.zero_()
        maps.betas[-1] = 1.0  # order r alone: zero at positions 1 … r − 1, not at r
    queries = position_queries(maps(h), torch.tensor([[0, 1, 2, 3, 4, 5]]))[0]
    assert (queries[: order - 1] == 0).all()
    assert (queries[order - 1 :].norm(dim=1) > 0).all()


def test_tuples_see_all_their_items_and_no_more() -> None:
    maps, h = heads(4)["image"], unit_pairs(8)[0]
    tables = maps(h)

    def query_at(ranking: list[int], k: int) -> torch.Tensor:
        return position_queries(tables, torch.tensor([ranking]))[0, k]

    base = query_at([0, 1, 2, 3, 4], 4)
    for place in range(1, 4):
        changed = [0, 1, 2, 3, 4]
        changed[place] = 7
        assert (query_at(changed, 4) - base).norm() > 1e-3
    assert torch.equal(query_at([7, 1, 2, 3, 4], 4), base)  # four places back: beyond order 4's three predecessors
    assert torch.equal(query_at([0, 1, 2, 3, 7], 4), base)  # the item to be chosen is no predecessor


def test_lags_are_told_apart() -> None:
    maps, h = heads(3)["image"], unit_pairs(5)[0]
    queries = position_queries(maps(h), torch.tensor([[0, 1, 2], [1, 0, 2]]))[:, 2]
    assert (queries[0] - queries[1]).norm() > 1e-3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_parameters_are_as_documented_and_betas_start_at_zero(order: int) -> None:
    wide, d = 10, 4
    maps = Transitions(wide, order, d)
    expected = 2 * wide * d + 1
    for r in range(3, order + 1):
        expected += (r - 1) * wide * d + 2 * wide * d + (r - 1) * d + 1
    assert sum(p.numel() for p in maps.parameters()) == expected
    assert (maps.betas == 0).all()
    assert all(p.abs().max() > 0 for name, p in maps.named_parameters() if name != "betas")


def test_orders_below_two_have_no_transitions() -> None:
    with pytest.raises(ValueError, match="order 1"):
        Transitions(4, 1)


def test_lists_shorter_than_the_order_have_no_terms() -> None:
    maps, h = heads(4)["text"], unit_pairs(5)[0]
    assert position_queries(maps(h), torch.tensor([[3]])).abs().max() == 0
