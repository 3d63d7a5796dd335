"""CyCLIP, ALIP and SimCLR against loops over their published formulas (published.py), in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import published
import pytest
import torch
from loss_inputs import unit_pairs
from torch import Tensor

from pipeline.losses.contrastive import AdaptiveWeights, alip, cyclic, info_nce, simclr
from pipeline.losses.pairs import Pairs

TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}
SHAPES = [(1, 3), (2, 4), (9, 5), (24, 64)]


def scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def captions_for(texts: Tensor, *, noise: float = 1.0, seed: int = 5) -> Tensor:
    """(n, d) unit rows that share something with the texts."""
    moved = texts + noise * torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed), dtype=texts.dtype)
    return torch.nn.functional.normalize(moved, dim=-1)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("s", [1.0, 100.0])
def test_cyclic_terms_are_cyclips(n: int, d: int, s: float) -> None:
    v, w = unit_pairs(n, d)
    pairs = Pairs.alone(v, w, scale(s))
    found = [pairs.mean(values).item() for values in cyclic(pairs)]
    np.testing.assert_allclose(found, published.cyclip(v.numpy(), w.numpy(), s), rtol=1e-10, atol=1e-13)


def test_cyclic_gradients_are_those_of_the_published_expression_and_none_reaches_the_temperature() -> None:
    inputs, s = unit_pairs(8, 6).requires_grad_(), scale(20.0)
    pairs = Pairs.alone(*inputs, s)
    in_modal, cross_modal = (pairs.mean(values) for values in cyclic(pairs))
    (found,) = torch.autograd.grad(0.25 * in_modal + 0.25 * cross_modal, inputs)
    assert torch.autograd.grad(in_modal + cross_modal, s, allow_unused=True) == (None,)
    v, w = inputs
    logits, images, texts = s * v @ w.T, s * v @ v.T, s * w @ w.T
    both = (images - texts).square().mean() + (logits - logits.T).square().mean()
    expected, of_scale = torch.autograd.grad(0.25 * both / s**2 * 8, (inputs, s))
    torch.testing.assert_close(found, expected, **TIGHT)
    assert abs(of_scale.item()) < 1e-14  # as published it is 0 too, but for rounding


def test_cyclic_terms_vanish_where_the_modalities_agree_and_only_then() -> None:
    v, w = unit_pairs(6)
    same = cyclic(Pairs.alone(v, v.clone(), scale(5.0)))
    assert all(values.abs().max() < 1e-30 for values in same)
    turned, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    in_modal, cross_modal = cyclic(Pairs.alone(v, v @ turned, scale(5.0)))  # a rotation keeps all distances
    assert in_modal.max() < 1e-28 < 1e-3 < cross_modal.min()
    assert all(values.min() > 1e-3 for values in cyclic(Pairs.alone(v, w, scale(5.0))))


def test_a_process_rows_of_cyclic_are_the_rows_of_the_whole() -> None:
    v, w = unit_pairs(9)
    whole = cyclic(Pairs.alone(v, w, scale(5.0)))
    part = cyclic(Pairs(v[4:7], w[4:7], v, w, scale(5.0), first=4, share=2 / 9, sizes=(4, 3, 2)))
    for found, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(found, expected[4:7], **TIGHT)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_alip_over_several_steps_is_the_published_one(n: int, d: int) -> None:
    reference, tested = published.Alip(), AdaptiveWeights().double()
    below = 0
    for step in range(6):
        # Similar captions first, then ever less: some samples lie above the running mean, some below.
        v, w = unit_pairs(n, d, seed=step, noise=0.2)
        c = captions_for(w, noise=0.05 + 0.1 * step, seed=step)
        texts, captions = Pairs.alone(v, w, scale(20.0)), Pairs.alone(v, c, scale(20.0))
        weights = tested(texts, c, update=True)
        below += int((weights.sample < 1).sum())
        found = texts.mean(alip(texts, captions, weights)).item()
        assert found == pytest.approx(reference(v.numpy(), w.numpy(), c.numpy(), 20.0), rel=1e-11)
        for ours, theirs in (
            (tested.text_caption, reference.h_tc),
            (tested.image_text, reference.h_it),
            (tested.image_caption, reference.h_ic),
        ):
            assert ours.item() == pytest.approx(theirs, rel=1e-14)
    assert below > 0


def test_alip_weights_of_samples_on_both_sides_of_the_mean() -> None:
    tested, reference = AdaptiveWeights().double(), published.Alip()
    for buffer, value in zip(tested.buffers(), (0.6, 0.3, 0.2), strict=True):
        buffer.fill_(value)
    reference.h_tc, reference.h_it, reference.h_ic = 0.6, 0.3, 0.2
    v, w = unit_pairs(40, 8)
    c = captions_for(w, noise=0.4)
    found = tested(Pairs.alone(v, w, scale(20.0)), c, update=True)
    expected = np.array(reference.weights(v.numpy(), w.numpy(), c.numpy()))
    columns = torch.stack([found.sample, found.image_text, found.image_caption], 1)
    np.testing.assert_allclose(columns.numpy(), expected, rtol=1e-12)
    trusted = expected[:, 0] == 1
    assert 5 < trusted.sum() < 35
    assert (expected[trusted] == 1).all()
    assert (expected[~trusted, 1:] > 1).any()  # pair weights may exceed 1, sample weights may not


def test_alip_without_update_changes_nothing_and_weighs_by_the_means_so_far() -> None:
    tested = AdaptiveWeights().double()
    v, w = unit_pairs(6)
    c, pairs = captions_for(w), Pairs.alone(v, w, scale(20.0))
    tested(pairs, c, update=True)
    before = {name: value.clone() for name, value in tested.named_buffers()}
    found = tested(pairs, c, update=False)
    assert {name: value.item() for name, value in tested.named_buffers()} == {k: x.item() for k, x in before.items()}
    expected = (2 * ((w * c).sum(1) - before["text_caption"])).exp().clamp(max=1)
    torch.testing.assert_close(found.sample, expected, **TIGHT)


def test_alip_weights_carry_no_gradient_and_the_loss_is_their_product_with_info_nce() -> None:
    rows = unit_pairs(7).requires_grad_()
    captions = captions_for(rows[1].detach()).requires_grad_()
    s = scale(10.0)
    texts, pairs = Pairs.alone(*rows, s), Pairs.alone(rows[0], captions, s)
    weights = AdaptiveWeights().double()(texts, captions, update=True)
    assert not any(value.requires_grad for value in vars(weights).values())
    found = torch.autograd.grad(alip(texts, pairs, weights).sum(), (rows, captions, s))
    fixed = [value.clone() for value in vars(weights).values()]
    product = (fixed[0] * fixed[1] * info_nce(texts) + fixed[0] * fixed[2] * info_nce(pairs)).sum()
    for ours, theirs in zip(found, torch.autograd.grad(product, (rows, captions, s)), strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.sample = weights.image_text  # type: ignore[misc]


def test_alip_means_are_saved_with_the_module_and_stay_float32_beside_bfloat16_embeddings() -> None:
    tested = AdaptiveWeights()
    assert {name: x.dtype for name, x in tested.state_dict().items()} == dict.fromkeys(
        ("text_caption", "image_text", "image_caption"), torch.float32
    )
    v, w = unit_pairs(6).bfloat16()
    weights = tested(Pairs.alone(v, w, scale(5.0).float()), v, update=True)
    assert weights.sample.dtype == tested.text_caption.dtype == torch.float32
    again = AdaptiveWeights()
    again.load_state_dict(tested.state_dict())
    assert again.image_text.item() == tested.image_text.item() != 1.0


def test_alip_means_of_a_long_run_settle_at_the_mean_similarity() -> None:
    tested = AdaptiveWeights()
    v, w = unit_pairs(50, 8)
    pairs = Pairs.alone(v, w, scale(5.0))
    for _ in range(800):
        tested(pairs, v, update=True)
    start = 0.99**800
    for mean, similarity in ((tested.image_text, (v * w).sum(1).mean().item()), (tested.image_caption, 1.0)):
        assert mean.item() == pytest.approx(start + (1 - start) * similarity, abs=1e-5)


def views(n: int, e: int, *, seed: int = 0, size: float = 3.0) -> Tensor:
    """(2, n, e): embeddings of two views, not of unit length."""
    return size * unit_pairs(n, e, seed=seed) * torch.linspace(0.5, 2.0, n, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(("n", "e"), [*SHAPES, (32, 256)])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_is_the_mean_over_both_views_of_every_image(n: int, e: int, temperature: float) -> None:
    a, b = views(n, e)
    found = simclr(a, b, temperature=temperature)
    assert found.shape == (n,)
    assert found.mean().item() == pytest.approx(published.simclr(a.numpy(), b.numpy(), temperature), rel=1e-11)


def test_simclr_gradients() -> None:
    inputs = views(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: simclr(x[0], x[1], temperature=0.3), inputs)


def test_simclr_of_one_image_alone_has_nothing_to_tell_apart() -> None:
    a, b = views(1, 4).requires_grad_()
    loss = simclr(a, b)
    assert loss.item() == 0.0
    assert torch.isfinite(torch.autograd.grad(loss.sum(), a)[0]).all()


def test_simclr_of_equal_views_that_are_orthogonal_to_the_rest() -> None:
    a = torch.eye(6, dtype=torch.float64)
    # One candidate at exp(1/τ), and 2 · 5 at exp(0); what is left of 10 − 10 has lost five digits.
    expected = torch.full((6,), math.log1p(10 * math.exp(-10)), dtype=torch.float64)
    torch.testing.assert_close(simclr(a, 7 * a), expected, rtol=1e-7, atol=0)


def test_simclr_does_not_run_in_bfloat16() -> None:
    a, b = views(16, 32)
    expected = simclr(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = simclr(a.float(), b.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    rounded = simclr(a.bfloat16(), b.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(
        rounded, simclr(a.bfloat16().double(), b.bfloat16().double()).float(), rtol=1e-5, atol=1e-6
    )
