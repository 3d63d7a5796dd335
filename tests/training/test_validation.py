"""Validation: recall against a brute force, and what the objective is asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.training.data import Batch
from pipeline.training.validation import even_batches, validate, validation_steps
from pipeline.training.validation_pairs import Captions, number_images, recall

sys.path.insert(0, str(Path(__file__).parent.parent / "losses"))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(images: Tensor, texts: Tensor, pairs: set[tuple[int, int]]) -> dict[str, float]:
    """By loops over unique images and captions, in float64; a tie is a miss."""
    scores = (images.double() @ texts.double().T).tolist()
    own = {i: {t for image, t in pairs if image == i} for i in range(len(images))}
    i2t = []
    for i, of in own.items():
        best = max(scores[i][t] for t in of)
        i2t.append(1 + sum(scores[i][t] >= best for t in range(len(texts)) if t not in of))
    t2i = [1 + sum(scores[j][t] >= scores[i][t] for j in own if j != i) for i, t in sorted(pairs)]
    found = {f"i2t_r{k}": float(np.mean([rank <= k for rank in i2t])) for k in (1, 5, 10)}
    found |= {f"t2i_r{k}": float(np.mean([rank <= k for rank in t2i])) for k in (1, 5, 10)}
    return found | {"i2t_median_rank": float(np.median(i2t)), "t2i_median_rank": float(np.median(t2i))}


def test_recall_is_that_of_a_brute_force_with_several_captions_an_image_and_repeated_rows() -> None:
    images, texts = unit(30, 3), unit(50, 3, seed=1)
    generator = np.random.default_rng(2)
    pairs = {(i, t) for i in range(30) for t in generator.choice(50, 3, replace=False).tolist()}
    used = sorted({t for _, t in pairs})
    pairs = {(i, used.index(t)) for i, t in pairs}
    texts = texts[used]
    expected = brute_force(images, texts, pairs)
    assert 0 < expected["i2t_r1"] < expected["i2t_r5"] < expected["i2t_r10"]
    assert 0 < expected["t2i_r1"] < expected["t2i_r5"] < expected["t2i_r10"]
    # As processes bring them: in any order, an image or caption more than once.
    image_order = generator.permutation(np.r_[0:30, 4, 4, 9])
    text_order = generator.permutation(np.r_[0 : len(used), 3])
    listed = generator.permutation([*pairs, *list(pairs)[:5]])
    found = recall(images.numpy()[image_order], image_order, texts.numpy()[text_order], text_order, listed)
    assert found == pytest.approx(expected)


def test_a_perfect_model_scores_one_and_a_collapsed_one_nothing() -> None:
    images = unit(12, 8)
    texts = nn.functional.normalize(images.repeat_interleave(5, 0) + 0.01 * unit(60, 8, seed=1), dim=1)
    pairs = np.array([(t // 5, t) for t in range(60)])
    perfect = recall(images.numpy(), np.arange(12), texts.numpy(), np.arange(60), pairs)
    assert perfect == dict.fromkeys(perfect, 1.0)
    same = np.full((60, 8), 8**-0.5, np.float32)
    collapsed = recall(same[:12], np.arange(12), same, np.arange(60), pairs)
    assert {collapsed[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)} == {0.0}
    assert (collapsed["i2t_median_rank"], collapsed["t2i_median_rank"]) == (56, 12)


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


def read(rows: list[int], value: float, *, step: int = 0) -> Batch:
    images = torch.full((len(rows), 3, 2, 2), value)
    failed = [(99, "gone")] if not rows else []
    return Batch(step, 0, torch.tensor(rows), images, torch.zeros(len(rows), 4, dtype=torch.int64), None, failed)


def captions(rows: list[int]) -> Captions:
    """Two captions a row, one of which all share."""
    tokenizer = lambda texts: torch.tensor([[len(text)] * 4 for text in texts])  # noqa: E731
    return Captions.of(np.array(rows), [str(row) for row in rows], lambda row: ["all", f"{row}" * row], tokenizer)


class Fake:
    """In place of a model that injects nothing."""

    def __init__(self, encode_image: Callable[[Tensor], Tensor], encode_text: Callable[[Tensor], Tensor]) -> None:
        self.encode_image, self.encode_text = encode_image, encode_text

    def __call__(self, images: Tensor, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(v=self.encode_image(images), image=None, text=None)

    def text_nodes(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"trunk": self.encode_text(tokens)}


MODEL = Fake(lambda x: unit(len(x), 4), lambda x: unit(len(x), 4))


@pytest.mark.parametrize("training", [True, False])
def test_the_objective_is_asked_at_full_weights_in_evaluation_mode_and_left_as_it_was(training: bool) -> None:
    objective = Recorder().train(training)
    found = validate(
        objective,
        MODEL,  # type: ignore[arg-type]
        [read([4, 5], 1.0), read([6, 7], 2.0, step=1), read([8], 5.0, step=2)],
        torch.device("cpu"),
        captions=captions([4, 5, 6, 7, 8]),
        even=2,
    )
    assert objective.calls == [(1.0, False)] * 2  # an uneven batch has fewer candidates: its loss is another
    assert objective.training is training
    assert found["loss"] == pytest.approx(1.5)
    assert found["i2t_r1"] == 0.0  # the batches hold the same vectors: every partner ties with a rival


def test_every_caption_of_an_image_counts_and_each_is_embedded_once() -> None:
    """Only the second captions are right; the first ones, which all rows share, are those a batch carries."""
    asked: list[int] = []
    rows = [4, 5, 6, 7]
    vectors = torch.eye(8)

    def encode_text(tokens: Tensor) -> Tensor:
        asked.extend(tokens[:, 0].tolist())
        return vectors[[0 if length == 3 else length for length in tokens[:, 0].tolist()]]

    shown = iter([[4, 5], [6, 7]])
    model = Fake(lambda x: vectors[next(shown)], encode_text)
    batches = [read(rows[:2], 1.0), read(rows[2:], 1.0, step=1)]
    found = validate(Recorder(), model, batches, torch.device("cpu"), captions=captions(rows), even=2)  # type: ignore[arg-type]
    assert sorted(asked) == [3, 4, 5, 6, 7]
    assert found["i2t_r1"] == 1.0  # one hit is enough
    assert found["t2i_r1"] == 0.5  # the shared caption finds none of the four


def test_a_batch_of_which_nothing_can_be_read_is_left_out_and_noted() -> None:
    objective = Recorder()
    for batches, expected in (([read([], 0.0), read([4, 5], 1.0)], 1.0), ([read([], 0.0)], None)):
        noted: list[tuple[int, str]] = []
        found = validate(
            objective,
            MODEL,  # type: ignore[arg-type]
            batches,
            torch.device("cpu"),
            captions=captions([4, 5]),
            even=1,
            note=lambda batch, noted=noted: noted.extend(batch.failed),  # type: ignore[misc]
        )
        assert found.get("loss") == expected
        assert noted == [(99, "gone")]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_takes_part_in_every_batch_and_no_row_is_left_out(world: int) -> None:
    rows = np.arange(11)
    shares = [list(validation_steps(rows, batch_size=4, rank=r, world_size=world)) for r in range(world)]
    joined = [
        np.concatenate(parts).tolist() for parts in zip(*([s.rows for s in share] for share in shares), strict=True)
    ]
    assert joined == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [even_batches(n, 4) for n in (0, 3, 4, 11)] == [0, 1, 1, 2]


def one_caption_a_row(tokens: Tensor) -> Captions:
    """Rows 0 to n − 1 with one caption each, whose tokens (n, L) are given."""
    rows = list(range(len(tokens)))
    return Captions.of(
        np.array(rows), [str(row) for row in rows], lambda row: [str(row)], lambda texts: tokens[[*map(int, texts)]]
    )


def test_drift_and_the_trunks_recall_agree_with_autograd_and_a_brute_force() -> None:
    """Two batches of an injecting model in float64, as one contrastive batch."""
    from tiny_model import batch, objective

    tested = objective(order=0)
    n, parts = 10, [batch(5, seed=seed) for seed in (0, 1)]
    batches = [Batch(0, 0, torch.arange(5) + 5 * k, *part) for k, part in enumerate(parts)]
    texts = one_caption_a_row(torch.cat([tokens for _, tokens, _ in parts]))
    found = validate(tested, tested.model, batches, torch.device("cpu"), captions=texts, even=1)
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
    found = validate(tested, tested.model, [only], torch.device("cpu"), captions=one_caption_a_row(tokens), even=1)
    assert "i2t_r1" in found
    assert not [key for key in found if "drift" in key or "trunk" in key]


def test_one_side_that_injects_nothing_adds_nothing() -> None:
    """As in the variant image-only."""
    from tiny_model import batch, objective

    tested = objective(order=0)
    images, tokens, stored = batch(5)
    out = tested.model(images, tokens)
    out.text, out.w = None, out.t
    model = Fake(lambda _: out.v, lambda _: out.t)
    model.__class__ = type("Injecting", (Fake,), {"__call__": lambda *_: out})
    only = Batch(0, 0, torch.arange(5), images, tokens, stored)
    found = validate(tested, model, [only], torch.device("cpu"), captions=one_caption_a_row(tokens), even=1)  # type: ignore[arg-type]
    z = out.z.detach().clone().requires_grad_()
    logits, target = out.logit_scale.detach() * z @ out.t.detach().T, torch.arange(5)
    ((nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2).backward()
    assert z.grad is not None
    assert found["drift/slope"] == pytest.approx(float((z.grad * out.image.tangent.detach()).sum()), rel=1e-9)
