"""The learning-rate curve and the parameter groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pipeline.training.schedule import is_gamma_or_beta, learning_rate, parameter_groups


def test_learning_rate_rises_linearly_then_follows_half_a_cosine():
    rates = [learning_rate(k, total_steps=1000, warmup_steps=100, peak=2.0) for k in range(1000)]
    assert rates[:3] == pytest.approx([0.02, 0.04, 0.06])
    assert rates[99] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(2.0)
    assert rates[550] == pytest.approx(1.0)
    assert rates[775] == pytest.approx(1.0 + math.cos(0.75 * math.pi))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_warmup_takes_at_most_a_tenth_of_a_short_run():
    rates = [learning_rate(k, total_steps=50, warmup_steps=1500, peak=1.0) for k in range(50)]
    assert rates[4] == 1.0
    assert rates[0] == pytest.approx(0.2)


def test_cosine_equals_torch_scheduler_without_warmup():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for k in range(40):
        assert learning_rate(k, total_steps=40, warmup_steps=0, peak=0.3) == pytest.approx(
            optimizer.param_groups[0]["lr"]
        )
        optimizer.step()
        scheduler.step()


def test_gamma_of_the_injection_is_slow_but_a_layer_scale_called_gamma_is_not():
    assert is_gamma_or_beta("model.fusion.image.gamma")
    assert is_gamma_or_beta("transitions.image.betas")
    assert is_gamma_or_beta("residuals.fine")
    assert not is_gamma_or_beta("model.student.image.blocks.0.ls1.gamma")
    assert not is_gamma_or_beta("model.trunk.model.visual.ln.beta")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fusion = nn.ModuleDict({"image": nn.Module()})
        self.fusion["image"].gamma = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_every_trainable_parameter_is_in_exactly_one_group_with_the_right_decay():
    toy = Toy()
    groups = parameter_groups(toy.named_parameters(), weight_decay=0.1)
    where = {name: group for group in groups for name in group["names"]}
    assert sorted(where) == sorted(n for n, p in toy.named_parameters() if p.requires_grad)
    assert where["linear.weight"]["weight_decay"] == 0.1
    assert where["linear.bias"]["weight_decay"] == where["norm.weight"]["weight_decay"] == 0.0
    assert where["fusion.image.gamma"]["lr_scale"] == 10.0
    assert where["fusion.image.gamma"]["weight_decay"] == 0.0
    assert where["linear.weight"]["lr_scale"] == 1.0


def test_the_student_and_its_heads_may_learn_at_a_rate_of_their_own():
    module = nn.Module()
    module.model = nn.ModuleDict({"student": nn.ModuleDict({"image": nn.Linear(3, 2)}), "trunk": nn.Linear(3, 2)})
    module.heads = nn.Linear(2, 2)
    module.residuals = nn.ParameterDict({"fine": nn.Parameter(torch.zeros(()))})
    groups = parameter_groups(module.named_parameters(), weight_decay=0.1, student_scale=3.0)
    where = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert where == {
        "model.student.image.weight": (3.0, 0.1),
        "model.student.image.bias": (3.0, 0.0),
        "model.trunk.weight": (1.0, 0.1),
        "model.trunk.bias": (1.0, 0.0),
        "heads.weight": (3.0, 0.1),
        "heads.bias": (3.0, 0.0),
        "residuals.fine": (10.0, 0.0),
    }
    assert len(parameter_groups(module.named_parameters(), weight_decay=0.1)) == 3  # as it always was
