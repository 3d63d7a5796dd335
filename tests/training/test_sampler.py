"""Batches are a function of (seed, epoch) alone."""

from __future__ import annotations

from collections import Counter

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


# ---- shards ----------------------------------------------------------------------------------------------------------


def sharded(**changes):
    values = {"shuffle": "shards", "shard_rows": 16, "buffer_shards": 2} | changes
    return plan(**values)


def test_shards_are_mixed_in_groups_and_every_row_comes_once():
    p = sharded()
    order = p.epoch_order(0)
    assert sorted(order.tolist()) == list(range(100, 205))
    whole = {k: [row for row in range(100, 205) if row // 16 == k] for k in range(6, 13)}
    at, groups = 0, []
    while at < len(order):  # cut the order where a pair of shards is complete
        shards = list(dict.fromkeys((order[at : at + 33] // 16).tolist()))[:2]
        size = sum(len(whole[k]) for k in shards)
        assert sorted(order[at : at + size].tolist()) == sorted(row for k in shards for row in whole[k])
        assert order[at : at + size].tolist() != sorted(order[at : at + size].tolist())
        groups.append(shards)
        at += size
    assert sorted(k for shards in groups for k in shards) == sorted(whole)
    assert not np.array_equal(order, p.epoch_order(1))
    assert np.array_equal(order, sharded().epoch_order(0))


def test_rows_that_are_left_out_change_no_shard():
    rows = np.array([0, 1, 5, 16, 17, 40, 100])
    order = sharded(rows=rows, batch_size=2, total_steps=3, buffer_shards=1).epoch_order(0)
    assert sorted(order.tolist()) == rows.tolist()
    places = [np.flatnonzero(order // 16 == k) for k in (0, 1, 2, 6)]
    assert all(np.ptp(of) == len(of) - 1 for of in places)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 9, 17])
def test_shards_too_are_the_same_batches_for_any_processes_and_start(world_size, start):
    alone = [s.rows for s in sharded().steps()][start:]
    shares = [list(sharded().steps(start=start, rank=r, world_size=world_size)) for r in range(world_size)]
    for k, rows in enumerate(alone):
        assert np.array_equal(np.concatenate([share[k].rows for share in shares]), rows)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (4, 5)])
@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_what_is_asked_for_ahead_is_what_comes(shuffle, rank, world_size):
    """Every row but those of the beginning has been asked for before its batch, for the epoch in which it comes."""
    p = sharded(rows=np.arange(330), total_steps=60, shuffle=shuffle)
    waiting, unasked = Counter(), []
    for step in p.steps(rank=rank, world_size=world_size):
        if shuffle == "shards":
            assert step.step == 0 or step.ahead.tolist() == sorted(step.ahead.tolist())
            if step.step == 0:
                waiting.update(zip(step.ahead_epochs.tolist(), step.ahead.tolist(), strict=True))
        for row in step.rows.tolist():
            if waiting[step.epoch, row]:
                waiting[step.epoch, row] -= 1
            else:
                unasked.append((step.step, row))
        if step.step or shuffle == "full":
            waiting.update(zip(step.ahead_epochs.tolist(), step.ahead.tolist(), strict=True))
    assert {step for step, _ in unasked} == ({0} if shuffle == "full" else set())  # the first is there before any hint
    assert waiting.total() < (1 if shuffle == "full" else 80)  # asked for what the run ends before


@pytest.mark.parametrize("batch_size", [30, 64, 100])
def test_batches_larger_than_a_group_are_asked_for_too(batch_size):
    p = sharded(rows=np.arange(330), batch_size=batch_size, total_steps=9)
    waiting, unasked = Counter(), set()
    for step in p.steps():
        asked = [row for row in step.rows.tolist() if waiting[row]]
        unasked |= {step.step} if len(asked) < len(step.rows) else set()
        waiting.subtract(asked)
        waiting.update(step.ahead.tolist())
    assert unasked <= {0}


def test_in_shards_the_hints_are_sequences():
    """Taken together over a group's steps, and over processes, they are whole shards in ascending order."""
    p = sharded(rows=np.arange(320), total_steps=32)
    hints = [step.ahead for step in p.steps()]
    order = p.epoch_order(0)
    second = np.sort(order[32:64])
    first = np.sort(order[:32])
    assert np.concatenate(hints[:3]).tolist() == [*first, *second]
