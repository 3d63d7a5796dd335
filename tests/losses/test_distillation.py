from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.cache.baselines import Baselines
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.losses.distillation import global_loss, gram_loss, rkd_loss
from pipeline.losses.targets import TargetInfo, Targets


def features(n: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, width, generator=generator) + torch.randn(n, tokens, width, generator=generator)


def numpy_gram(student: np.ndarray, teacher: np.ndarray) -> float:
    total = 0.0
    for x, y in zip(student, teacher, strict=True):
        for i in range(len(x)):
            for j in range(len(x)):
                a = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                b = y[i] @ y[j] / np.linalg.norm(y[i]) / np.linalg.norm(y[j])
                total += (a - b) ** 2 / len(x) ** 2 / len(student)
    return total


def numpy_rkd(student: np.ndarray, teacher: np.ndarray) -> float:
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]
    d = np.array([np.linalg.norm(student[i] - student[j]) for i, j in pairs])
    e = np.array([np.linalg.norm(teacher[i] - teacher[j]) for i, j in pairs])
    x = np.abs(d / d.mean() - e / e.mean())
    return float(np.where(x < 1, 0.5 * x**2, x - 0.5).mean())


def test_gram_loss_is_its_definition() -> None:
    student, teacher = features(3, 4, 6, 0), features(3, 4, 9, 1)
    expected = numpy_gram(student.double().numpy(), teacher.double().numpy())
    assert float(gram_loss(student, teacher).mean()) == pytest.approx(expected, rel=1e-5)


def test_rkd_loss_is_its_definition() -> None:
    student, teacher = features(1, 8, 6, 2)[0], features(1, 8, 3, 3)[0]
    teacher[0] *= 40  # far enough that the Huber loss is linear somewhere
    expected = numpy_rkd(student.double().numpy(), teacher.double().numpy())
    assert float(rkd_loss(student, teacher).mean()) == pytest.approx(expected, rel=1e-5)


def test_a_residual_is_a_coordinate_of_every_images_own() -> None:
    """‖p_i − p_j‖² + a² is the squared distance of rows [p_i, (a/√2) e_i], here built and measured one by one."""
    student, teacher = features(1, 8, 6, 2)[0].double(), features(1, 8, 3, 3)[0].double()
    rows = student.numpy()
    squared = [np.sum((rows[i] - rows[j]) ** 2) for i in range(8) for j in range(8) if i != j]
    own = np.eye(8) * np.sqrt(2.5 * np.mean(squared) / 2)
    expected = numpy_rkd(np.concatenate([rows, own], axis=1), teacher.numpy())
    found = rkd_loss(student, teacher, residual=torch.tensor(2.5, dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(expected, rel=1e-10)


def test_a_residual_of_zero_changes_nothing_and_a_large_one_makes_all_distances_equal() -> None:
    student, teacher = features(1, 12, 6, 2)[0], features(1, 12, 3, 3)[0]
    torch.testing.assert_close(rkd_loss(student, teacher, residual=torch.tensor(0.0)), rkd_loss(student, teacher))
    equal = rkd_loss(torch.eye(12), teacher)
    torch.testing.assert_close(rkd_loss(student, teacher, residual=torch.tensor(1e6)), equal, rtol=1e-4, atol=1e-6)


def test_the_residual_learns_to_shrink_when_the_student_knows_the_relations() -> None:
    teacher = features(1, 12, 3, 3)[0]
    log_residual = torch.tensor(2.0, requires_grad=True)
    rkd_loss(2 * teacher, teacher, residual=log_residual.exp()).mean().backward()
    assert log_residual.grad is not None
    assert float(log_residual.grad) > 0


def test_rkd_ignores_scale_and_origin_and_is_zero_for_the_teacher_itself() -> None:
    teacher = features(1, 12, 5, 4)[0]
    assert float(rkd_loss(3 * teacher + 100, teacher).mean()) == pytest.approx(0.0, abs=1e-6)


def test_rkd_keeps_its_digits_where_all_features_share_a_large_offset() -> None:
    student, teacher = features(1, 12, 6, 15)[0] + 300, features(1, 12, 5, 16)[0] - 1000
    expected = numpy_rkd(student.double().numpy(), teacher.double().numpy())
    assert float(rkd_loss(student, teacher).mean()) == pytest.approx(expected, rel=1e-5)


def test_rkd_gradient_is_the_one_of_plain_distances() -> None:
    student, teacher = features(1, 6, 4, 5)[0].double().requires_grad_(), features(1, 6, 4, 6)[0].double()
    (found,) = torch.autograd.grad(rkd_loss(student, teacher).mean(), student)
    off = ~torch.eye(6, dtype=torch.bool)

    def relative(x: torch.Tensor) -> torch.Tensor:
        d = torch.stack([(x[i] - x[j]).norm() for i in range(6) for j in range(6) if off[i, j]])
        return d / d.mean()

    plain = torch.nn.functional.smooth_l1_loss(relative(student), relative(teacher))
    torch.testing.assert_close(found, torch.autograd.grad(plain, student)[0], rtol=1e-8, atol=1e-12)


def test_equal_rows_and_lone_rows_stay_finite() -> None:
    student = torch.ones(4, 3, requires_grad=True)
    rkd_loss(student, features(1, 4, 3, 7)[0]).mean().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert rkd_loss(torch.ones(1, 3), torch.ones(1, 3)).tolist() == [0.0]
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    gram_loss(zero, features(2, 3, 4, 8)).mean().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_global_loss_is_one_minus_cosine() -> None:
    a, b = features(1, 5, 4, 9)[0], features(1, 5, 4, 10)[0]
    expected = [1 - (x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(global_loss(a, b).numpy(), expected, rtol=1e-5)


def test_a_predictor_that_ignores_the_image_scores_exactly_one_baseline() -> None:
    fit, held_out = features(60, 4, 9, 11), features(40, 4, 9, 11)[torch.randperm(40)]
    vectors = [features(1, n, 5, 12)[0] for n in (60, 40)]
    baselines = Baselines(["fine"])
    baselines.fit({"fine": fit.numpy(), "global": vectors[0].numpy()})
    baselines.score({"fine": held_out.numpy(), "global": vectors[1].numpy()})
    losses, arrays = baselines.losses(), baselines.arrays()
    # Tokens whose Gram matrix is the mean one, for every image.
    values, basis = np.linalg.eigh(arrays["fine_gram_mean"].astype(np.float64))
    tokens = torch.as_tensor(basis * np.sqrt(values.clip(0))).expand(40, -1, -1)
    assert float(gram_loss(tokens, held_out).mean()) / losses["gram"]["fine"] == pytest.approx(1.0, rel=1e-3)
    simplex = torch.eye(40)  # all distances equal
    assert float(rkd_loss(simplex, held_out.mean(1)).mean()) / losses["rkd"]["fine"] == pytest.approx(1.0, rel=1e-4)
    unit = torch.nn.functional.normalize(vectors[1], dim=1)
    assert float(rkd_loss(simplex, unit).mean()) / losses["rkd"]["global"] == pytest.approx(1.0, rel=1e-4)
    mean = torch.as_tensor(arrays["global_mean"]).expand(40, -1)
    assert float(global_loss(mean, vectors[1]).mean()) / losses["global"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("loss", [gram_loss, rkd_loss, global_loss])
def test_a_teacher_that_requires_grad_gets_none(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    student, teacher = features(4, 3, 5, 17), features(4, 3, 5, 18)
    if loss is not gram_loss:
        student, teacher = student[:, 0], teacher[:, 0]
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(student, teacher).mean().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_inputs_are_not_written_to_and_bfloat16_is_widened() -> None:
    student, teacher = features(4, 3, 5, 13).bfloat16(), features(4, 3, 5, 14)
    before = student.clone(), teacher.clone()
    values = [
        gram_loss(student, teacher),
        rkd_loss(student.mean(1), teacher.mean(1)),
        global_loss(student[:, 0], teacher[:, 0]),
    ]
    assert torch.equal(before[0], student)
    assert torch.equal(before[1], teacher)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in values)


BASELINES = {"gram": {"a": 0.1, "b": 0.1}, "rkd": {"a": 0.1, "b": 0.1, "global": 0.1}, "global": 0.5}


def test_stored_numbers_become_coefficients() -> None:
    targets = Targets(TargetInfo(("a", "b"), {"a": torch.tensor([0.5, 2.0]), "b": None}, BASELINES))
    stored = {
        "a": torch.tensor([[[2, -3]]], dtype=torch.int8),
        "b": torch.tensor([[[4, 5], [6, 7]]], dtype=torch.int8),
        "b_steps": torch.tensor([[0.1, 10.0]]),
        "global": torch.tensor([[1.5]], dtype=torch.float16),
    }
    found = targets(stored)
    torch.testing.assert_close(found["a"], torch.tensor([[[1.0, -6.0]]]))
    torch.testing.assert_close(found["b"], torch.tensor([[[0.4, 0.5], [60.0, 70.0]]]))
    assert found["global"].dtype == torch.float32
    half = stored | {"b": torch.tensor([[[0.25]]], dtype=torch.float16)}
    del half["b_steps"]
    assert targets(half)["b"].tolist() == [[[0.25]]]
    assert not targets.state_dict()  # a checkpoint does not carry what the cache holds


def test_targets_without_a_scale_or_its_steps_are_refused() -> None:
    targets = Targets(TargetInfo(("b",), {"b": None}, BASELINES))
    with pytest.raises(PipeError, match="no teacher targets for b"):
        targets({"global": torch.zeros(1, 2)})
    with pytest.raises(PipeError, match="without their steps"):
        targets({"b": torch.zeros(1, 1, 1, dtype=torch.int8), "global": torch.zeros(1, 2)})


def test_a_baseline_near_zero_is_replaced_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = TargetInfo(("a",), {"a": None}, {"gram": {"a": 0.0}, "rkd": {"a": 1.0}, "global": 0.25})
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert info.baseline("gram", "a") == 1e-4
    assert "gram baseline" in caplog.text
    assert info.baseline("global") == 0.25


def test_target_info_of_a_cache_keeps_its_names_steps_and_units() -> None:
    cache = SimpleNamespace(
        scales=(SimpleNamespace(name="a"), SimpleNamespace(name="b")),
        steps={"a": np.array([0.5, 2.0], np.float32), "b": None},
        baseline_losses=BASELINES,
    )
    info = TargetInfo.from_cache(cache)  # type: ignore[arg-type]
    assert info.scales == ("a", "b")
    assert info.steps["a"] is not None
    assert info.steps["a"].tolist() == [0.5, 2.0]
    assert info.steps["b"] is None
    assert info.baseline("rkd", "global") == 0.1
