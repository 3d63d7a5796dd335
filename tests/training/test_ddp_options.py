"""`train.ddp` reaches DistributedDataParallel, and leaves it alone where it says nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import load_config
from pipeline.training import machine


@pytest.mark.parametrize(
    ("sets", "handed_on"),
    [
        ([], {}),
        (
            ["train.ddp={gradient_as_bucket_view: true, static_graph: true, bucket_cap_mb: 50}"],
            {"gradient_as_bucket_view": True, "static_graph": True, "bucket_cap_mb": 50},
        ),
        (["train.ddp.find_unused_parameters=true"], {"find_unused_parameters": True}),
    ],
    ids=["default", "three", "unused"],
)
def test_options_are_handed_on(sets: list[str], handed_on: dict[str, Any]) -> None:
    asked = load_config(None, sets=sets).train.ddp.model_dump()
    handler = machine.accelerator("no", ddp=asked).ddp_handler
    assert handler.to_kwargs() == handed_on
    assert asked.keys() <= inspect.signature(DistributedDataParallel.__init__).parameters.keys()
