"""What a step asks of the machine."""

from __future__ import annotations

import pytest
import torch

from pipeline.training import machine


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_generators_are_seeded_as_torch_itself_seeds_them(kind):
    torch.manual_seed(11)
    want = torch.rand(5)
    torch.rand(3)
    machine.seed_generators(11, torch.device(kind))
    assert torch.equal(torch.rand(5), want)
