"""Further views as numbers: torchvision's distribution and arithmetic, and nothing but (seed, name, row) decides."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from pipeline.data.geometry import ViewSpec, draw_box, replay, view_choice
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError

AREA, ASPECT = (0.3, 0.9), (3 / 4, 4 / 3)
DRAWS = 4000


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ours(width: int, height: int, area=AREA, aspect=ASPECT) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([draw_box(rng, width, height, area, aspect) for _ in range(DRAWS)])


def torchvisions(width: int, height: int, area=AREA, aspect=ASPECT) -> np.ndarray:
    torch.manual_seed(0)
    drawn = v2.RandomResizedCrop(8, scale=area, ratio=aspect)
    boxes = []
    for _ in range(DRAWS):
        params = drawn.make_params([torch.empty(3, height, width)])
        boxes.append(
            [params["left"], params["top"], params["left"] + params["width"], params["top"] + params["height"]]
        )
    return np.array(boxes)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (120, 90), (90, 400)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    """Quantiles of area, aspect and place; the standard error of a median of 4,000 is about 0.01 of the range."""

    def traits(boxes: np.ndarray) -> dict[str, np.ndarray]:
        x0, y0, x1, y1 = boxes.T.astype(float)
        w, h = x1 - x0, y1 - y0
        return {
            "area": w * h / (width * height),
            "aspect": np.log(w / h),
            "x": x0 / np.maximum(width - w, 1),
            "y": y0 / np.maximum(height - h, 1),
        }

    a, b = traits(ours(width, height)), traits(torchvisions(width, height))
    for name in a:
        levels = np.linspace(0.05, 0.95, 7)
        span = max(float(np.ptp(b[name])), 1e-9)
        np.testing.assert_allclose(np.quantile(a[name], levels), np.quantile(b[name], levels), atol=0.05 * span)


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (2, 2), (1, 1), (3, 2), (65_535, 7)])
def test_extreme_images_have_torchvisions_fallback_and_boxes_within_them(width: int, height: int) -> None:
    ours_, theirs = ours(width, height)[:300], torchvisions(width, height)[:300]
    assert (ours_[:, :2] >= 0).all()
    assert (ours_[:, :2] < ours_[:, 2:]).all()
    assert (ours_[:, 2:] <= [width, height]).all()
    sizes = [{tuple(box[2:] - box[:2]) for box in boxes} for boxes in (ours_, theirs)]
    if max(width, height) > 100:  # no try can fit: always the fallback
        assert sizes[0] == sizes[1]
        np.testing.assert_array_equal(ours_[0], theirs[0])
    else:
        assert sizes[0] <= sizes[1]


def test_a_whole_image_of_an_allowed_ratio_is_whole_and_another_is_cut_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    assert draw_box(rng, 400, 300, (1, 1), ASPECT) == (0, 0, 400, 300)
    assert draw_box(rng, 400, 300, (1, 1), (1, 1)) == (50, 0, 350, 300)
    assert draw_box(rng, 300, 400, (1, 1), (1, 1)) == (0, 50, 300, 350)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    row=st.integers(0, 10**7),
    f=st.booleans(),
)
def test_replay_is_torchvisions_resized_crop_and_flip_bit_for_bit(width, height, size, row, f) -> None:
    image, geometry = noise(width, height), ViewSpec("a", (0.1, 1.0), flip=float(f)).draw(3, row, width, height)
    x0, y0, x1, y1 = geometry[:4].astype(int).tolist()
    expected = tv.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size], tv.InterpolationMode.BICUBIC)
    expected = tv.horizontal_flip(expected) if f else expected
    assert geometry[4] == f
    assert np.array_equal(np.asarray(replay(image, geometry, size)), np.asarray(expected))


def test_a_picture_that_is_not_rgb_and_the_preprocessing_take_a_geometry() -> None:
    geometry = np.array([2, 3, 20, 30, 1], np.float32)
    grey = noise(40, 50).convert("L")
    prepared = Preprocess(View("crop", 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(grey, geometry)
    expected = np.asarray(replay(grey.convert("RGB"), geometry, 16), np.float32) / 255
    np.testing.assert_allclose(prepared.permute(1, 2, 0).numpy(), (expected - 0.5) / 0.25, atol=1e-6)


def test_draws_depend_on_seed_name_row_and_the_images_size_alone() -> None:
    spec = ViewSpec("a")
    same = spec.draw(1, 5, 300, 200)
    np.random.seed(9)  # noqa: NPY002 (nobody reads it)
    np.random.default_rng(0).random(3)
    np.testing.assert_array_equal(ViewSpec("a").draw(1, 5, 300, 200), same)
    others = [spec.draw(2, 5, 300, 200), ViewSpec("b").draw(1, 5, 300, 200), spec.draw(1, 6, 300, 200)]
    assert not any(np.array_equal(other, same) for other in others)
    flips = [spec.draw(0, row, 300, 200)[4] for row in range(2000)]
    assert 0.46 < np.mean(flips) < 0.54
    assert {ViewSpec("a", flip=0).draw(0, row, 30, 20)[4] for row in range(50)} == {0}
    assert {ViewSpec("a", flip=1).draw(0, row, 30, 20)[4] for row in range(50)} == {1}


def test_whole_pixels_up_to_65535_survive_float32() -> None:
    for number in (0, 1, 32_767, 65_533, 65_534, 65_535):
        assert int(np.array([number], np.float32)[0]) == number
    geometry = ViewSpec("a", (0.999, 1.0), (0.9, 1.1)).draw(0, 3, 65_535, 65_535)
    rng = np.random.default_rng([0, __import__("zlib").crc32(b"a"), 3])
    assert geometry[:4].tolist() == list(draw_box(rng, 65_535, 65_535, (0.999, 1.0), (0.9, 1.1)))
    assert geometry[2] > 60_000


@pytest.mark.parametrize("box", [(0, 0, 11, 5), (0, 0, 5, 9), (-1, 0, 5, 5), (4, 0, 4, 5), (0, 6, 5, 5)])
def test_a_box_that_does_not_lie_within_the_image_is_one_clear_line(box: tuple[int, ...]) -> None:
    with pytest.raises(PipeError, match=r"does not lie within its image of 10 x 8"):
        replay(noise(10, 8), np.array([*box, 0], np.float32), 4)


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_epochs_go_through_all_views_before_any_comes_again(views: int) -> None:
    for row in range(200):
        order = [view_choice(7, epoch, row, views) for epoch in range(3 * views)]
        for first in range(2 * views + 1):
            assert sorted(order[first : first + views]) == list(range(views))
    counts = collections.Counter(view_choice(7, 0, row, views) for row in range(3000))
    assert min(counts.values()) > 0.85 * 3000 / views  # an epoch sees all views
