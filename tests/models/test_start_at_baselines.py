"""Distilled outputs begin as the predictor that ignores the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CAPTIONS, SCALES, SIZE, WIDTH_GLOBAL, build

from pipeline.losses.distillation import global_loss, gram, gram_loss
from pipeline.models.student import DISTILLATION_WIDTH, ImageStudent


def teacher(images: int, grid: int, seed: int) -> torch.Tensor:
    """(images, g², 20) tokens with a pattern over places that all images share."""
    common = torch.randn(grid**2, 20, generator=torch.Generator().manual_seed(grid))
    return common + 0.7 * torch.randn(images, grid**2, 20, generator=torch.Generator().manual_seed(seed))


def started():
    model = build()
    mean = torch.nn.functional.normalize(torch.randn(WIDTH_GLOBAL, generator=torch.Generator().manual_seed(3)), dim=0)
    grams = {s["name"]: gram(teacher(200, s["grid"], 5)).mean(0) for s in SCALES}
    model.start_at_baselines(global_mean=mean, gram_means=grams)
    images = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        out = model(images, model.trunk.tokenizer(CAPTIONS + CAPTIONS[:2]))
    return model, out, mean, grams


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: s["name"])
def test_the_gram_loss_starts_near_the_mean_matrixs(scale):
    _, out, _, grams = started()
    held_out = teacher(6, scale["grid"], 9)
    unit = (gram(held_out) - grams[scale["name"]]).square().mean()
    ratio = float(gram_loss(out.student_tokens[scale["name"]], held_out).mean() / unit)
    plain = build()
    with torch.no_grad():
        random = plain(torch.randn(6, 3, SIZE, SIZE), plain.trunk.tokenizer(CAPTIONS + CAPTIONS[:2]))
    assert ratio < 1.2
    assert ratio < 0.7 * float(gram_loss(random.student_tokens[scale["name"]], held_out).mean() / unit)


def test_places_have_unit_affinities_where_there_are_more_of_them_than_dimensions():
    """144 places in 128 dimensions: the leading factors are shorter than 1, their directions are what is kept."""
    model = ImageStudent(
        name="vit_tiny_patch16_224",
        patch=4,
        depth=1,
        image_size=48,
        scales=[{"name": "dense", "grid": 12, "depth_fraction": 1.0}],
        global_width=WIDTH_GLOBAL,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    mean_gram = gram(teacher(20, 12, 11)).mean(0)
    model.start_gram_at("dense", mean_gram)
    left, values, right = np.linalg.svd(mean_gram.double().numpy())
    low = left[:, :DISTILLATION_WIDTH] * values[:DISTILLATION_WIDTH] @ right[:DISTILLATION_WIDTH]
    lengths = np.sqrt(low.diagonal())
    places = model.places["dense"].detach().double().numpy()
    assert lengths.min() < 0.99
    np.testing.assert_allclose(places @ places.T / DISTILLATION_WIDTH, low / np.outer(lengths, lengths), atol=1e-5)


def test_both_global_heads_start_at_the_mean_vector_exactly():
    _, out, mean, _ = started()
    target = torch.randn(6, WIDTH_GLOBAL, generator=torch.Generator().manual_seed(8))
    of_mean = global_loss(mean.expand(6, -1), target)
    assert torch.allclose(global_loss(out.image_global, target), of_mean)
    assert torch.allclose(global_loss(out.text_global, target), of_mean)


def test_the_start_leaves_trunk_and_embeddings_alone():
    model, out, _, _ = started()
    plain = build()
    images = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.equal(plain(images, plain.trunk.tokenizer(CAPTIONS + CAPTIONS[:2])).v, out.v)
    for name, value in plain.trunk.state_dict().items():
        assert torch.equal(value, model.trunk.state_dict()[name]), name


def test_tokens_still_depend_on_the_image():
    _, out, _, _ = started()
    for tokens in out.student_tokens.values():
        assert float((tokens[0] - tokens[1]).norm()) > 1e-3 * float(tokens[0].norm())
