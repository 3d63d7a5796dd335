"""Crops of the one view: where they lie in the original, and their maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cache.layout import GLOBAL
from pipeline.data.roi import BOXES, SHARES, RoiSpec, cosines, described, probes, resample
from pipeline.data.views import Preprocess, View
from pipeline.losses.targets import TargetInfo, Targets

WHOLE = np.array([0, 0, 1, 1], np.float32)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red says x, green says y, in the coordinates of the image, 0 to 240."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((240 * np.stack([x, y, 0 * x], -1)).round().astype(np.uint8))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_boxes_have_the_areas_and_ratios_asked_for_and_lie_within_the_square() -> None:
    boxes = np.stack([RoiSpec((0.3, 0.8), (0.75, 4 / 3)).draw(0, 0, row) for row in range(3000)]).astype(np.float64)
    assert boxes.dtype == np.float64
    assert RoiSpec().draw(0, 0, 0).dtype == np.float32
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    np.testing.assert_allclose(np.quantile(w * h, [0.1, 0.5, 0.9]), [0.35, 0.55, 0.74], atol=0.02)
    ratio = np.log(w / h)
    assert np.abs(ratio).max() <= np.log(4 / 3) + 1e-5
    assert abs(np.median(ratio)) < 0.02
    for low, side in ((boxes[:, 0], w), (boxes[:, 1], h)):  # uniform over where the box can be
        np.testing.assert_allclose(np.quantile(low / (1 - side), [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)


def test_a_box_is_of_seed_epoch_and_row_alone() -> None:
    spec = RoiSpec()
    own = spec.draw(1, 2, 3)
    np.testing.assert_array_equal(RoiSpec().draw(1, 2, 3), own)
    for other in (spec.draw(0, 2, 3), spec.draw(1, 3, 3), spec.draw(1, 2, 4), spec.draw(1, 3, 2)):
        assert not np.array_equal(other, own)


def test_where_no_try_fits_the_largest_box_of_an_allowed_ratio_is_taken() -> None:
    np.testing.assert_array_equal(RoiSpec((1, 1)).draw(0, 0, 0), WHOLE)
    np.testing.assert_allclose(RoiSpec((1, 1), (2, 4)).draw(0, 0, 0), [0, 0.25, 1, 0.75])
    np.testing.assert_allclose(RoiSpec((1, 1), (0.2, 0.5)).draw(0, 0, 0), [0.25, 0, 0.75, 1])


def test_probes_have_the_shares_that_a_cache_names() -> None:
    boxes = probes(0, 7).astype(np.float64)
    np.testing.assert_allclose((boxes[:, 2:] - boxes[:, :2]).prod(1), SHARES, atol=1e-6)
    assert not np.array_equal(boxes, probes(0, 8))


# ---- cutting the image -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crop", "squash"])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (64, 64), (3000, 60)])
def test_a_box_is_cut_from_where_it_lies_in_the_original(kind: str, width: int, height: int) -> None:
    """On ramps of coordinates: the picture's own are those of the box within the window that the view shows."""
    view, box = View(kind, 32), np.array([0.25, 0.5, 0.75, 0.9], np.float32)
    side = min(width, height)
    if kind == "squash":
        x0, y0, w, h = 0.0, 0.0, width, height
    else:
        x0, y0, w, h = (width - side) / 2, (height - side) / 2, side, side
    middles = (np.arange(32) + 0.5) / 32
    x = (x0 + (0.25 + 0.5 * middles) * w) / width
    y = (y0 + (0.5 + 0.4 * middles) * h) / height
    seen = np.asarray(view.part(ramp(width, height), box), float) / 240
    inner = slice(3, -3)
    np.testing.assert_allclose(seen[inner, inner, 0], np.broadcast_to(x[None, inner], (26, 26)), atol=0.008)
    np.testing.assert_allclose(seen[inner, inner, 1], np.broadcast_to(y[inner, None], (26, 26)), atol=0.008)


@pytest.mark.parametrize("kind", ["crop", "squash"])
@pytest.mark.parametrize(("width", "height"), [(90, 70), (64, 128), (48, 48), (31, 1)])
def test_the_box_of_everything_is_the_view(kind: str, width: int, height: int) -> None:
    """To the bit where nothing is rounded; a crop resizes before it cuts, so its window begins at a whole pixel."""
    view, image = View(kind, 32), noise(width, height)
    assert view.part(image, WHOLE).size == (32, 32)
    whole, base = (np.asarray(x).astype(int) for x in (view.part(image, WHOLE), view(image)))
    assert np.abs(whole - base).max() <= (0 if kind == "squash" or (width, height) == (48, 48) else 2)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 2), (1, 4000), (5, 3)])
def test_tiny_and_thin_images_have_boxes_too(width: int, height: int) -> None:
    for row in range(40):
        box = RoiSpec((0.05, 1.0)).draw(0, 0, row)
        for kind in ("crop", "squash"):
            assert View(kind, 16).part(noise(width, height), box).size == (16, 16)  # type: ignore[arg-type]


def test_the_preprocessing_takes_a_box() -> None:
    prepare, image = Preprocess(View("crop", 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), noise(50, 40)
    box = np.array([0.1, 0.2, 0.7, 0.9], np.float32)
    expected = np.asarray(View("crop", 16).part(image, box), np.float64) / 255
    found = prepare(image, box=box).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, (expected - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4], atol=1e-5)


# ---- resampling the map ----------------------------------------------------------------------------------------------


def by_hand(tokens: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(T, K) → (T, K), float64: each cell's middle, the four nearest middles of the map weighted by distance."""
    grid = round(len(tokens) ** 0.5)
    map_ = tokens.astype(np.float64).reshape(grid, grid, -1)
    x0, y0, x1, y1 = box.astype(np.float64)
    found = np.zeros_like(map_)
    for i in range(grid):
        for j in range(grid):
            y = np.clip((y0 + (i + 0.5) / grid * (y1 - y0)) * grid - 0.5, 0, grid - 1)
            x = np.clip((x0 + (j + 0.5) / grid * (x1 - x0)) * grid - 0.5, 0, grid - 1)
            for a in range(grid):
                for b in range(grid):
                    found[i, j] += max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b)) * map_[a, b]
    return found.reshape(tokens.shape)


@pytest.mark.parametrize("grid", [1, 2, 7])
def test_resampling_is_bilinear_at_the_middles_of_the_boxs_cells(grid: int) -> None:
    rng = np.random.default_rng(grid)
    tokens = rng.normal(size=(6, grid**2, 5)).astype(np.float32)
    boxes = np.stack([RoiSpec((0.1, 1.0), (0.5, 2.0)).draw(0, 0, row) for row in range(6)])
    found = resample(torch.from_numpy(tokens), torch.from_numpy(boxes)).numpy()
    expected = np.stack([by_hand(t, box) for t, box in zip(tokens, boxes, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2, 3, 7, 14, 16, 37])
def test_the_box_of_everything_gives_back_the_map_to_the_bit(grid: int) -> None:
    tokens = torch.randn(3, grid**2, 4, generator=torch.Generator().manual_seed(0)) * 1e3
    assert torch.equal(resample(tokens, torch.from_numpy(np.stack([WHOLE] * 3))), tokens)


def test_targets_are_resampled_as_coefficients_and_global_stays() -> None:
    """Whatever the storage: steps first, then the box; a map of whole views comes out as without boxes."""
    rng = np.random.default_rng(0)
    scales = {"fine": 9, "mid": 4, "raw": 4}
    steps = {"fine": torch.rand(3), "mid": None, "raw": None}
    stored = {
        "fine": torch.from_numpy(rng.integers(-127, 128, (2, 9, 3), dtype=np.int8)),
        "mid": torch.from_numpy(rng.integers(-127, 128, (2, 4, 3), dtype=np.int8)),
        "mid_steps": torch.rand(2, 4),
        "raw": torch.randn(2, 4, 3).half(),
        GLOBAL: torch.randn(2, 6).half(),
    }
    targets = Targets(TargetInfo(tuple(scales), steps, {}))
    plain = targets(stored)
    whole = targets(stored | {BOXES: torch.from_numpy(np.stack([WHOLE, WHOLE]))})
    assert all(torch.equal(whole[name], plain[name]) for name in plain)
    boxes = np.stack([RoiSpec().draw(0, 0, row) for row in range(2)])
    cut = targets(stored | {BOXES: torch.from_numpy(boxes)})
    for name in scales:
        expected = np.stack([by_hand(x, box) for x, box in zip(plain[name].numpy(), boxes, strict=True)])
        np.testing.assert_allclose(cut[name].numpy(), expected, atol=1e-4)
        assert not torch.allclose(cut[name], plain[name])
    assert torch.equal(cut[GLOBAL], plain[GLOBAL])


# ---- saying what it is worth -----------------------------------------------------------------------------------------


def test_cosines_are_means_over_tokens_or_of_the_vectors() -> None:
    a = np.array([[[1.0, 0], [0, 2]], [[1, 1], [3, 0]]])
    b = np.array([[[2.0, 0], [5, 0]], [[1, 0], [1, 0]]])
    np.testing.assert_allclose(cosines(a, b), [0.5, (0.5**0.5 + 1) / 2])
    np.testing.assert_allclose(cosines(a[:, 0], b[:, 0]), [1, 0.5**0.5])


def test_the_worst_scale_speaks_for_a_cache() -> None:
    figures = {f"{share:g}": 0.9 for share in SHARES}
    found = described({"fine": figures | {"0.5": 0.8}, "mid": figures, "global": dict.fromkeys(figures, 0.1)})
    assert (
        found == "0.90 at 0.75 of the area, 0.80 at 0.5 of the area, 0.90 at 0.35 of the area, 0.90 at 0.2 of the area"
    )
    assert "not measured" in described({})
