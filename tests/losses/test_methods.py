"""`--method NAME` minimises what its publication defines: the preset's file, through the objective, against it."""

from __future__ import annotations

import published_objectives as published
import pytest
import torch
from tiny_model import TinyModel, batch, extras

from pipeline.config import load_config
from pipeline.losses.objective import Objective
from pipeline.losses.weights import LossWeights

PAIRS, EPOCHS = 7, 64


def objective(method: str, **changes: object) -> Objective:
    """What `pipe train --method` would build, around a tiny model."""
    config = load_config(None, flags={"train.method": method})
    values = config.loss.model_dump() | changes
    for key in ("transition_dim", "text_target", "text_projection"):
        values.pop(key)
    return Objective(
        TinyModel(student=config.model.parts.student),  # type: ignore[arg-type]
        order=config.train.order,
        transition_depth=config.train.transition_depth,
        transition_dim=4,
        weights=LossWeights(**values),
        targets=None,
    ).double()


def check(tested: Objective, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """Value and the gradient of every parameter."""
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    parameters = list(tested.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for (name, parameter), ours, other in zip(tested.named_parameters(), found, theirs, strict=True):
        torch.testing.assert_close(
            ours, torch.zeros_like(parameter) if other is None else other, rtol=1e-6, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("method", ["clip", "cyclip"])
def test_clip_and_cyclip(method: str) -> None:
    tested, (images, tokens, _) = objective(method), batch(PAIRS)
    loss, _ = tested(images, tokens, None, 0.4)
    out = tested.model(images, tokens)
    check(tested, loss, getattr(published, method)(out.v, out.w, out.logit_scale))


@pytest.mark.parametrize("epoch", [1, 10, 43, 44, 64])
def test_rankclip_over_its_schedule(epoch: int) -> None:
    tested, (images, tokens, _) = objective("rankclip", ramp=2 / 3), batch(PAIRS)
    loss, _ = tested(images, tokens, None, (epoch - 1) / (EPOCHS - 1))
    out = tested.model(images, tokens)
    check(tested, loss, published.rankclip(out.v, out.w, out.logit_scale, epoch=epoch, epochs=EPOCHS))


def test_the_presets_ramp_is_two_thirds_to_a_thousandth() -> None:
    assert abs(objective("rankclip").loss_weights.ramp - 2 / 3) < 1e-3


def test_alip_over_several_steps() -> None:
    tested, means = objective("alip"), {"text_caption": 1.0, "image_text": 1.0, "image_caption": 1.0}
    for seed in range(4):
        images, tokens, _ = batch(PAIRS, seed=seed)
        second = extras(PAIRS, seed=9 + seed)["second_tokens"]
        loss, _ = tested(images, tokens, None, 0.4, second)
        out, c = tested.model(images, tokens), tested.model.encode_text(second)
        check(tested, loss, published.alip(out.v, out.w, c, out.logit_scale, means))
    assert {name: float(value) for name, value in tested.adaptive.named_buffers()} == pytest.approx(means, rel=1e-9)


def test_slip() -> None:
    tested, (images, tokens, _) = objective("slip", simclr_hidden=6, simclr_dim=3), batch(PAIRS)
    augmented = extras(PAIRS)["augmented"]
    loss, _ = tested(images, tokens, None, 0.4, None, augmented)
    out = tested.model(images, tokens)
    views = [tested.simclr(tested.model.trunk.pooled(view)) for view in augmented.unbind(1)]
    check(tested, loss, published.slip(out.v, out.w, out.logit_scale, *views))
