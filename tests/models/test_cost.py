from __future__ import annotations

import torch
from tiny_models import build

from pipeline.models.cost import flops_per_sample, forward_flops


def text_tower_flops() -> int:
    """One text of 16 positions through 2 layers of width 32, and the projection to 32: by hand."""
    layer = 16 * 32 * (4 * 32 + 2 * 4 * 32) + 2 * 16 * 16 * 32  # projections and MLP, then scores and values
    return 2 * (2 * layer + 32 * 32)


def test_text_tower_cost_agrees_with_a_hand_count() -> None:
    model = build("vit", student=False)
    patches = 2 * (4 * 4) * (3 * 16 * 16) * 32
    layer = 17 * 32 * (4 * 32 + 2 * 4 * 32) + 2 * 17 * 17 * 32
    image = patches + 2 * (2 * layer + 32 * 32)
    assert forward_flops(model)["trunk"] == text_tower_flops() + image


def test_parts_sum_to_the_total_and_training_is_three_forward_passes() -> None:
    model = build()
    counts = forward_flops(model)
    assert counts["trunk"] + counts["student"] + counts["fusion"] == counts["total"]
    assert min(counts.values()) > 0
    assert flops_per_sample(model) == 3 * counts["total"]
    bare = forward_flops(build(student=False))
    assert (bare["student"], bare["fusion"], bare["trunk"]) == (0, 0, counts["trunk"])


def test_parts_shrink_where_a_part_is_taken_away() -> None:
    full = forward_flops(build())
    image_only = forward_flops(build(text_side=False))
    assert image_only["student"] < full["student"]
    assert image_only["fusion"] < full["fusion"]
    assert forward_flops(build(gate=False))["student"] == full["student"]
    assert forward_flops(build(gate=False))["fusion"] < full["fusion"]


def test_counting_leaves_the_model_as_it_was() -> None:
    model = build().train()
    model.trunk.clip.visual.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flops_per_sample(model)
    assert model.training
    assert not model.trunk.clip.visual.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_on_another_device_than_the_model_is_counted_all_the_same() -> None:
    model = build(student=False)
    head = torch.nn.Linear(model.trunk.pooled_width, 16)
    expected = flops_per_sample(model, simclr=head)
    assert flops_per_sample(model, simclr=head.to("meta")) == expected
