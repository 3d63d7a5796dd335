"""When a loss counts as exploded, whose rows are named, and how many of fp16's left-out updates are too many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import Processes, ToyModel, batch_of

from pipeline.errors import PipeError
from pipeline.training.divergence import LEAST, SKIPPED_IN_A_ROW, WINDOW, Watch, rows_not_finite
from pipeline.training.together import Together


def watch(folder: Path, **settings: float) -> Watch:
    return Watch(Together(Processes()), folder, **settings)  # type: ignore[arg-type]


def test_a_spike_and_a_slow_rise_are_no_explosion(tmp_path: Path) -> None:
    of = watch(tmp_path, factor=10.0, steps=3)
    losses = [7.0] * LEAST + [500.0, 500.0, 7.0, 500.0, 500.0] + [7.0 * 1.02**k for k in range(400)]
    assert losses[-1] > 10 * 7
    assert [of.explodes(loss) for loss in losses] == [None] * len(losses)


def test_losses_above_the_bound_for_long_enough_are_one_and_do_not_move_it(tmp_path: Path) -> None:
    of = watch(tmp_path, factor=10.0, steps=3)
    assert [of.explodes(5.0) for _ in range(WINDOW)] == [None] * WINDOW
    assert of.explodes(50.0) is None  # the bound itself
    assert [of.explodes(51.0), of.explodes(51.0)] == [None, None]
    assert of.above == 2
    restored = watch(tmp_path, factor=10.0, steps=3)
    restored.restore(list(of.losses), of.above)
    for each in (of, restored):
        assert "above 10 times its median 5 for 3 steps" in str(each.explodes(51.0))
    assert watch(tmp_path, factor=None, steps=1).explodes(1e9) is None
    of = watch(tmp_path, factor=10.0, steps=30)
    found = [of.explodes(loss) for loss in [5.0] * LEAST + [51.0] * 30]
    assert found[:-1] == [None] * (LEAST + 29)
    assert "its median 5 for 30 steps" in str(found[-1])


def test_near_zero_nothing_is_an_explosion_below_the_factor_itself(tmp_path: Path) -> None:
    of = watch(tmp_path, factor=10.0, steps=1)
    for _ in range(LEAST):
        of.explodes(0.001)
    assert of.explodes(9.9) is None
    assert of.explodes(10.1) is not None


def test_nothing_is_compared_before_there_is_something_to_compare_with(tmp_path: Path) -> None:
    of = watch(tmp_path, factor=2.0, steps=1)
    assert [of.explodes(10.0**k) for k in range(LEAST)] == [None] * LEAST


def test_updates_that_the_scaler_leaves_out_are_no_error_unless_it_leaves_out_all(tmp_path: Path) -> None:
    of = watch(tmp_path, scaled=True)
    batch = batch_of(0, 0, torch.arange(4).numpy())
    of.check(torch.tensor(1.0), torch.tensor(float("inf")), batch, ToyModel(), step=0)
    for step in range(SKIPPED_IN_A_ROW - 1):
        of.after_update(skipped=True, step=step)
    of.after_update(skipped=False, step=300)
    for step in range(SKIPPED_IN_A_ROW - 1):
        of.after_update(skipped=True, step=step)
    with pytest.raises(PipeError, match=r"scaler has left out the last 200 updates, at step 7.*precision=bf16"):
        of.after_update(skipped=True, step=7)
    with pytest.raises(PipeError, match="the loss is inf at step 3, rows 0, 1, 2, 3;"):
        of.check(torch.tensor(float("inf")), torch.tensor(1.0), batch, ToyModel(), step=3)


def test_rows_with_bad_pixels_targets_or_embeddings_are_found_and_the_model_is_left_as_it_was() -> None:
    model = ToyModel()
    model.image = nn.Sequential(model.image, nn.BatchNorm1d(4))  # in training mode one bad row would spoil all
    model.train()
    model.text.weight.data[13] = float("inf")
    batch = batch_of(0, 0, torch.arange(10, 16).numpy())
    batch.images[1, 0, 0, 0] = float("nan")
    batch.targets = {"global": torch.ones(6, 2, dtype=torch.float16), "fine": torch.ones(6, 4, 2, dtype=torch.int8)}
    batch.targets["global"][5, 1] = float("inf")
    model.text.eval()
    assert rows_not_finite(model, batch) == [11, 13, 15]
    assert (model.training, model.image.training, model.text.training) == (True, True, False)
    assert int(model.image[1].num_batches_tracked) == 0
