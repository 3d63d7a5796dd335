"""KD, CRD and the projected text target: values, starts and units against independent computations."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_distillation import numpy_rkd
from tiny_model import TEACHER, batch, measured, objective

from pipeline.errors import PipeError
from pipeline.losses.distillation import crd_loss, kd_loss
from pipeline.losses.feature_heads import ContrastHeads, TokenHead
from pipeline.losses.measured import ROWS, measure
from pipeline.models.projection import TextProjection

ALONE = {"gram": 0.0, "rkd": 0.0, "global_": 0.0, "gate_l1": 0.0, "conflict": 0.0}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_kd_is_one_minus_the_mean_cosine_of_tokens() -> None:
    x, y = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    expected = [np.mean([1 - cosine(x[i, t].numpy(), y[i, t].numpy()) for t in range(4)]) for i in range(3)]
    np.testing.assert_allclose(kd_loss(x, y).numpy(), expected, rtol=1e-12)


def test_crd_is_the_mean_of_two_softmaxes_over_the_batch() -> None:
    a, b = (torch.nn.functional.normalize(normal(5, 3, seed=s), dim=1) for s in (3, 4))
    logits = a.numpy() @ b.numpy().T / 0.2
    expected = []
    for i in range(5):
        row, column = np.log(np.exp(logits[i]).sum()), np.log(np.exp(logits[:, i]).sum())
        expected.append((row + column) / 2 - logits[i, i])
    np.testing.assert_allclose(crd_loss(a, b, temperature=0.2).numpy(), expected, rtol=1e-12)


def test_a_student_that_is_alike_for_every_image_scores_log_n_in_crd() -> None:
    a = torch.nn.functional.normalize(torch.ones(7, 3), dim=1)
    assert float(crd_loss(a, a, temperature=0.07).mean()) == pytest.approx(math.log(7), rel=1e-6)
    assert crd_loss(a[:1], a[:1], temperature=0.07).tolist() == [0.0]


def test_a_token_head_starts_as_the_predictor_that_ignores_the_image() -> None:
    means = normal(4, 5).float()
    head = TokenHead(6, means)
    assert torch.equal(head(normal(3, 4, 6, seed=5).float()), means.expand(3, -1, -1))


def test_contrast_heads_start_with_the_mean_vector_at_the_origin() -> None:
    mean = torch.nn.functional.normalize(normal(9), dim=0)
    heads = ContrastHeads(6, mean.float(), 4)
    with torch.no_grad():
        assert float(heads.teacher(mean.float()).norm()) < 1e-6
        heads = heads.double()
        near = mean + 1e-3 * normal(2, 9, seed=6)  # two vectors that are nearly alike
        _, theirs = heads(normal(2, 6, seed=7), near)
    assert float(theirs[0] @ theirs[1]) < 0.9
    torch.testing.assert_close(theirs.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_kd_and_crd_are_added_in_their_units() -> None:
    tested = objective(0, **(ALONE | {"kd": 0.7, "crd": 1.3, "crd_temperature": 0.3}))
    images, tokens, stored = batch(6)
    with torch.no_grad():
        tested.heads.kd["fine"].linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    loss, logs = tested(images, tokens, stored, 1.0)
    out = tested.model(images, tokens)
    fine = stored["fine"].double() * torch.tensor([0.01, 0.02, 0.03])
    predicted = tested.heads.kd["fine"](out.student_features["fine"])
    assert float(logs["kd/fine"]) == pytest.approx(float(kd_loss(predicted, fine).mean().detach()) / 0.4, rel=1e-6)
    ratios = []
    for side, pooled in (("image", out.image_pooled), ("text", out.text_pooled)):
        heads = tested.heads.crd[side]
        vector = stored["global"].double()
        b = heads.teacher(vector / vector.norm(dim=1, keepdim=True))
        a = heads.student(pooled)
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        ratios.append(float(crd_loss(a, b, temperature=0.3).mean().detach()) / math.log(6))
        assert float(logs[f"crd/{side}"]) == pytest.approx(ratios[-1], rel=1e-6)
    expected = float(logs["info_nce"]) + 0.7 * float(logs["kd/fine"]) + 1.3 * sum(ratios) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weights", [{"kd": 1.0}, {"crd": 1.0}, {"kd": 1.0, "crd": 1.0, "gram": 0.0, "rkd": 0.0}])
def test_every_head_takes_part_in_every_step(weights: dict[str, float]) -> None:
    tested = objective(0, **weights)
    tested(*batch(5), 0.0)[0].backward()
    assert [name for name, p in tested.named_parameters() if p.grad is None] == []
    reached = [name for name, p in tested.named_parameters() if name.startswith("heads.") and p.grad.abs().max() > 0]
    assert reached == [name for name, _ in tested.named_parameters() if name.startswith("heads.")]


def test_at_their_defaults_the_options_add_nothing() -> None:
    """Neither parameters nor random numbers nor terms: a run is today's to the bit."""
    plain, aware = objective(3), objective(3, measured=measured())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in aware.named_parameters()]
    assert not any("heads" in name for name, _ in plain.named_parameters())
    assert torch.equal(plain(*batch(6), 0.5)[0], aware(*batch(6), 0.5)[0])


def test_the_text_branch_alone_is_asked_for_the_projected_vector() -> None:
    projection = TextProjection(TEACHER, TEACHER)
    projection.weight.copy_(normal(TEACHER, TEACHER, seed=8))
    projection.bias.copy_(normal(TEACHER, seed=9))
    told = measured(projection=projection, text_global=0.25, text_rkd=0.2)
    images, tokens, stored = batch(6)
    tested = objective(0, measured=told)
    _, logs = tested(images, tokens, stored, 1.0)
    _, plain = objective(0)(images, tokens, stored, 1.0)
    out = tested.model(images, tokens)
    vector = stored["global"].double().numpy()
    target = vector @ projection.weight.double().numpy().T + projection.bias.double().numpy()
    text = out.text_global.detach().numpy()
    expected = np.mean([1 - cosine(text[i], target[i]) for i in range(6)]) / 0.25
    assert float(logs["global/text"]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logs["global/image"], plain["global/image"])
    # ρ² = 8 is in the student's distances; an independent residual stands in test_distillation.
    pooled, own = out.text_pooled.detach().numpy(), np.eye(6)
    squared = np.mean([np.sum((pooled[i] - pooled[j]) ** 2) for i in range(6) for j in range(6) if i != j])
    rows = np.concatenate([pooled, own * np.sqrt(8.0 * squared / 2)], axis=1)
    relational = numpy_rkd(rows, target / np.linalg.norm(target, axis=1, keepdims=True)) / 0.2
    assert float(logs["rkd/global"]) == pytest.approx(relational, rel=1e-5)


def cache(rows: int, *, ok: int | None = None) -> Any:
    """A cache of random targets around a common mean, with every fifth row held out."""
    generator = np.random.default_rng(3)
    fine = (1 + generator.normal(size=(rows, 4, 3))).astype(np.float32)
    vectors = (1 + generator.normal(size=(rows, TEACHER))).astype(np.float32)
    numbers = np.arange(rows)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    return SimpleNamespace(
        path="teacher.zarr",
        scales=[SimpleNamespace(name="fine")],
        baselines={"global_mean": mean},
        calibration_rows=numbers[numbers % 5 > 0],
        heldout_rows=numbers[numbers % 5 == 0],
        state=lambda: (numbers < (rows if ok is None else ok)).astype(np.uint8),
        read=lambda wanted: {"fine": fine[wanted], "global": vectors[wanted]},
        fine=fine,
        vectors=vectors,
    )


def test_units_are_measured_on_rows_that_the_predictor_has_not_seen() -> None:
    given = cache(150)
    projection = TextProjection(TEACHER, 2)
    projection.weight.copy_(normal(2, TEACHER, seed=10))
    projection.bias.fill_(0.5)
    found = measure(given, kd=True, projection=projection)
    fit, held_out = given.calibration_rows, given.heldout_rows
    unit = given.fine.astype(np.float64) / np.linalg.norm(given.fine, axis=-1, keepdims=True)
    means = unit[fit].mean(0)
    expected = np.mean([1 - cosine(means[t], given.fine[i, t]) for i in held_out for t in range(4)])
    assert found.kd["fine"] == pytest.approx(expected, rel=1e-6)
    head = TokenHead(6, found.token_means["fine"])
    targets = torch.from_numpy(given.fine[held_out])
    start = kd_loss(head(torch.zeros(len(held_out), 4, 6)), targets).mean()
    assert float(start.detach()) / found.units()["kd/fine"] == pytest.approx(1.0, rel=1e-5)
    y = given.vectors.astype(np.float64) @ projection.weight.double().numpy().T + 0.5
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    mean = y[fit].mean(0)
    np.testing.assert_allclose(found.text_mean.numpy(), mean, rtol=1e-5)
    assert found.units()["global/text"] == pytest.approx(np.mean([1 - cosine(mean, y[i]) for i in held_out]), rel=1e-6)
    assert found.units()["rkd/global"] == pytest.approx(numpy_rkd(np.eye(len(held_out)), y[held_out]), rel=1e-9)
    assert "rkd/global" not in measure(given, kd=True, projection=None).units()


def test_what_is_not_extracted_is_not_read_and_too_little_is_refused() -> None:
    seen: list[int] = []
    given = cache(150, ok=60)
    read = given.read
    given.read = lambda wanted: seen.extend(wanted.tolist()) or read(wanted)
    measure(given, kd=True, projection=None)
    assert max(seen) < 60
    assert len(seen) == 60
    with pytest.raises(PipeError, match="to its end"):
        measure(cache(150, ok=5), kd=True, projection=None)
    assert measure(cache(150, ok=0), kd=False, projection=None).units() == {}  # nothing is read for CRD alone


def test_no_more_than_a_thousand_rows_of_a_kind_are_read() -> None:
    counted: list[int] = []
    given = cache(20 * ROWS)
    read = given.read
    given.read = lambda wanted: counted.append(len(wanted)) or read(wanted)
    measure(given, kd=True, projection=None)
    assert sum(counted) == 2 * ROWS


def test_kd_without_what_is_measured_is_refused() -> None:
    with pytest.raises(PipeError, match="measured of the cache"):
        objective(0, kd=1.0, measured=None)
