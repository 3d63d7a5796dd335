"""Who is held out: the first images in the order of their hashes, copies together, old rows where they were."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.splits import held_out_rows, split_by_hash, split_by_source


def digest(n: int) -> str:
    return hashlib.sha256(str(n).encode()).hexdigest()


def fresh(images: list[int], status: list[str] | None = None, fraction: float = 0.01):
    hashes = [digest(n) for n in images]
    return split_by_hash(hashes, status or ["ok"] * len(images), {}, Counter(), fraction)


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [
        (10, 0.01, 1),
        (95, 0.01, 10),
        (3_050, 0.01, 305),
        (10_000, 0.01, 1_000),
        (50_000, 0.01, 1_000),
        (300_000, 0.01, 3_000),
        (100, 0.5, 50),
        (20_000, 0.2, 4_000),
    ],
)
def test_held_out_is_the_fraction_but_at_least_a_tenth_or_a_thousand(rows, fraction, expected):
    assert held_out_rows(rows, fraction) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(images=st.lists(st.integers(0, 60), min_size=1, max_size=90), fraction=st.sampled_from([0.01, 0.3]))
def test_a_prefix_in_hash_order_is_held_out_and_no_longer_than_needed(images, fraction):
    split = fresh(images, fraction=fraction).split
    sides = dict(zip(images, split, strict=True))
    assert [sides[n] for n in images] == split  # copies on one side
    val = {digest(n) for n, side in sides.items() if side == "val"}
    train = {digest(n) for n, side in sides.items() if side == "train"}
    if len(sides) == 1:
        assert not val
        return
    assert max(val) < min(train, default="g")
    wanted = max(math.ceil(fraction * len(images)), min(1_000, math.ceil(0.1 * len(images))))
    held = split.count("val")
    last = sum(digest(n) == max(val) for n in images)
    assert held >= wanted
    assert held - last < wanted


def test_the_split_does_not_depend_on_the_order_of_rows():
    images = list(range(200))
    sides = dict(zip(images, fresh(images).split, strict=True))
    backwards = dict(zip(images[::-1], fresh(images[::-1]).split, strict=True))
    assert sides == backwards
    assert list(sides.values()).count("val") == 20


def test_unusable_rows_are_not_counted_and_rows_without_image_train():
    status = ["ok"] * 20 + ["caption_missing"] * 500
    split = fresh(list(range(520)), status).split
    assert split[:20].count("val") == 2
    assert split_by_hash(["", ""], ["image_missing"] * 2, {}, Counter(), 0.01).split == ["train", "train"]


def test_growth_fills_up_to_the_share_of_all_rows_and_moves_nobody():
    first = fresh(list(range(100)))
    old = {digest(n): side for n, side in enumerate(first.split)}
    usable = Counter(first.split)
    added = split_by_hash([digest(n) for n in range(100, 1_000)], ["ok"] * 900, old, usable, 0.01).split
    assert usable["val"] == 10
    assert added.count("val") == 90
    # Copies of old rows follow them, and count.
    again = split_by_hash([digest(n) for n in range(100)], ["ok"] * 100, old, usable, 0.01).split
    assert again == first.split


def test_copies_of_held_out_images_count_towards_the_share():
    first = fresh(list(range(100)))
    old = {digest(n): side for n, side in enumerate(first.split)}
    copies = [n for n, side in enumerate(first.split) if side == "val"]
    images = copies + list(range(100, 280))
    added = split_by_hash([digest(n) for n in images], ["ok"] * 190, old, Counter(first.split), 0.01).split
    assert added[: len(copies)] == ["val"] * 10
    assert added.count("val") == 29 - 10  # a tenth of 290 rows, ten of which stood


def test_growth_of_a_large_set_holds_out_no_more_than_the_fraction():
    first = fresh(list(range(2_000)), fraction=0.01)
    usable = Counter(first.split)
    old = {digest(n): side for n, side in enumerate(first.split)}
    hashes = [digest(n) for n in range(2_000, 30_000)]
    added = split_by_hash(hashes, ["ok"] * len(hashes), old, usable, 0.01).split
    assert usable["val"] + added.count("val") == 1_000


def test_a_training_copy_of_a_validation_image_is_not_trained_on():
    hashes, is_val = [digest(1), digest(2), digest(1)], [False, False, True]
    found = split_by_source(hashes, ["ok"] * 3, is_val, {})
    assert found.split == ["train", "train", "val"]
    assert found.status == ["duplicate_of_val", "ok", "ok"]


def test_an_unusable_validation_row_claims_no_image():
    found = split_by_source([digest(1)] * 2, ["ok", "caption_empty"], [False, True], {})
    assert found.status == ["ok", "caption_empty"]


def test_an_image_stays_on_the_side_where_it_was_used():
    old = {digest(1): "train", digest(2): "val"}
    hashes = [digest(1), digest(2), digest(1), digest(3)]
    found = split_by_source(hashes, ["ok"] * 4, [True, False, False, True], old)
    assert found.status == ["duplicate_of_train", "duplicate_of_val", "ok", "ok"]
