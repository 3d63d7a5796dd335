"""Gradient norms to log: of each term, of each part; measuring them changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipeline.training.gradients import part_norms, term_norms

sys.path.insert(0, str(Path(__file__).parent.parent / "losses"))

CASES = {
    "order 3, all terms": {"order": 3, "conflict": 3.0, "cyclic_cross": 0.5, "simclr": 0.3, "simclr_hidden": 4},
    "clip": {"order": 0, "student": False},
}


def forward(tested):
    from tiny_model import batch, extras

    images, tokens, stored = batch(6)
    tested.keep_terms = True
    return tested(images, tokens, stored if tested.model.has_student else None, 1.0, **extras(6))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_terms_add_up_to_the_gradient_of_the_loss(case):
    from tiny_model import objective

    tested = objective(**CASES[case])
    loss, _ = forward(tested)
    parameters = list(tested.parameters())
    names = set(tested.terms)
    assert names >= (
        {"contrastive", "cross", "in_modal", "gram", "rkd", "global", "gate_l1", "conflict"}
        if "all" in case
        else {"contrastive"}
    )
    of_terms = [torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for t in tested.terms.values()]
    loss.backward()
    for parameter, *parts in zip(parameters, *of_terms, strict=True):
        total = sum((p for p in parts if p is not None), torch.zeros_like(parameter))
        torch.testing.assert_close(total, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_terms_norm_is_that_of_all_its_gradients_together(case):
    from tiny_model import objective

    tested = objective(**CASES[case])
    forward(tested)
    parameters = list(tested.parameters())
    found = term_norms(tested.terms, parameters)
    for name, term in tested.terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        assert float(found[name]) == pytest.approx(float(flat.norm()), rel=1e-9)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_validation_after_a_measured_step_keeps_nothing():
    from tiny_model import objective

    tested = objective(**CASES["order 3, all terms"])
    forward(tested)
    assert tested.terms
    forward(tested.eval())
    assert tested.terms == {}


def test_a_scaler_of_fp16_is_undone():
    from tiny_model import objective

    class Scaler:
        def get_scale(self):
            return 1024.0

    tested = objective(**CASES["clip"])
    forward(tested)
    parameters = list(tested.parameters())
    assert float(term_norms(tested.terms, parameters, Scaler())["contrastive"]) == pytest.approx(
        float(term_norms(tested.terms, parameters)["contrastive"]), rel=1e-9
    )


def test_parts_are_trunk_student_fusion_with_its_gate_and_what_trains_beside_the_model():
    def parameter(*values):
        found = torch.nn.Parameter(torch.zeros(len(values)))
        found.grad = torch.tensor(values)
        return found

    named = {
        "model.trunk.clip.a": parameter(3.0),
        "model.trunk.clip.b": parameter(0.0, 4.0),
        "model.student.image.x": parameter(2.0),
        "model.fusion.image.mix": parameter(6.0),
        "model.fusion.image.gate.mlp": parameter(8.0),
        "transitions.text.betas": parameter(1.0),
        "residuals.fine": torch.nn.Parameter(torch.zeros(1)),
    }
    expected = {"trunk": 5.0, "student": 2.0, "fusion": 10.0, "gate": 8.0, "transitions": 1.0}
    assert {key: float(value) for key, value in part_norms(named.items()).items()} == pytest.approx(expected)
