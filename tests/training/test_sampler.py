"""Batches are a function of (seed, epoch) alone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import PipeError
from pipeline.training.sampler import BatchPlan, caption_choice


def plan(**changes):
    values = {"rows": np.arange(100, 205), "batch_size": 10, "total_steps": 25, "seed": 3} | changes
    return BatchPlan(**values)


def test_an_epoch_visits_every_row_at_most_once_and_all_but_the_uneven_rest():
    steps = list(plan().steps())
    assert len(steps) == 25
    first = np.concatenate([s.rows for s in steps if s.epoch == 0])
    assert len(first) == 100
    assert len(set(first.tolist())) == 100
    assert set(first.tolist()) <= set(range(100, 205))


def test_epochs_and_seeds_differ_and_repeat_exactly():
    p = plan()
    assert not np.array_equal(p.epoch_order(0), p.epoch_order(1))
    assert not np.array_equal(p.epoch_order(0), plan(seed=4).epoch_order(0))
    assert np.array_equal(p.epoch_order(7), plan().epoch_order(7))
    assert sorted(p.epoch_order(0).tolist()) == list(range(100, 205))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_union_over_processes_is_the_same_global_batch(world_size):
    alone = [s.rows for s in plan().steps()]
    shares = [list(plan().steps(rank=r, world_size=world_size)) for r in range(world_size)]
    for k, rows in enumerate(alone):
        assert np.array_equal(np.concatenate([share[k].rows for share in shares]), rows)


@pytest.mark.parametrize("start", [1, 9, 10, 17, 24])
def test_starting_in_mid_epoch_continues_the_same_sequence(start):
    whole = list(plan().steps())
    rest = list(plan().steps(start=start))
    assert [s.step for s in rest] == list(range(start, 25))
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(whole[start:], rest, strict=True))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(PipeError, match=r"105 training rows do not fill one batch of 106.*train\.batch_size"):
        plan(batch_size=106)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(PipeError, match="does not divide among 3"):
        next(plan().steps(world_size=3))


def test_every_caption_is_used_once_before_any_comes_again():
    for row in range(50):
        chosen = [caption_choice(0, epoch, row, 5) for epoch in range(5)]
        assert sorted(chosen) == [0, 1, 2, 3, 4]
    starts = {caption_choice(0, 0, row, 5) for row in range(50)}
    assert starts == {0, 1, 2, 3, 4}
