from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from brute_force import Terms, list_nll
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import heads, unit_pairs

from pipeline.losses.plackett_luce import plackett_luce_nll, position_weights, rank_of, worst_first
from pipeline.losses.transitions import transition_scores


def random_lists(b: int, n: int, depth: int, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    utilities = scale * (2 * torch.rand(b, n, generator=generator, dtype=torch.float64) - 1)
    ranking = torch.stack([torch.randperm(n, generator=generator)[:depth] for _ in range(b)])
    return utilities, ranking


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 7),
    depth=st.integers(1, 7),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 30.0, 100.0]),
)
def test_plain_form_equals_the_definition_in_value_and_gradient(n: int, depth: int, seed: int, scale: float) -> None:
    depth = min(depth, n)
    utilities, ranking = random_lists(3, n, depth, seed, scale)
    utilities.requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    expected = torch.stack(
        [sum(list_nll(u, order.tolist(), range(n), one, None, 0)) for u, order in zip(utilities, ranking, strict=True)]
    )
    found = plackett_luce_nll(utilities, ranking)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(x.sum(), utilities)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 6), depth=st.integers(1, 6), head=st.integers(0, 6), seed=st.integers(0, 99))
def test_added_transitions_act_on_their_own_positions(n: int, depth: int, head: int, seed: int) -> None:
    depth = min(depth, n)
    head = min(head, depth)
    utilities, ranking = random_lists(2, n, depth, seed, 3.0)
    added = torch.randn(2, head, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for row in range(2):
        total, order = 0.0, ranking[row].tolist()
        for k, chosen in enumerate(order):
            u = [float(utilities[row, j]) + (float(added[row, k, j]) if k < head else 0.0) for j in range(n)]
            total += math.log(sum(math.exp(u[j]) for j in range(n) if j not in order[:k])) - u[chosen]
        found = plackett_luce_nll(utilities, ranking, added)[row]
        assert float(found) == pytest.approx(total, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_of_all_rankings_sum_to_one(order: int) -> None:
    n = 6
    rankings = torch.tensor(list(permutations(range(n))))
    v, w = unit_pairs(n, seed=order)
    s = 4.0
    utilities = (s * v[0] @ w.T).expand(len(rankings), n)
    transitions = None
    if order > 1:
        transitions = transition_scores(heads(order, seed=order)["text"](w), rankings, s)
    nll = plackett_luce_nll(utilities, rankings, transitions)
    assert nll.exp().min() > 0
    assert float((-nll.detach()).exp().sum()) == pytest.approx(1.0, abs=1e-10)
    if order > 1:  # and the transitions are not idle
        assert (nll - plackett_luce_nll(utilities, rankings)).abs().max() > 0.1


def test_a_list_of_one_is_cross_entropy() -> None:
    utilities, ranking = random_lists(4, 9, 1, 0, 20.0)
    expected = torch.nn.functional.cross_entropy(utilities, ranking[:, 0], reduction="none")
    torch.testing.assert_close(plackett_luce_nll(utilities, ranking), expected)


def test_plain_form_has_the_gradient_it_claims() -> None:
    utilities, ranking = random_lists(2, 6, 4, 1, 2.0)
    added = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda u, a: plackett_luce_nll(u, ranking, a), (utilities.requires_grad_(), added), atol=1e-7
    )


def test_last_position_of_a_whole_list_is_free_and_taken_items_leave_no_trace() -> None:
    utilities, ranking = random_lists(1, 5, 5, 2, 1.0)
    whole = plackett_luce_nll(utilities, ranking)
    torch.testing.assert_close(whole, plackett_luce_nll(utilities, ranking[:, :4]))
    # An item that holds all the mass, ranked first, must not swallow what is left (subtracting it would).
    utilities[0, ranking[0, 0]] += 200.0
    raised = plackett_luce_nll(utilities, ranking)
    rest = [j for j in range(5) if j != int(ranking[0, 0])]
    again = torch.tensor([[rest.index(int(j)) for j in ranking[0, 1:]]])
    torch.testing.assert_close(raised, plackett_luce_nll(utilities[:, rest], again))


def test_half_precision_is_computed_in_float32() -> None:
    utilities, ranking = random_lists(3, 50, 50, 3, 100.0)
    found = plackett_luce_nll(utilities.bfloat16(), ranking)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plackett_luce_nll(utilities.bfloat16().float(), ranking))
    assert found.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 7),
    depth=st.integers(1, 7),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 30.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_inputs_of_low_precision_lose_only_their_own_rounding(
    n: int, depth: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    """Against the definition in float64 on the very numbers that came in."""
    depth = min(depth, n)
    utilities, ranking = random_lists(3, n, depth, seed, scale)
    low = utilities.to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    expected = torch.stack(
        [sum(list_nll(u, order.tolist(), range(n), one, None, 0)) for u, order in zip(exact, ranking, strict=True)]
    )
    found = plackett_luce_nll(low, ranking)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4 if scale == 100 else 2e-5)
    (gradient,) = torch.autograd.grad(found.sum(), low)
    (of_exact,) = torch.autograd.grad(expected.sum(), exact)
    step = torch.finfo(dtype).eps * 4 if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(gradient.double(), of_exact, rtol=step, atol=max(step, 2e-5))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="ranking"):
        plackett_luce_nll(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="transitions"):
        plackett_luce_nll(torch.zeros(1, 3), torch.tensor([[0]]), torch.zeros(1, 2, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-math.inf, -2.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 1.0, 3e38]), min_size=1))
def test_worst_first_is_the_stable_order_reversed(values: list[float]) -> None:
    expected = sorted(range(len(values)), key=lambda j: -torch.tensor(values[j], dtype=torch.float32).item())
    for dtype in (torch.float32, torch.float64):
        reference = torch.tensor([values], dtype=torch.float32).to(dtype)
        assert worst_first(reference)[0].flip(0).tolist() == expected


def test_worst_first_leaves_its_input_alone_and_orders_many_rows() -> None:
    reference = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    before = reference.clone()
    order = worst_first(reference)
    assert torch.equal(reference, before)
    assert torch.equal(order, reference.argsort(dim=1))


def test_rank_of_inverts_a_ranking() -> None:
    assert rank_of(torch.tensor([[3, 1]]), 5).tolist() == [[2, 1, 2, 0, 2]]


@pytest.mark.parametrize(("depth", "head"), [(10, 3), (10, 10), (1, 1), (33, 32)])
@pytest.mark.parametrize("positions", ["head_tail", "uniform"])
def test_position_weights_sum_to_one_and_share_as_told(depth: int, head: int, positions: str) -> None:
    weights = position_weights(depth, head, positions=positions, head_share=0.3)
    assert float(weights.sum()) == pytest.approx(1.0)
    in_head = float(weights[:head].sum())
    expected = 1.0 if head == depth else 0.3 if positions == "head_tail" else head / depth
    assert in_head == pytest.approx(expected)


def test_brute_force_terms_stay_in_one_cosine() -> None:
    maps = heads(4, beta=0.0)["text"]
    h = unit_pairs(6)[0]
    for index in range(3):  # one order at a time, β = 1
        with torch.no_grad():
            maps.betas.zero_()
            maps.betas[index] = 1.0
        added = torch.stack([Terms(maps, h).added(j, [0, 1, 2]) for j in range(3, 6)])
        assert added.abs().max() <= 1.0
        scores = transition_scores(maps(h), torch.tensor([[0, 1, 2, 3]]), 1.0)[0, 3, 3:]
        torch.testing.assert_close(scores, added)
