"""The table of crops: what it compares is what it says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def roi(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("roi")


class Local(torch.nn.Module):
    """A teacher that is one 8 x 8 convolution: it knows nothing of surroundings, so crops differ by blur alone."""

    image_size, grid = 64, 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 12, 8, 8)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.permute(0, 3, 1, 2).float() / 255 - 0.5

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.layer(images).flatten(2).transpose(1, 2)
        return {"fine": tokens, "global": tokens.mean(1)}


def test_a_teacher_that_sees_its_own_patch_alone_resamples_well(roi: ModuleType) -> None:
    found = roi.measure(Local(), list(roi.pictures(6)))
    fine = found["fine"]
    assert fine["resampled/cosine"][0] > 0.999
    assert fine["base/cosine"][0] > 0.999
    assert (fine["resampled/cosine"][1:5] > fine["base/cosine"][1:5] + 0.05).all()
    assert (fine["base/cosine"][1:5] > fine["other/cosine"][1:5]).all()
    assert (fine["resampled/gram"][1:5] < fine["base/gram"][1:5]).all()
    assert set(found["global"]) == {"base/cosine", "other/cosine"}
    assert all(len(values) == 6 for values in fine.values())


def test_a_mirrored_map_is_reversed_along_its_lines(roi: ModuleType) -> None:
    map_ = np.arange(18, dtype=np.float32).reshape(9, 2)
    np.testing.assert_array_equal(roi.mirrored(map_)[:3], map_[[2, 1, 0]])
    np.testing.assert_array_equal(roi.mirrored(map_)[6:], map_[[8, 7, 6]])


def test_gram_errors_are_those_of_cosines(roi: ModuleType) -> None:
    a = np.array([[[1.0, 0], [0, 3]]])
    b = np.array([[[2.0, 0], [5, 0]]])
    np.testing.assert_allclose(roi.gram_errors(a, b), [(2 / 4) ** 0.5])
