"""SimCLR's views: a function of image and seed alone, drawn as torchvision's transforms draw, applied as they apply."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import chisquare, ks_2samp, kstest
from torch.utils.data import DataLoader
from torchvision import transforms

from pipeline.data.augment import Augmentation, SimCLRViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = SimCLRViews(24, MEAN, STD)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.array(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


def drawn(n: int, width: int = 400, height: int = 300) -> list[Augmentation]:
    return [one for i in range(n) for one in VIEWS.draw((7, i), width, height)]


def test_views_are_two_float32_images_that_differ_and_repeat_with_their_seed() -> None:
    image = picture()
    views = VIEWS(image, (3, 0, 5))
    assert views.shape == (2, 3, 24, 24)
    assert views.dtype == torch.float32
    assert torch.equal(views, VIEWS(image, (3, 0, 5)))
    others = [VIEWS(image, seed) for seed in ((4, 0, 5), (3, 1, 5), (3, 0, 6))]
    flat = torch.stack([views, *others]).flatten(0, 1).flatten(1)
    distances = torch.cdist(flat, flat) + 1e9 * torch.eye(8)
    assert distances.min() > 1.0
    assert torch.equal(views, VIEWS(image.convert("RGBA"), (3, 0, 5)))


def test_global_random_states_are_neither_read_nor_changed() -> None:
    image, found = picture(), []
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the state that must not matter)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        found.append(torch.stack([VIEWS(image, (1, i)) for i in range(8)]))
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        assert before[:2] == after[:2]
        assert torch.equal(before[2], after[2])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Views(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> torch.Tensor:
        return VIEWS(picture(seed=row), (5, row))


def test_views_are_the_same_in_worker_processes_and_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(12).tolist()
    loader = DataLoader(Views(), batch_size=None, num_workers=2, sampler=order, multiprocessing_context="fork")
    for row, found in zip(order, loader, strict=True):
        assert torch.equal(found, VIEWS(picture(seed=row), (5, row)))
    assert torch.equal(pickle.loads(pickle.dumps(VIEWS))(picture(), (1,)), VIEWS(picture(), (1,)))


def test_what_is_drawn_is_distributed_as_torchvisions_transforms_draw() -> None:
    n, width, height = 2000, 400, 300
    ours = drawn(n // 2, width, height)
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    crop, colour = transforms.RandomResizedCrop(224, scale=(0.08, 1.0)), transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    boxes = [crop.get_params(blank, crop.scale, crop.ratio) for _ in range(n)]
    factors = [colour.get_params(colour.brightness, colour.contrast, colour.saturation, colour.hue) for _ in range(n)]
    theirs = {
        "area": [h * w for _, _, h, w in boxes],
        "aspect": [w / h for _, _, h, w in boxes],
        "left": [x / max(1, width - w) for _, x, _, w in boxes],
        "top": [y / max(1, height - h) for y, _, h, _ in boxes],
    }
    found = {
        "area": [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a.box for a in ours)],
        "aspect": [(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in (a.box for a in ours)],
        "left": [x0 / max(1, width - x1 + x0) for x0, _, x1, _ in (a.box for a in ours)],
        "top": [y0 / max(1, height - y1 + y0) for _, y0, _, y1 in (a.box for a in ours)],
    }
    for index, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        theirs[name] = [one[index] for one in factors]
        found[name] = [factor for a in ours for key, factor in a.jitter if key == name]
    for name, values in found.items():
        assert ks_2samp(values, theirs[name]).pvalue > 1e-3, name
    assert 0.08 * width * height * 0.98 < min(found["area"]) < 0.1 * width * height
    assert 0.74 < min(found["aspect"]) < max(found["aspect"]) < 1.35


def test_frequencies_orders_and_blurs() -> None:
    ours = drawn(2000)
    for share, values in (
        (0.8, [bool(a.jitter) for a in ours]),
        (0.2, [a.grey for a in ours]),
        (0.5, [a.blur is not None for a in ours]),
        (0.5, [a.flip for a in ours]),
    ):
        assert abs(np.mean(values) - share) < 4 * math.sqrt(share * (1 - share) / len(ours))
    orders = Counter(tuple(name for name, _ in a.jitter) for a in ours if a.jitter)
    assert orders.keys() == set(permutations(("brightness", "contrast", "saturation", "hue")))
    assert chisquare(list(orders.values())).pvalue > 1e-3
    radii = [a.blur for a in ours if a.blur is not None]
    assert kstest(radii, "uniform", args=(0.1, 1.9)).pvalue > 1e-3
    # Independent of each other, and of the other view.
    columns = np.array([[bool(a.jitter), a.grey, a.blur is not None, a.flip] for a in ours], float)
    both = np.hstack([columns[0::2], columns[1::2]])
    correlations = np.corrcoef(both.T) - np.eye(8)
    assert np.abs(correlations).max() < 4 / math.sqrt(len(both))


def hue(image: Image.Image, factor: float) -> Image.Image:
    """Hue turned by `factor` of a circle, in 255 steps."""
    h, s, v = (np.array(channel) for channel in image.convert("HSV").split())
    turned = ((h.astype(int) + int(factor * 255)) % 256).astype(np.uint8)
    return Image.merge("HSV", [Image.fromarray(channel) for channel in (turned, s, v)]).convert("RGB")


def by_pillow(image: Image.Image, a: Augmentation, size: int) -> Image.Image:
    """The same steps by Pillow alone."""
    view = image.crop(a.box).resize((size, size), Image.Resampling.BILINEAR)
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    for name, factor in a.jitter:
        view = hue(view, factor) if name == "hue" else enhancers[name](view).enhance(factor)
    if a.grey:
        view = view.convert("L").convert("RGB")
    if a.blur is not None:
        view = view.filter(ImageFilter.GaussianBlur(radius=a.blur))
    return ImageOps.mirror(view) if a.flip else view


def test_views_are_what_the_drawn_numbers_say() -> None:
    seen = Counter()
    for row in range(60):
        image = picture(width=30 + row, height=80 - row, seed=row)
        views = VIEWS(image, (2, row))
        for found, augmentation in zip(views, VIEWS.draw((2, row), *image.size), strict=True):
            pixels = np.array(by_pillow(image, augmentation, 24)).transpose(2, 0, 1) / 255
            expected = (pixels - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
            seen.update([bool(augmentation.jitter), ("grey", augmentation.grey), ("flip", augmentation.flip)])
    assert len(seen) == 6


class Blur:
    """SLIP's: PIL's Gaussian blur with a radius from Python's global random state."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def test_views_look_like_those_of_the_published_chain_of_transforms() -> None:
    random.seed(1)
    torch.manual_seed(1)
    image, n = picture(120, 90), 400
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(24, scale=(0.08, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([Blur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    theirs = torch.stack([chain(image) for _ in range(n)])
    ours = torch.cat([VIEWS(image, (9, i)) for i in range(n // 2)])
    assert ours.shape == theirs.shape
    measures = {
        "brightness": lambda x: x.mean((1, 2, 3)),
        "contrast": lambda x: x.flatten(1).std(1),
        "colour": lambda x: x.std(1).mean((1, 2)),
        "red over blue": lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
        "sharpness": lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)),
        "left over right": lambda x: (x[..., :12] - x[..., 12:]).mean((1, 2, 3)),
    }
    for name, measure in measures.items():
        assert ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3, name


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 200), (200, 3)])
def test_images_of_extreme_shapes_have_views(width: int, height: int) -> None:
    assert torch.isfinite(VIEWS(picture(width, height), (0, 1))).all()
