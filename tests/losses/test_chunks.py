"""GradCache: rows encoded a few at a time give the loss, the logs and the gradients of the whole batch, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_objective_on_model as real
import torch
from test_distributed import METHODS
from tiny_model import batch, extras, objective
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.losses.chunks import has_batch_norm, in_chunks
from pipeline.losses.objective import Objective
from pipeline.training.gradients import term_norms

PAIRS, ROWS = 8, 3  # chunks of 3, 3 and 2
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "alip": {"contrastive": "alip"},
    "slip": {"simclr": 0.5, "simclr_hidden": 5, "simclr_dim": 3, "order": 0},
    "no-pyramid": {"parts": {"pyramid": False}},
    "no-attention": {"parts": {"attention": False}},
    "no-refiner": {"parts": {"refiner": False}},
    "frozen": {"order": 1},
    "frozen, transitions alone": {"student": False, "order": 2},
    "image-only": {"parts": {"text_side": False}},
    "no-gate": {"parts": {"gate": False}, "gate_l1": 0.0, "conflict": 0.0},
}


def found(
    tested: Objective, inputs: dict[str, Any], rows: int | None, *, measured: bool = True
) -> dict[str, dict[str, torch.Tensor]]:
    """One step."""
    tested.micro_batch_size, tested.log_details, tested.keep_terms = rows, True, measured
    loss, logs = tested(**inputs, progress=0.5)
    terms = term_norms(tested.terms, [p for p in tested.parameters() if p.requires_grad])
    learning = {name: p for name, p in tested.named_parameters() if p.requires_grad}
    arrivals = dict.fromkeys(learning, 0)
    for name, parameter in learning.items():
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: arrivals.update({n: arrivals[n] + 1}))
    loss.backward()
    assert set(arrivals.values()) == {1}  # what DDP waits for
    gradients = {name: p.grad for name, p in learning.items()}
    return {"logs": logs, "terms": terms, "gradients": gradients, "buffers": dict(tested.named_buffers())}


def assert_same(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    for kind, values in theirs.items():
        assert ours[kind].keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(ours[kind][name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradients_of_the_whole_batch(method: str) -> None:
    images, tokens, stored = batch(PAIRS)
    targets = stored if METHODS[method].get("student", True) else None
    inputs = {"images": images, "tokens": tokens, "targets": targets, **extras(PAIRS)}
    assert_same(*(found(objective(**METHODS[method]), inputs, rows) for rows in (ROWS, None)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_fusion_of_the_real_model_has_them_too(variant: str) -> None:
    images, tokens, targets = real.batch(PAIRS)
    inputs = {"images": images.double(), "tokens": tokens, "second_tokens": tokens.roll(1, 0)}
    inputs["targets"] = targets if VARIANTS[variant].get("student", True) else None
    inputs["augmented"] = torch.stack([images.flip(3), images.flip(2)], 1).double()
    both = []
    for rows in (ROWS, None):
        tested = real.make(**VARIANTS[variant]).double()
        if variant.startswith("frozen"):
            tested.model.trunk.freeze()
        with torch.no_grad():
            for name, parameter in tested.named_parameters():
                if name.endswith(("gamma", "betas")):
                    parameter.fill_(0.3)  # every path carries gradient
        both.append(found(tested, inputs, rows, measured=variant.startswith("frozen")))
    assert_same(*both)
    assert all(float(g.abs().max()) > 0 for name, g in both[0]["gradients"].items() if name.endswith("gamma"))


def test_as_many_rows_as_asked_and_the_ordinary_way_where_all_fit() -> None:
    sizes: list[int] = []
    encode = nn.Linear(2, 2)

    def counted(x: torch.Tensor) -> dict[str, Any]:
        sizes.append(len(x))
        return {"y": encode(x), "scale": encode.weight.sum(), "none": None}

    x = torch.randn(7, 2)
    out = in_chunks(counted, (x,), 3, inside=encode)
    assert sizes == [3, 2, 2]
    out["y"].sum().backward()
    assert sorted(sizes) == [2, 2, 2, 2, 3, 3]
    torch.testing.assert_close(out["y"], encode(x))
    assert out["scale"].shape == ()
    assert out["none"] is None
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(counted, (x,), 3, inside=encode)["y"], encode(x))
    sizes.clear()
    assert in_chunks(counted, (x,), 7, inside=encode)["y"].grad_fn.name() == "AddmmBackward0"
    assert sizes == [7]


@pytest.mark.parametrize("inner", [nn.Dropout(0.5), nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
def test_the_second_pass_repeats_the_first(inner: nn.Module) -> None:
    """Its masks, and its batch statistics, which enter the running ones once."""
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for chunked in (True, False):
        torch.manual_seed(0)
        tested = nn.Sequential(nn.Linear(5, 4), copy.deepcopy(inner), nn.Tanh(), nn.Linear(4, 2)).double()
        if chunked:
            y = in_chunks(tested, (x,), 3, inside=tested)
        else:
            y = torch.cat([tested(part) for part in x.tensor_split(3)])  # chunk after chunk in one graph
        (y * torch.arange(16.0).view(8, 2).double().sin()).sum().backward()
        results.append(
            {
                "gradients": {name: p.grad for name, p in tested.named_parameters()},
                "buffers": dict(tested.named_buffers()),
                "random": {"next": torch.rand(2)},  # goes on as if there were no second pass
            }
        )
    assert_same(*results)
    assert has_batch_norm(tested) == isinstance(inner, nn.BatchNorm1d)


class Watched(nn.Module):
    """x², whose saved input is counted while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[StorageWeakRef] = []
        self.most = 0

    @property
    def alive(self) -> int:
        return sum(not saved.expired() for saved in self.saved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        saved = 1.0 * x
        self.saved.append(StorageWeakRef(saved.untyped_storage()))
        self.most = max(self.most, self.alive)
        return saved * saved


def test_one_chunks_activations_are_alive_at_a_time() -> None:
    """None behind the forward, one chunk's in every backward: of single terms too, which need a part of them."""
    images, tokens, stored = batch(PAIRS)
    tested, watched = objective(3), Watched()
    head = tested.model.image_head
    tested.model.image_head = nn.Sequential(head, watched)
    loss, _ = tested(images, tokens, stored, 0.5)
    assert watched.alive == 1
    tested.keep_terms, tested.micro_batch_size = True, 2
    del loss
    loss, _ = tested(images, tokens, stored, 0.5)
    assert (watched.alive, watched.most) == (0, 1)
    terms = len(term_norms(tested.terms, list(tested.parameters())))
    tested.terms = {}
    loss.backward()
    assert watched.most == 1
    assert len(watched.saved) == 1 + 4 * (1 + terms + 1)  # forward, every term's backward, the step's
