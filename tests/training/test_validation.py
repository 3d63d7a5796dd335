"""Validation: recall against a brute force, and what the objective is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.training.data import Batch
from pipeline.training.validation import number_images, recall_at_1, validate, validation_steps

sys.path.insert(0, str(Path(__file__).parent.parent / "losses"))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_counts_rows_whose_partner_is_above_all_rivals() -> None:
    images, texts, numbers = unit(9, 4), unit(9, 4, seed=1), torch.tensor([0, 1, 2, 2, 3, 4, 4, 4, 5])
    scores = (images @ texts.T).double().numpy()
    hits = {"i2t_r1": 0, "t2i_r1": 0}
    for i in range(9):
        rivals = [j for j in range(9) if numbers[j] != numbers[i]]
        hits["i2t_r1"] += all(scores[i, i] > scores[i, j] for j in rivals)
        hits["t2i_r1"] += all(scores[i, i] > scores[j, i] for j in rivals)
    assert sum(hits.values()) > 0
    assert recall_at_1(images, texts, numbers) == pytest.approx({key: n / 9 for key, n in hits.items()})


def test_a_perfect_model_scores_one_where_rows_repeat_their_image() -> None:
    """A table of one row a caption; the collapsed model beside it scores nothing."""
    images = unit(10, 8).repeat_interleave(5, 0)
    texts = nn.functional.normalize(images + 0.01 * unit(50, 8, seed=1), dim=1)
    hashes = [f"{n:064x}" for n in range(10) for _ in range(5)]
    numbers = torch.tensor(list(number_images(np.arange(100, 150), hashes).values()))
    assert recall_at_1(images, texts, numbers) == {"i2t_r1": 1.0, "t2i_r1": 1.0}
    same = torch.ones(50, 8) / 8**0.5
    assert recall_at_1(same, same, numbers) == {"i2t_r1": 0.0, "t2i_r1": 0.0}


def test_images_are_numbered_by_content() -> None:
    assert number_images(np.array([7, 3, 9]), ["b", "a", "b"]) == {7: 0, 3: 1, 9: 0}


class Recorder(nn.Module):
    """Notes how it is called, in place of the objective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, bool]] = []

    def forward(self, images: Tensor, progress: float, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append((progress, self.training))
        return torch.tensor(0.0), {"loss": images.mean()}


def alike(images: Tensor, tokens: Tensor) -> SimpleNamespace:
    """In place of the model: every batch holds the same vectors, and nothing is injected."""
    return SimpleNamespace(v=unit(len(images), 4), w=unit(len(tokens), 4), image=None, text=None)


def read(rows: list[int], value: float) -> Batch:
    images = torch.full((len(rows), 3, 2, 2), value)
    return Batch(0, 0, torch.tensor(rows), images, torch.zeros(len(rows), 4, dtype=torch.int64), None, [])


@pytest.mark.parametrize("training", [True, False])
def test_the_objective_is_asked_at_full_weights_in_evaluation_mode_and_left_as_it_was(training: bool) -> None:
    objective = Recorder().train(training)
    model = alike
    found = validate(
        objective,
        model,  # type: ignore[arg-type]
        [read([4, 5], 1.0), read([6, 7], 2.0)],
        torch.device("cpu"),
        image_numbers={4: 0, 5: 1, 6: 2, 7: 3},
    )
    assert objective.calls == [(1.0, False)] * 2
    assert objective.training is training
    assert found["loss"] == pytest.approx(1.5)
    assert found["i2t_r1"] == 0.0  # both batches hold the same vectors: every partner ties with a rival


def test_a_batch_of_which_nothing_can_be_read_is_left_out() -> None:
    objective = Recorder()
    model = alike
    numbers = {4: 0, 5: 1}
    for batches, expected in (([read([], 0.0), read([4, 5], 1.0)], 1.0), ([read([], 0.0)], None)):
        found = validate(objective, model, batches, torch.device("cpu"), image_numbers=numbers)  # type: ignore[arg-type]
        assert found.get("loss") == expected


def test_every_process_reads_as_many_rows_of_every_batch() -> None:
    rows = np.arange(11)
    shares = [list(validation_steps(rows, batch_size=4, rank=r, world_size=2)) for r in range(2)]
    assert [len(step.rows) for share in shares for step in share] == [2] * 4
    assert sorted(int(row) for share in shares for step in share for row in step.rows) == list(range(8))


def test_drift_and_the_trunks_recall_agree_with_autograd_and_a_brute_force() -> None:
    """Two batches of an injecting model in float64, as one contrastive batch."""
    from tiny_model import batch, objective

    tested = objective(order=0)
    n, parts = 10, [batch(5, seed=seed) for seed in (0, 1)]
    batches = [Batch(0, 0, torch.arange(5) + 5 * k, *part) for k, part in enumerate(parts)]
    numbers = {row: row for row in range(n)}
    found = validate(tested, tested.model, batches, torch.device("cpu"), image_numbers=numbers)
    with torch.no_grad():
        outs = [tested.model(images, tokens) for images, tokens, _ in parts]
    z, t = (torch.cat([getattr(out, side) for out in outs]) for side in ("z", "t"))
    a, b = (torch.cat([getattr(out, side).tangent for out in outs]) for side in ("image", "text"))
    gammas = torch.stack([outs[0].image.gamma, outs[0].text.gamma]).detach()

    def loss(at: Tensor) -> Tensor:
        v, w = (nn.functional.normalize(base + g * along, dim=1) for base, along, g in ((z, a, at[0]), (t, b, at[1])))
        logits = outs[0].logit_scale.detach() * v @ w.T
        target = torch.arange(n)
        return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2

    slopes = torch.autograd.functional.jacobian(loss, torch.zeros(2, dtype=torch.float64))
    change = float(loss(gammas) - loss(0 * gammas))
    assert abs(change) > 1e-3
    assert found["drift/slope"] == pytest.approx(float(slopes.sum()), rel=1e-9)
    assert found["drift/finite_difference"] == pytest.approx(float(slopes.sum()), rel=1e-3)
    assert found["drift/change"] == pytest.approx(change, rel=1e-9)
    assert found["drift/remainder"] == pytest.approx(change - float(slopes @ gammas), rel=1e-9)
    assert found["gate_mean/image"] == pytest.approx(float(torch.cat([out.image.gate for out in outs]).mean()))
    scores = (z @ t.T).numpy()
    hits = np.mean([all(scores[i, i] > scores[i, j] for j in range(n) if j != i) for i in range(n)])
    assert found["i2t_r1_trunk"] == pytest.approx(hits)
    assert {"i2t_r1", "t2i_r1", "t2i_r1_trunk", "gamma/image", "gamma/text"} <= found.keys()


def test_without_an_injection_there_is_no_drift_to_log() -> None:
    from tiny_model import batch, objective

    tested = objective(order=0, student=False)
    images, tokens, _ = batch(5)
    only = Batch(0, 0, torch.arange(5), images, tokens, None)
    found = validate(tested, tested.model, [only], torch.device("cpu"), image_numbers={row: row for row in range(5)})
    assert "i2t_r1" in found
    assert not [key for key in found if "drift" in key or "trunk" in key]


def test_one_side_that_injects_nothing_adds_nothing() -> None:
    """As in the variant image-only."""
    from tiny_model import batch, objective

    tested = objective(order=0)
    images, tokens, stored = batch(5)
    out = tested.model(images, tokens)
    out.text, out.w = None, out.t
    found = validate(
        tested, lambda *_: out, [Batch(0, 0, torch.arange(5), images, tokens, stored)], torch.device("cpu"),
        image_numbers={row: row for row in range(5)},
    )  # fmt: skip
    z = out.z.detach().clone().requires_grad_()
    logits, target = out.logit_scale.detach() * z @ out.t.detach().T, torch.arange(5)
    ((nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2).backward()
    assert z.grad is not None
    assert found["drift/slope"] == pytest.approx(float((z.grad * out.image.tangent.detach()).sum()), rel=1e-9)
