"""CLIP_benchmark's own metrics, unchanged, on our model; our evaluators find the same numbers on the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from colour_world import COLOURS, NAMES, jpeg
from torch.utils.data import DataLoader

from pipeline.data.samples import decode_image
from pipeline.data.views import Preprocess, View
from pipeline.evaluation import retrieval, zero_shot
from pipeline.evaluation.model_nodes import image_nodes, text_nodes
from pipeline.models.dinorankclip import DinoRankCLIP

TRUNK = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STUDENT = {"name": "vit_tiny_patch16_224", "patch": 8, "depth": 2, "text_width": 16, "text_layers": 1}
TEMPLATES = ["a photo of a {c} thing.", "something {c}."]
N = 30


def benchmark(metric: str) -> Any:
    reason = "CLIP_benchmark is not installed: pip install '.[benchmark]'"
    found = pytest.importorskip(f"clip_benchmark.metrics.{metric}", reason=reason)
    try:
        float(np.ones(1))  # its zero-shot accuracy asks for this
    except TypeError:
        pytest.skip(f"CLIP_benchmark 1.6 does not run with numpy {np.__version__}: pip install 'numpy<2.4'")
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, and an injection of a size that matters."""
    torch.manual_seed(3)
    scales = [{"name": "fine", "grid": 4, "depth_fraction": 1.0}]
    made = DinoRankCLIP(trunk=TRUNK, image_size=32, student=STUDENT, scales=scales, global_width=24)
    with torch.no_grad():
        for name in ("image", "text"):
            made.get_parameter(f"fusion.{name}.gamma").fill_(0.5)
    return made.eval()


@pytest.fixture(scope="module")
def pixels(model: Any) -> torch.Tensor:
    """(N, 3, 32, 32): squares of three colours under noise."""
    preprocess = Preprocess(View("crop", 32), model.trunk.mean, model.trunk.std)
    colours = [COLOURS[NAMES[n % 3]] for n in range(N)]
    return torch.stack([preprocess(decode_image(jpeg(colour, n, 32))) for n, colour in enumerate(colours)])


class Labelled(torch.utils.data.Dataset):
    """What CLIP_benchmark takes for a dataset: items, and the names of the classes."""

    def __init__(self, items: list[Any], classes: list[str]) -> None:
        self.items, self.classes = items, classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize("classes", [NAMES, [*NAMES, "yellow", "black", "white"]])
def test_zero_shot_is_clip_benchmarks(model: Any, pixels: torch.Tensor, classes: list[str]) -> None:
    metric = benchmark("zeroshot_classification")
    labels = np.random.default_rng(1).permutation(np.arange(N) % len(classes))  # a random model is right by chance
    loader: Any = DataLoader(Labelled(list(zip(pixels, labels.tolist(), strict=True)), classes), batch_size=7)
    theirs = metric.evaluate(model, loader, model.trunk.tokenizer, classes, TEMPLATES, "cpu", amp=False)
    with torch.inference_mode():
        images = image_nodes(model, pixels)["gated"].numpy()
        prompts = model.trunk.tokenizer(zero_shot.prompts(classes, TEMPLATES))
        texts = text_nodes(model, prompts)["gated"].numpy()
    found = zero_shot.evaluate({"gated": (images, texts)}, labels, len(classes), split="test")
    ours = {m.metric: m.value for m in found}
    assert ours["zero_shot/top1"] == pytest.approx(theirs["acc1"])
    assert ours["zero_shot/mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"])
    if len(classes) > 5:
        assert ours["zero_shot/top5"] == pytest.approx(theirs["acc5"])
    assert 0 < ours["zero_shot/top1"] < 1  # a number that could have come out otherwise


def pairs(pixels: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for n, image in enumerate(pixels):
        yield image, [f"number {n}, {NAMES[n % 3]}", f"{NAMES[n % 3]} with a {n}"]


def test_retrieval_is_clip_benchmarks(model: Any, pixels: torch.Tensor) -> None:
    metric = benchmark("zeroshot_retrieval")
    items = list(pairs(pixels))

    def collated(batch: Any) -> Any:
        return torch.stack([image for image, _ in batch]), [texts for _, texts in batch]

    loader: Any = DataLoader(Labelled(items, []), batch_size=8, collate_fn=collated)
    ks = [1, 5, 10]
    theirs = metric.evaluate(model, loader, model.trunk.tokenizer, "cpu", amp=False, recall_k_list=ks)
    with torch.inference_mode():
        images = image_nodes(model, pixels)["gated"].numpy()
        tokens = model.trunk.tokenizer([text for _, texts in items for text in texts])
        texts = text_nodes(model, tokens)["gated"].numpy()
    pair_image, pair_text = np.repeat(np.arange(N), 2), np.arange(2 * N)
    found = retrieval.evaluate({"gated": (images, texts)}, pair_image, pair_text, split="test")
    ours = {m.metric: m.value for m in found}
    for k in ks:
        assert ours[f"retrieval/i2t_recall@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert ours[f"retrieval/t2i_recall@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
    assert 0 < ours["retrieval/i2t_recall@10"] < 1


def test_the_probes_features_are_the_models_output(model: Any, pixels: torch.Tensor) -> None:
    # Its training of the probe asks for CUDA; what it asks the model for does not.
    featurizer = benchmark("linear_probe").Featurizer(model)
    with torch.no_grad():
        torch.testing.assert_close(featurizer(pixels), model.encode_image(pixels), atol=1e-6, rtol=0)


def test_under_autocast_the_metrics_run_and_move_little(model: Any, pixels: torch.Tensor) -> None:
    metric = benchmark("zeroshot_classification")
    args = (model, model.trunk.tokenizer, NAMES, TEMPLATES, "cpu")
    half, single = (metric.zero_shot_classifier(*args, amp=amp) for amp in (True, False))
    assert half.shape == single.shape == (16, 3)
    assert torch.cosine_similarity(half.float(), single, dim=0).min() > 0.99
    with torch.no_grad(), torch.autocast("cpu"):
        images = model.encode_image(pixels)
    with torch.no_grad():
        assert torch.cosine_similarity(images.float(), model.encode_image(pixels)).min() > 0.99
