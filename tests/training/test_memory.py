"""What is said to a model before it trains, to take less memory."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pipeline.training.memory import save_memory


@pytest.mark.parametrize(
    ("inner", "rows", "said"),
    [
        (nn.BatchNorm2d(2), 5, True),
        (nn.BatchNorm2d(2), 12, False),
        (nn.BatchNorm2d(2), None, False),
        (nn.LayerNorm(2), 5, False),
    ],
    ids=["norm", "norm, whole batch", "norm, not asked", "no norm"],
)
def test_one_line_where_batch_norms_see_less_than_the_batch(
    inner: nn.Module, rows: int | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    objective: Any = SimpleNamespace(model=nn.Sequential(inner), micro_batch_size=None)
    with caplog.at_level(logging.WARNING):
        save_memory(objective, micro_batch_size=rows, batch_size=12)
    assert objective.micro_batch_size == rows
    assert len(caplog.records) == said
    if said:
        assert "batch norms see 4 pairs at a time, not 12" in caplog.text
