"""Gram losses of others than the student, in its unit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.losses.targets import TargetInfo, Targets
from pipeline.training.affinities import compare_affinities
from pipeline.training.data import Batch


class Student(nn.Module):
    grids: ClassVar = {"fine": 2}

    def forward(self, images):
        return images.flatten(2).transpose(1, 2)  # pixels as tokens

    def distilled(self, tokens):
        return {"fine": tokens + 1}


class Visual(nn.Module):
    """As a timm tower is read: one map."""

    trunk = SimpleNamespace(forward_features=lambda images: 2 * images - 1, num_features=3)


def batches(n=5):
    generator = torch.Generator().manual_seed(0)
    for start, own in ((0, 3), (3, 2)):
        rows = torch.arange(start, start + own)
        targets = {
            "fine": torch.randn(own, 4, 6, generator=generator).half(),
            "global": torch.ones(own, 2).half(),
        }
        yield Batch(0, 0, rows, torch.randn(own, 3, 2, 2, generator=generator), torch.zeros(own, 1).long(), targets, [])


def gram(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("at_once", [None, 2])
def test_both_are_mean_squared_differences_over_all_rows_in_units_of_the_baseline(monkeypatch, at_once):
    monkeypatch.setattr("pipeline.models.trunk_map.TimmModel", Visual)
    info = TargetInfo(("fine",), {"fine": None}, {"gram": {"fine": 0.25}, "rkd": {"fine": 1.0}, "global": 1.0})
    objective = nn.Module()
    objective.targets, objective.baselines = Targets(info), {"gram/fine": 0.25}
    objective.model = SimpleNamespace(trunk=SimpleNamespace(clip=SimpleNamespace(visual=Visual())))
    initial = nn.Module()
    initial.student = nn.ModuleDict({"image": Student()})
    found = compare_affinities(objective, initial, batches(), torch.device("cpu"), at_once=at_once)
    expected = {"gram_init/fine": [], "gram_trunk/fine": []}
    for batch in batches():
        for image, target in zip(batch.images.double().numpy(), batch.targets["fine"].double().numpy(), strict=True):
            tokens = image.reshape(3, 4).T
            for key, own in (("gram_init/fine", tokens + 1), ("gram_trunk/fine", 2 * tokens - 1)):
                expected[key].append(np.mean((gram(own) - gram(target)) ** 2) / 0.25)
    assert found == pytest.approx({key: np.mean(values) for key, values in expected.items()}, rel=1e-5)
    assert objective.training  # as it was


def test_a_run_that_does_not_distil_has_nothing_to_compare():
    objective = nn.Module()
    objective.targets = None
    assert compare_affinities(objective, None, [], torch.device("cpu")) == {}
