from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from brute_force import published_list_mle, ranking_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import heads, tied_pairs, unit_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.losses import lists, products
from pipeline.losses.lists import ListSettings, list_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import plackett_luce_nll, worst_first
from pipeline.losses.transitions import Transitions

BOTH = {"cross": 0.7, "in_modal": 1.3}


@pytest.fixture(scope="module", params=["whole", "chunked"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of this for a process that has all pairs to itself, and for one of several."""
    before = products.WHOLE_BYTES, products.BLOCK
    products.BLOCK = 4  # so that small matrices have several
    if request.param == "chunked":
        products.WHOLE_BYTES = 0
    yield request.param
    products.WHOLE_BYTES, products.BLOCK = before


def fused(
    v: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    maps: dict[str, Transitions] | None = None,
    weights: dict[str, float] = BOTH,
    cells: int | None = None,
    **options: Any,
) -> torch.Tensor:
    tables = None if maps is None else {"image": maps["image"](v), "text": maps["text"](w)}
    return list_loss(Pairs.alone(v, w, s), ListSettings(**options), weights, tables, cells=cells).loss


def leaves(pairs: torch.Tensor, s: float, maps: dict[str, Transitions] | None) -> list[torch.Tensor]:
    found = [pairs[0].clone().requires_grad_(), pairs[1].clone().requires_grad_()]
    found.append(torch.tensor(s, dtype=pairs.dtype, requires_grad=True))
    return found + [p for head in (maps or {}).values() for p in head.parameters()]


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 5),
    order=st.integers(1, 4),
    transition_depth=st.integers(1, 6),
    list_depth=st.sampled_from([None, None, 1, 2, 3]),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    include_self=st.booleans(),
    positions=st.sampled_from(["head_tail", "uniform"]),
    tied=st.booleans(),
    cells=st.sampled_from([1, 20, 1 << 18]),
    seed=st.integers(0, 999),
)
def test_fused_loss_equals_brute_force_in_value_and_every_gradient(
    n, order, transition_depth, list_depth, scale, include_self, positions, tied, cells, seed
) -> None:
    pairs = tied_pairs(n, seed=seed) if tied else unit_pairs(n, 4, seed=seed)
    maps = heads(order, 4, dim=2, seed=seed, beta=0.5) if order > 1 else None
    inputs = leaves(pairs, scale, maps)
    options = {
        "transition_depth": transition_depth,
        "list_depth": list_depth,
        "include_self": include_self,
        "positions": positions,
        "head_share": 0.3,
    }
    found = fused(*inputs[:3], maps, cells=cells, **options)
    expected = sum(weight * ranking_loss(*inputs[:3], maps, group=group, **options) for group, weight in BOTH.items())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("order", [1, 3])
def test_fused_loss_passes_gradcheck(order: int) -> None:
    maps = heads(order, 3, dim=2, beta=0.3) if order > 1 else None
    inputs = leaves(unit_pairs(4, 3, seed=5), 3.0, maps)
    with torch.no_grad():  # a finite step must not change the references' order
        reference = [x.clone() for x in inputs[:2]]

    def loss(v: torch.Tensor, w: torch.Tensor, s: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return fused(v, w, s, maps, transition_depth=3)

    assert torch.autograd.gradcheck(loss, tuple(inputs), atol=1e-6, rtol=1e-4, fast_mode=True)
    assert torch.equal(reference[0], inputs[0].detach())


@pytest.mark.parametrize("order", [2, 3, 4])
def test_order_r_equals_order_1_when_betas_are_zero(order: int) -> None:
    maps = heads(order, beta=0.0)
    inputs = leaves(unit_pairs(9), 20.0, maps)
    ours = fused(*inputs[:3], maps, transition_depth=4)
    first = fused(*inputs[:3], transition_depth=4)
    torch.testing.assert_close(ours, first, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, inputs[:3]), gradients(first, inputs[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [3, 4, 5])
def test_zero_last_beta_equals_the_order_below_in_value_and_shared_gradients(order: int) -> None:
    above = heads(order)
    below = {name: Transitions(5, order - 1, 3).double() for name in above}
    for name, head in above.items():
        with torch.no_grad():
            head.betas[-1] = 0.0
            state = head.state_dict()
            state["betas"] = state["betas"][:-1]
            below[name].load_state_dict(state, strict=False)
    inputs = leaves(unit_pairs(8), 10.0, None)
    values = [fused(*inputs, maps, transition_depth=5) for maps in (above, below)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    for loss in values:
        loss.backward()
    for name in above:
        upper, lower = dict(above[name].named_parameters()), dict(below[name].named_parameters())
        for key, parameter in lower.items():
            gradient = upper[key].grad
            assert gradient is not None
            gradient = gradient[:-1] if key == "betas" else gradient
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_first_step_moves_betas_though_they_start_at_zero() -> None:
    torch.manual_seed(0)
    maps = {name: Transitions(5, 3, 4).double() for name in ("image", "text")}
    inputs = leaves(unit_pairs(8), 10.0, maps)
    fused(*inputs[:3], maps).backward()
    for head in maps.values():
        assert (head.betas == 0).all()
        assert (head.betas.grad.abs() > 1e-6).all()
        assert all(p.abs().sum() > 0 for name, p in head.named_parameters() if name != "betas")


def test_depth_one_with_the_matched_pair_first_is_cross_entropy() -> None:
    v = torch.eye(6, dtype=torch.float64)  # each row's most similar partner is its own
    w = torch.nn.functional.normalize(v + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    s = torch.tensor(7.0, dtype=torch.float64)
    found = fused(v, w, s, weights={"cross": 1.0}, list_depth=1)
    target, logits = torch.arange(6), s * v @ w.T
    both = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    torch.testing.assert_close(found, both)


def test_uniform_first_order_with_self_times_n_is_the_published_list_mle() -> None:
    n = 12
    v, w = unit_pairs(n, 8, seed=3)
    found = n * fused(
        v, w, torch.tensor(1.0, dtype=torch.float64), weights={"cross": 1.0, "in_modal": 1.0},
        positions="uniform", include_self=True,
    )  # fmt: skip
    cross, images, texts = v @ w.T, v @ v.T, w @ w.T
    published = sum(
        published_list_mle(a, b) for a, b in [(cross, cross.T), (cross.T, cross), (images, texts), (texts, images)]
    )
    # The published value carries 1e-10 inside each logarithm.
    torch.testing.assert_close(found, published, rtol=1e-8, atol=0)


def test_float32_is_exact_at_s_100_on_a_learned_ranking_where_the_published_loss_is_not() -> None:
    n = 64
    angle = torch.linspace(0, torch.pi, n, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)  # utilities span 200 nats and the reference agrees
    s = torch.tensor(100.0, dtype=torch.float64)
    options = {"positions": "uniform", "include_self": True, "weights": {"cross": 1.0}}
    x = s * circle @ circle.T
    exact = 2 * plackett_luce_nll(x, worst_first(circle @ circle.T).flip(1)).mean() / n
    single = circle.float().requires_grad_()
    found = fused(single, circle.float().roll(0, 0), s.float(), **options)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(exact), rel=1e-3)
    assert single.grad is not None
    assert single.grad.isfinite().all()
    published = 2 * published_list_mle(x[:4], x[:4]) / n
    right = 2 * plackett_luce_nll(x[:4], worst_first(x[:4]).flip(1)).mean() / n
    assert abs(float(published / right) - 1) > 0.05


@pytest.mark.parametrize("order", [1, 3])
def test_chunk_size_changes_nothing(order: int) -> None:
    maps = heads(order) if order > 1 else None
    inputs = leaves(unit_pairs(13), 30.0, maps)
    whole = fused(*inputs[:3], maps, transition_depth=4, cells=1 << 20)
    of_whole = gradients(whole, inputs)
    for cells in (1, 13 * 5, 13 * 4 * 3):
        cut = fused(*inputs[:3], maps, transition_depth=4, cells=cells)
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(cut, inputs), of_whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_float32_agrees_with_float64(order: int) -> None:
    maps = heads(order, 16, beta=0.2) if order > 1 else None
    pairs = unit_pairs(80, 16, seed=2).float()
    wide = leaves(pairs.double(), 50.0, maps)
    expected = fused(*wide[:3], maps)
    of_expected = gradients(expected, wide)
    narrow_maps = {k: m.float() for k, m in maps.items()} if maps else None
    narrow = leaves(pairs, 50.0, narrow_maps)
    found = fused(*narrow[:3], narrow_maps)
    # Two precisions rank near-ties differently: a few lists differ by a little.
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    for a, b in zip(gradients(found, narrow), of_expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_autocast_does_not_reach_the_lists() -> None:
    maps = {k: m.float() for k, m in heads(3).items()}
    inputs = leaves(unit_pairs(10).float(), 40.0, maps)
    tables = {"image": maps["image"](inputs[0]), "text": maps["text"](inputs[1])}
    pairs = Pairs.alone(*inputs[:3])
    plain = list_loss(pairs, ListSettings(), BOTH, tables).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = list_loss(pairs, ListSettings(), BOTH, tables).loss
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


def test_terms_recompose_the_loss_and_split_head_from_tail() -> None:
    maps = heads(2)
    v, w, s, *_ = leaves(unit_pairs(9), 10.0, maps)
    tables = {"image": maps["image"](v), "text": maps["text"](w)}
    found = list_loss(Pairs.alone(v, w, s), ListSettings(transition_depth=3, head_share=0.25), BOTH, tables)
    terms = found.terms
    assert float(found.loss.detach()) == pytest.approx(sum(BOTH[k] * float(terms[k]) for k in BOTH))
    for group in BOTH:  # both directions: twice the mean over them
        expected = 2 * (0.25 * terms[f"{group}/head_nll"] + 0.75 * terms[f"{group}/tail_nll"])
        torch.testing.assert_close(terms[group], expected)
        assert not terms[group].requires_grad
    whole_head = list_loss(Pairs.alone(v, w, s), ListSettings(transition_depth=32), BOTH, tables)
    assert "cross/tail_nll" not in whole_head.terms


def test_backward_scales_and_repeats() -> None:
    inputs = leaves(unit_pairs(6), 5.0, None)
    loss = fused(*inputs)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_second_derivative_is_refused() -> None:
    inputs = leaves(unit_pairs(6), 5.0, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(*inputs), inputs, create_graph=True)


@pytest.mark.parametrize("order", [1, 3])
def test_a_process_without_pairs_adds_nothing(order: int) -> None:
    maps = heads(order) if order > 1 else None
    v, w, s, *_ = leaves(unit_pairs(6), 5.0, maps)
    tables = None if maps is None else {"image": maps["image"](v), "text": maps["text"](w)}
    pairs = Pairs(v[:0], w[:0], v, w, s, first=6, share=2 / 6, sizes=(6, 0))
    found = list_loss(pairs, ListSettings(transition_depth=3), BOTH, tables)
    assert float(found.loss.detach()) == 0.0
    assert {"cross", "cross/head_nll", "in_modal/tail_nll"} <= found.terms.keys()
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(found.loss, [v, w, s]))


def test_the_groups_matrices_never_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Each may fill WHOLE_BYTES."""
    alive: list[weakref.ref[object]] = []
    make = lists._State.products

    def products_of(state: Any, group: str) -> products.Products:
        assert not [1 for earlier in alive if earlier() is not None]
        made = make(state, group)
        held = [made.x] if isinstance(made, products.WholeCross) else []
        held += list(made.x.values()) if isinstance(made, products.WholeInModal) else []
        alive.extend(weakref.ref(x.untyped_storage()) for x in held)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(lists._State, "products", products_of)
    fused(*leaves(unit_pairs(6), 5.0, None))
    assert len(alive) == {"whole": 2 + 3, "chunked": 2}[way]


def test_without_gradients_the_value_is_the_same_and_no_graph_is_made() -> None:
    maps = heads(3)
    inputs = leaves(unit_pairs(7), 5.0, maps)
    with torch.no_grad():
        bare = fused(*inputs[:3], maps)
    assert not bare.requires_grad
    torch.testing.assert_close(bare, fused(*inputs[:3], maps).detach(), rtol=1e-13, atol=0)


def test_zero_weight_keeps_heads_in_the_graph() -> None:
    maps = heads(3)
    inputs = leaves(unit_pairs(7), 5.0, maps)
    found = torch.autograd.grad(fused(*inputs[:3], maps, weights={"cross": 0.0, "in_modal": 0.0}), inputs)
    assert all(g.abs().max() == 0 for g in found)


def test_references_carry_no_gradient() -> None:
    # Only text-text similarities rank the image-image lists, so texts get nothing from that direction: with texts all
    # equal, text-text utilities are constant and their gradient lies along the texts themselves.
    v, w = unit_pairs(5)
    w = w[:1].expand(5, -1).clone()
    w.requires_grad_()
    fused(v, w, torch.tensor(3.0, dtype=torch.float64), weights={"in_modal": 1.0}).backward()
    tangent = w.grad - (w.grad * w).sum(1, keepdim=True) * w
    assert tangent.abs().max() < 1e-12


def test_a_lone_pair_has_no_lists_in_modal_and_a_free_one_across() -> None:
    v, w = unit_pairs(1)
    v.requires_grad_()
    loss = fused(v, w, torch.tensor(3.0, dtype=torch.float64))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert v.grad.abs().max() == 0


def test_matmul_precision_is_left_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        v, w = unit_pairs(4)
        fused(v, w, torch.tensor(3.0, dtype=torch.float64))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_precision_chosen_by_backend_is_overruled_and_left_as_it_was() -> None:
    """Then PyTorch refuses to say what its one setting is."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    v, w, s = (x.float() for x in (*unit_pairs(4), torch.tensor(3.0)))
    expected = fused(v, w, s)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with ProductPrecisions() as seen:
            assert torch.equal(fused(v, w, s), expected)
        assert set(seen.seen) == {"highest"}
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_one_backends_precision_is_not_lost_in_anothers() -> None:
    """`allow_tf32` speaks of CUDA alone."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        chosen = [backend.fp32_precision for backend in backends]
        fused(*leaves(unit_pairs(4), 3.0, None))
        assert [backend.fp32_precision for backend in backends] == chosen
        torch.backends.cuda.matmul.allow_tf32 = False
        fused(*leaves(unit_pairs(4), 3.0, None))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class ProductPrecisions(TorchDispatchMode):
    """Notes the float32 precision that is set whenever a matrix product is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"mm", "addmm", "addmm_", "bmm", "baddbmm"}:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [1, 3])
def test_every_product_of_the_lists_is_in_full_precision_whatever_is_set_outside(order: int, way: str) -> None:
    maps = {name: head.float() for name, head in heads(order).items()} if order > 1 else None
    v, w, s, *_ = leaves(unit_pairs(6).float(), 3.0, maps)
    tables = None if maps is None else {"image": maps["image"](v), "text": maps["text"](w)}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ProductPrecisions() as seen:
            list_loss(Pairs.alone(v, w, s), ListSettings(transition_depth=3), BOTH, tables)
    finally:
        torch.set_float32_matmul_precision(before)
    # Cosines and gradients; an in-modal matrix of 6 rows is made in two blocks.
    assert len(seen.seen) >= {"whole": 1 + 2 * 2 + 4, "chunked": 4 + 8}[way]
    assert set(seen.seen) == {"highest"}


def test_larger_lists_equal_the_plain_form() -> None:
    from pipeline.losses.transitions import transition_scores

    n, depth = 150, 8
    v, w = unit_pairs(n, 12, seed=4)
    maps = heads(3, 12, beta=0.3)
    s = torch.tensor(30.0, dtype=torch.float64)
    found = list_loss(
        Pairs.alone(v, w, s),
        ListSettings(transition_depth=depth, positions="uniform"),
        {"cross": 1.0},
        {"image": maps["image"](v), "text": maps["text"](w)},
        cells=5000,
    ).loss
    expected = 0.0
    for name, utilities, candidates in (("text", v @ w.T, w), ("image", w @ v.T, v)):
        ranking = utilities.T.argsort(dim=1, descending=True, stable=True)
        added = transition_scores(maps[name](candidates), ranking[:, :depth], s)
        expected = expected + plackett_luce_nll(s * utilities, ranking, added).mean() / n
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
