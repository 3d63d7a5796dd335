"""The one view: torchvision's geometry and arithmetic to the bit, also at the edges."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from pipeline.data.views import LONGEST_RATIO, Preprocess, View, to_tensor
from pipeline.errors import PipeError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = v1.InterpolationMode.BICUBIC


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 48), seed=st.integers(0, 99))
def test_crop_equals_torchvision_resize_and_centre_crop_bit_for_bit(width, height, size, seed):
    if max(width, height) > LONGEST_RATIO * min(width, height):
        return
    image = noise(width, height, seed)
    expected = v1.Compose([v1.Resize(size, BICUBIC, antialias=True), v1.CenterCrop(size)])(image)
    newer = v2.Compose([v2.Resize(size, BICUBIC, antialias=True), v2.CenterCrop(size)])(image)
    got = np.asarray(View("crop", size)(image))
    assert np.array_equal(got, np.asarray(expected))
    assert np.array_equal(got, np.asarray(newer))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(width=st.integers(1, 70), height=st.integers(1, 70), size=st.integers(1, 40))
def test_squash_equals_torchvision_resize_to_a_square(width, height, size):
    image = noise(width, height)
    expected = v1.Resize((size, size), BICUBIC, antialias=True)(image)
    assert np.array_equal(np.asarray(View("squash", size)(image)), np.asarray(expected))


@pytest.mark.parametrize(("width", "height"), [(40, 1400), (1400, 40), (3, 500), (2000, 7)])
def test_a_ribbon_gives_the_same_window_within_two_grey_levels(width, height):
    image = noise(width, height)
    expected = v1.Compose([v1.Resize(24, BICUBIC), v1.CenterCrop(24)])(image)
    got = np.asarray(View("crop", 24)(image)).astype(int)
    assert np.abs(got - np.asarray(expected).astype(int)).max() <= 2


def test_a_ribbon_is_never_blown_up_whole(monkeypatch):
    largest = 0
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert View("crop", 64)(noise(1, 60_000)).size == (64, 64)
    assert largest == 64 * 64


def test_an_image_of_the_right_size_is_not_resampled():
    image = noise(20, 20)
    for kind in ("crop", "squash"):
        assert np.array_equal(np.asarray(View(kind, 20)(image)), np.asarray(image))


def test_grey_and_transparent_images_come_out_as_rgb():
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert View("crop", 8)(noise(12, 9, mode=mode)).mode == "RGB"


def test_to_tensor_equals_torchvision_to_tensor_and_normalize_bit_for_bit():
    image = noise(17, 11, seed=3)
    expected = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])(image)
    got = to_tensor(image, MEAN, STD)
    assert got.shape == (3, 11, 17)
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def test_preprocess_survives_json_and_pickle():
    preprocess = Preprocess(View("squash", 14), MEAN, STD)
    stored = json.loads(json.dumps(preprocess.to_json()))
    image = noise(30, 20)
    for again in (Preprocess.from_json(stored), Preprocess.from_json(json.dumps(stored)), _again(preprocess)):
        assert again == preprocess
        assert torch.equal(again(image), preprocess(image))


def _again(preprocess: Preprocess) -> Preprocess:
    return pickle.loads(pickle.dumps(preprocess))


def test_impossible_views_and_norms_are_refused():
    with pytest.raises(PipeError, match="no view 'zoom'"):
        View("zoom", 8)  # type: ignore[arg-type]
    with pytest.raises(PipeError, match="positive size"):
        View("crop", 0)
    with pytest.raises(PipeError, match="std must be positive"):
        Preprocess(View("crop", 8), MEAN, (1.0, 0.0, 1.0))
    with pytest.raises(PipeError, match="one number for each"):
        Preprocess(View("crop", 8), (0.5,), STD)  # type: ignore[arg-type]
