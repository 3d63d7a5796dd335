from __future__ import annotations

import math

import pytest
import torch
from brute_force import ranking_loss
from scipy.stats import kendalltau
from tiny_model import TinyModel, batch, extras, info, objective

from pipeline.errors import PipeError
from pipeline.losses.agreement import kendall_tau, order_agreement
from pipeline.losses.contrastive import info_nce, simclr
from pipeline.losses.distillation import global_loss, gram_loss, rkd_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.weights import LossWeights, ramp

ONLY_LISTS = {"gram": 0.0, "rkd": 0.0, "global_": 0.0, "gate_l1": 0.0, "conflict": 0.0}


def test_cosine_ramp_rises_from_zero_to_its_weight_over_its_share() -> None:
    found = [ramp(t, 0.5, "cosine") for t in (0.0, 0.125, 0.25, 0.5, 0.9, 1.0)]
    expected = [0.0, 0.5 * (1 - math.cos(math.pi / 4)), 0.5, 1.0, 1.0, 1.0]
    assert found == pytest.approx(expected)


def test_linear_ramp_is_the_published_schedule() -> None:
    # w(e) = clamp(3 (e − 1) / (E − 1), 0, 2) over 64 epochs, then / 32
    tested = objective(1, student=False, cross=0.0625, in_modal=0.0625, ramp=2 / 3, ramp_shape="linear")
    for epoch in (1, 10, 43, 44, 64):
        published = min(max(3 * (epoch - 1) / 63, 0), 2) / 32
        found = tested.loss_weights.ranking((epoch - 1) / 63)
        assert found == pytest.approx({"cross": published, "in_modal": published})


def test_no_ramp_is_full_weight_from_the_start() -> None:
    assert ramp(0.0, 0.0, "cosine") == ramp(0.0, 0.0, "linear") == 1.0


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_loss_is_the_sum_of_its_weighted_terms(order: int, progress: float) -> None:
    weights = {"gram": 0.3, "rkd": 0.7, "global_": 1.1, "gate_l1": 0.2, "conflict": 2.0, "cross": 0.4, "in_modal": 0.9}
    tested = objective(order, **weights)
    images, tokens, stored = batch(6)
    loss, logs = tested(images, tokens, stored, progress)
    out = tested.model(images, tokens)
    pairs = Pairs.alone(out.v, out.w, out.logit_scale)
    fine = stored["fine"].float() * torch.tensor([0.01, 0.02, 0.03])
    vector = stored["global"].float()
    student = out.student_tokens["fine"]
    unit = torch.nn.functional.normalize(vector, dim=1)
    gram = gram_loss(student, fine).mean() / 0.2
    plus = {name: value.exp() for name, value in tested.residuals.items()}
    of_fine = rkd_loss(student.mean(1), fine.mean(1), residual=plus["fine"]).mean() / 0.1
    rkd = (of_fine + rkd_loss(out.text_pooled, unit, residual=plus["global"]).mean() / 0.3) / 2
    of_global = (global_loss(out.image_global, vector) + global_loss(out.text_global, vector)).mean() / 2 / 0.5
    expected = info_nce(pairs).mean() + 0.3 * gram + 0.7 * rkd + 1.1 * of_global
    opened = (0.3 * out.image.gate.mean() + 0.2 * out.text.gate.mean()) / 2  # |γ| of each side times its gate
    expected = expected + 0.2 * opened + 2.0 * logs["conflict"]
    if order:
        maps = dict(tested.transitions.items()) or None
        for group, weight in tested.loss_weights.ranking(progress).items():
            of_group = ranking_loss(out.v, out.w, out.logit_scale, maps, group=group, transition_depth=3)
            assert float(logs[group]) == pytest.approx(float(of_group.detach()), rel=1e-6)
            expected = expected + weight * of_group
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert float(logs["gram/fine"]) == pytest.approx(float(gram.detach()), rel=1e-6)
    assert ("cross" in logs) == (order > 0)


def test_gradients_are_those_of_the_weighted_sum() -> None:
    """Of the lists above all: candidates' embeddings carry gradient into the transitions."""
    weights = ONLY_LISTS | {"cross": 0.4, "in_modal": 0.9}
    tested, images, tokens = objective(3, **weights), *batch(6)[:2]
    loss, _ = tested(images, tokens, batch(6)[2], 1.0)
    out = tested.model(images, tokens)
    maps = dict(tested.transitions.items())
    expected = info_nce(Pairs.alone(out.v, out.w, out.logit_scale)).mean()
    for group, weight in (("cross", 0.4), ("in_modal", 0.9)):
        of_group = ranking_loss(out.v, out.w, out.logit_scale, maps, group=group, transition_depth=3)
        expected = expected + weight * of_group
    names, parameters = zip(*tested.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, ours, theirs in zip(
        names, found, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, msg=name)


def test_baselines_terms_stand_beside_the_contrastive_loss() -> None:
    images, tokens, _ = batch(6)
    more = extras(6)
    tested = objective(0, student=False, cyclic_in_modal=0.25, cyclic_cross=0.5, simclr=2.0, simclr_hidden=5)
    loss, logs = tested(images, tokens, None, 1.0, **more)
    out = tested.model(images, tokens)
    v, w, s = out.v.detach(), out.w.detach(), out.logit_scale.detach()
    logits = s * v @ w.T
    in_modal = ((s * v @ v.T - s * w @ w.T) ** 2).mean() / s**2 * 6  # as CyCLIP's code has it
    cross = ((logits - logits.T) ** 2).mean() / s**2 * 6
    assert float(logs["cyclic/in_modal"]) == pytest.approx(float(in_modal), rel=1e-9)
    assert float(logs["cyclic/cross"]) == pytest.approx(float(cross), rel=1e-9)
    projected = [tested.simclr(tested.model.trunk.pooled(view)) for view in more["augmented"].unbind(1)]
    of_views = simclr(*projected, temperature=0.1).mean()
    assert float(logs["simclr"]) == pytest.approx(float(of_views.detach()), rel=1e-9)
    expected = info_nce(Pairs.alone(v, w, s)).mean() + 0.25 * in_modal + 0.5 * cross + 2.0 * of_views
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_alip_replaces_infonce_by_its_weighted_pair_over_several_steps() -> None:
    """Against the published schedule: the averages move first, over the whole batch; validation leaves them alone."""
    images, tokens, _ = batch(6)
    second = extras(6)["second_tokens"]
    tested = objective(0, student=False, contrastive="alip")
    means = [1.0, 1.0, 1.0]
    for step in range(3):
        tested.train(step != 1)
        loss, logs = tested(images, tokens, None, 1.0, second)
        out, c = tested.model(images, tokens), tested.model.encode_text(second)
        similarities = [(out.w * c).sum(1), (out.v * out.w).sum(1), (out.v * c).sum(1)]
        if tested.training:
            means = [0.99 * h + 0.01 * float(x.detach().mean()) for h, x in zip(means, similarities, strict=True)]
        raw = [torch.exp(x.detach() - h) ** 2 for h, x in zip(means, similarities, strict=True)]
        low = raw[0] < 1
        weights = [torch.where(low, raw[0], 1.0), torch.where(low, raw[1], 1.0), torch.where(low, raw[2], 1.0)]
        of_texts = info_nce(Pairs.alone(out.v, out.w, out.logit_scale))
        of_captions = info_nce(Pairs.alone(out.v, c, out.logit_scale))
        expected = (weights[0] * weights[1] * of_texts).mean() + (weights[0] * weights[2] * of_captions).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        assert float(logs["info_nce"]) == pytest.approx(float(of_texts.mean().detach()))
        assert float(logs["alip/mean/image_text"]) == pytest.approx(means[1], rel=1e-6)


def test_a_batch_without_what_a_baseline_reads_is_refused() -> None:
    images, tokens, _ = batch(4)
    with pytest.raises(PipeError, match="pipe caption"):
        objective(0, student=False, contrastive="alip")(images, tokens, None, 1.0)
    with pytest.raises(PipeError, match="augmented views"):
        objective(0, student=False, simclr=1.0, simclr_hidden=5)(images, tokens, None, 1.0)


def test_conflict_is_taken_at_the_trunk_side_by_side() -> None:
    tested = objective(0, **(ONLY_LISTS | {"conflict": 2.0}))
    images, tokens, stored = batch(6)
    loss, logs = tested(images, tokens, stored, 1.0)
    out = tested.model(images, tokens)
    z, t = out.z.detach().requires_grad_(), out.t.detach().requires_grad_()
    trunk = info_nce(Pairs.alone(z, t, out.logit_scale.detach())).mean()
    expected = []
    for side, base, gradient in zip((out.image, out.text), (z, t), torch.autograd.grad(trunk, (z, t)), strict=True):
        tangent = gradient - (gradient * base).sum(1, keepdim=True) * base
        direction = tangent / tangent.norm(dim=1, keepdim=True)
        expected.append((side.gamma * (direction * side.gate * side.delta).sum(1)).relu().mean())
    assert min(expected) > 0
    assert float(logs["conflict"]) == pytest.approx(float(sum(expected).detach()) / 2, rel=1e-9)
    of_outputs = info_nce(Pairs.alone(out.v, out.w, out.logit_scale)).mean()
    assert float((loss - of_outputs).detach()) == pytest.approx(
        float(sum(expected).detach()), rel=1e-9
    )  # 2.0 · their mean


def test_each_group_of_lists_has_a_weight_of_its_own() -> None:
    assert LossWeights(cross=0.4, in_modal=0.9).ranking(1.0) == {"cross": 0.4, "in_modal": 0.9}
    assert LossWeights(cross=0.4, in_modal=0.0).ranking(1.0) == {"cross": 0.4}


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("weights", [{}, ONLY_LISTS, {"cross": 0.0, "in_modal": 0.0}], ids=["all", "lists", "no-lists"])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_every_parameter_takes_part_in_every_step(order: int, weights: dict[str, float], progress: float) -> None:
    tested = objective(order, **weights)
    images, tokens, stored = batch(5)
    loss, _ = tested(images, tokens, stored, progress)
    loss.backward()
    assert [name for name, p in tested.named_parameters() if p.grad is None] == []


def test_conflict_moves_gates_and_nothing_else() -> None:
    tested = objective(0, **(ONLY_LISTS | {"conflict": 1.0}))
    images, tokens, stored = batch(6)
    with_it, logs = tested(images, tokens, stored, 1.0)
    assert logs["conflict"] > 0
    tested_without = objective(0, **ONLY_LISTS)
    without, _ = tested_without(images, tokens, stored, 1.0)
    with_it.backward()
    without.backward()
    for (name, a), b in zip(tested.named_parameters(), tested_without.parameters(), strict=True):
        same = torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14)
        assert same != name.startswith("model.gates"), name


def test_order_zero_without_a_student_is_clip() -> None:
    tested = objective(0, student=False)
    images, tokens, _ = batch(7)
    loss, logs = tested(images, tokens, None, 1.0)
    out = tested.model(images, tokens)
    torch.testing.assert_close(loss, info_nce(Pairs.alone(out.v, out.w, out.logit_scale)).mean())
    assert not any(key.startswith(("cross", "beta", "gram", "gate", "conflict")) for key in logs)


def test_transition_heads_are_named_so_that_beta_gets_its_own_rate() -> None:
    from pipeline.training.schedule import is_gamma_or_beta

    names = [name for name, _ in objective(3).named_parameters()]
    quick = [name for name in names if is_gamma_or_beta(name)]
    assert quick == ["transitions.image.betas", "transitions.text.betas", "residuals.fine", "residuals.global"]
    assert all(name.startswith(("model.", "transitions.", "residuals.")) for name in names)


def test_distillation_without_targets_is_refused() -> None:
    images, tokens, _ = batch(4)
    with pytest.raises(PipeError, match="without teacher targets"):
        objective(0)(images, tokens, None, 0.5)
    objective(0, gram=0.0, rkd=0.0, global_=0.0)(images, tokens, None, 0.5)  # the control that does not distil


def test_logs_are_detached_scalars_with_the_agreed_names() -> None:
    tested = objective(3)
    tested.log_details = True
    _, logs = tested(*batch(6), 0.5)
    expected = {
        "info_nce", "cross", "in_modal", "cross/head_nll", "cross/tail_nll", "in_modal/head_nll", "gate_l1", "conflict",
        "logit_scale", "gamma/image", "gamma/text", "gate_mean/image", "gram/fine", "rkd/fine", "rkd/global",
        "global/image", "global/text", "beta/image/2", "beta/text/3", "kendall_tau",
    }  # fmt: skip
    assert expected <= set(logs)
    assert all(value.shape == () and not value.requires_grad for value in logs.values())
    tested.log_details = False
    assert "kendall_tau" not in tested(*batch(6), 0.5)[1]


def test_logs_do_not_follow_later_updates() -> None:
    tested = objective(2)
    _, logs = tested(*batch(5), 0.5)
    with torch.no_grad():
        tested.transitions["image"].betas.add_(1.0)
        tested.model.gamma["image"].add_(1.0)
    assert float(logs["beta/image/2"]) == pytest.approx(0.5)
    assert float(logs["gamma/image"]) == pytest.approx(0.3)


def test_evaluation_mode_gives_the_same_loss_without_a_graph() -> None:
    tested = objective(3)
    trained, _ = tested(*batch(6), 1.0)
    tested.eval()
    with torch.no_grad():
        loss, logs = tested(*batch(6), 1.0)
    torch.testing.assert_close(loss, trained.detach())
    assert not loss.requires_grad
    assert "kendall_tau" in logs


@pytest.mark.parametrize("order", [1, 3])
def test_bfloat16_outputs_give_finite_float32_losses_and_gradients(order: int) -> None:
    class Halved(TinyModel):
        def forward(self, images: torch.Tensor, tokens: torch.Tensor):
            out = super().forward(images, tokens)
            for name in ("z", "t", "v", "w", "image_global", "text_global", "text_pooled"):
                setattr(out, name, getattr(out, name).bfloat16())
            out.student_tokens = {k: x.bfloat16() for k, x in out.student_tokens.items()}
            return out

    tested = objective(order).float()
    tested.model = Halved().float()
    with torch.no_grad():
        tested.model.log_scale.fill_(math.log(100.0))
    images, tokens, stored = batch(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = tested(images, tokens, stored, 1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in tested.parameters())


def test_a_lone_pair_and_two_pairs_stay_finite() -> None:
    for n in (1, 2):
        loss, logs = objective(3)(*batch(n), 1.0)
        assert loss.isfinite()
        assert all(value.isfinite() for value in logs.values())


def test_weights_mirror_the_configuration() -> None:
    from dataclasses import fields

    from pipeline.config_schema import LossConfig

    of_config = set(LossConfig.model_fields) - {"transition_dim", "text_target", "text_projection"}
    assert {field.name for field in fields(LossWeights)} == of_config
    for name in of_config:
        assert getattr(LossWeights(), name) == getattr(LossConfig(), name)


def test_kendall_tau_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)
    expected = sum(kendalltau(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)) / 3
    assert float(kendall_tau(x, y)) == pytest.approx(expected)
    assert float(kendall_tau(x, x)) == pytest.approx(1.0)
    assert float(kendall_tau(x, -x)) == pytest.approx(-1.0)


def test_order_agreement_weighs_rows_of_unequal_processes_alike_and_takes_none() -> None:
    from loss_inputs import unit_pairs

    v, w = unit_pairs(7)
    whole = order_agreement(Pairs.alone(v, w, torch.tensor(1.0)))
    sizes, first, parts = (4, 0, 3), 0, []
    for size in sizes:
        own = slice(first, first + size)
        parts.append(order_agreement(Pairs(v[own], w[own], v, w, torch.tensor(1.0), first, 3 / 7, sizes)))
        first += size
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, value)


def test_order_agreement_leaves_the_item_itself_out() -> None:
    from loss_inputs import unit_pairs

    v, w = unit_pairs(10)
    found = order_agreement(Pairs.alone(v, w, torch.tensor(1.0)))
    expected = []
    for i in range(10):
        rest = [j for j in range(10) if j != i]
        expected.append(kendalltau((v[i] @ v[rest].T).numpy(), (w[i] @ w[rest].T).numpy()).statistic)
    assert float(found["kendall_tau/in_modal"]) == pytest.approx(sum(expected) / 10)


def test_unknown_scale_baselines_fail_at_construction() -> None:
    whole = info()
    with pytest.raises(KeyError):
        type(whole)(("absent",), {}, whole.baselines).baseline("gram", "absent")
