"""Two and four gloo processes against one: the same loss and the same gradients, in float64, for every method.

Their rows all at once, and a few at a time (GradCache).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.distributed import all_gather_sizes, barrier, gather_with_grad, mean_over_ranks, rank, world_size
from pipeline.training.gradients import term_norms

sys.path.insert(0, str(Path(__file__).parent / "losses"))

# Methods as their presets define them, and every order with everything else in the objective.
RANKCLIP = {"positions": "uniform", "include_self": True}
METHODS: dict[str, dict[str, Any]] = {
    "clip": {"order": 0, "student": False},
    "cyclip": {"order": 0, "student": False, "cyclic_in_modal": 0.25, "cyclic_cross": 0.25},
    "alip": {"order": 0, "student": False, "contrastive": "alip"},
    "slip": {"order": 0, "student": False, "simclr": 1.0, "simclr_hidden": 5, "simclr_dim": 3},
    "rankclip": {"order": 1, "student": False, **RANKCLIP},
    **{f"order {order}": {"order": order, "depth": 5, "conflict": 3.0} for order in range(5)},
    "kd and crd": {"order": 0, "kd": 0.5, "crd": 0.7},
    "everything": {"order": 3, "contrastive": "alip", "cyclic_cross": 0.5, "simclr": 0.3, "simclr_hidden": 5},
}
PAIRS = 8
SPLITS = {2: ((4, 4), (5, 3)), 4: ((3, 1, 2, 2),)}
AT_ONCE = (None, 2)
CASES = [
    (world, split, method, rows)
    for world, splits in SPLITS.items()
    for split in splits
    for method in METHODS
    for rows in AT_ONCE
]


def run_case(method: str, rows: slice, at_once: int | None = None) -> dict[str, Any]:
    """Loss, logs, gradients and buffers of one step on `rows` of the batch, the second for statistics that add up."""
    from tiny_model import batch, extras, objective

    images, tokens, stored = batch(PAIRS)
    tested = objective(**METHODS[method])
    stored = {key: value[rows] for key, value in stored.items()} if tested.model.has_student else None
    more = {key: value[rows] for key, value in extras(PAIRS).items()}
    tested.log_details = tested.keep_terms = True
    tested.micro_batch_size = at_once
    tested(images[rows].flip(3), tokens[rows], stored, 0.5, **more)
    loss, logs = tested(images[rows], tokens[rows], stored, 0.5, **more)
    terms = term_norms(tested.terms, list(tested.parameters()))
    loss.backward()
    # What DDP does; importing it costs seconds.
    flat = mean_over_ranks(nn.utils.parameters_to_vector([p.grad for p in tested.parameters()]))
    nn.utils.vector_to_parameters(flat, [p.grad for p in tested.parameters()])
    return {
        "loss": mean_over_ranks(loss),
        "logs": {key: value for key, value in logs.items() if not key.startswith("kendall_tau")},  # samples own rows
        "terms": terms,
        "gradients": {name: p.grad for name, p in tested.named_parameters()},
        "buffers": dict(tested.named_buffers()),
    }


def run_validation(rows: slice) -> dict[str, float]:
    """What validation finds of `rows` of two batches, of a model that injects; every image has two captions."""
    from tiny_model import batch, objective

    from pipeline.training.data import Batch
    from pipeline.training.validation import validate
    from pipeline.training.validation_pairs import Captions

    tested, batches, words = objective(order=1), [], []
    for seed in (0, 1):
        images, tokens, stored = batch(PAIRS, seed=seed)
        numbers = torch.arange(PAIRS * seed, PAIRS * (seed + 1))
        words.append(tokens)
        batches.append(Batch(0, 0, numbers[rows], images[rows], tokens[rows], {k: v[rows] for k, v in stored.items()}))
    every = np.arange(2 * PAIRS)
    captions = Captions.of(
        every,
        [str(n) for n in every],
        lambda n: [str(n), str((n + 1) % len(every))],
        lambda texts: torch.cat(words)[[int(text) for text in texts]],
    )
    return validate(tested, tested.model, batches, torch.device("cpu"), captions=captions, even=2)


def as_one_of(number: int, world: int) -> dict[str, Any]:
    """This process's part; see gloo_processes."""
    found: dict[str, Any] = {"place": (rank(), world_size()), "sizes": all_gather_sizes(3 + number)}
    found["mean"] = mean_over_ranks(torch.tensor([1.0, 2.0]) * (number + 1))
    x = torch.arange(2.0 * (2 + number)).reshape(-1, 2).add(100 * number).requires_grad_()
    gathered = gather_with_grad(x)
    weights = torch.arange(float(gathered.numel())).reshape(gathered.shape) * (number + 1)
    (gathered * weights).sum().backward()
    found["gathered"], found["gradient"] = gathered.detach(), x.grad
    for split in SPLITS[world]:
        first = sum(split[:number])
        for method in METHODS:
            for at_once in AT_ONCE:
                own = slice(first, first + split[number])
                found[f"{method} {split} {at_once}"] = run_case(method, own, at_once)
        found[f"validation {split}"] = run_validation(slice(first, first + split[number]))
    barrier()
    return found


@pytest.fixture(scope="module")
def worlds(gloo: Any) -> dict[int, list[dict[str, Any]]]:
    """Number of processes → what each of them found."""
    found: dict[int, list[dict[str, Any]]] = gloo["test_distributed"]
    return found


@pytest.fixture(scope="module")
def processes(worlds: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return worlds[2]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {method: run_case(method, slice(None)) for method in METHODS}


def test_a_single_process_gathers_itself() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x
    assert (rank(), world_size(), all_gather_sizes(3)) == (0, 1, [3])
    barrier()


def test_ranks_sizes_and_means(processes: list[dict[str, Any]]) -> None:
    assert [p["place"] for p in processes] == [(0, 2), (1, 2)]
    assert all(p["sizes"] == [3, 4] for p in processes)
    for p in processes:
        torch.testing.assert_close(p["mean"], torch.tensor([1.5, 3.0]))


def test_gather_drops_its_padding_and_sums_gradients_over_ranks(processes: list[dict[str, Any]]) -> None:
    expected = torch.tensor([[0, 1], [2, 3], [100, 101], [102, 103], [104, 105]], dtype=torch.float32)
    gradient = 3 * torch.arange(10.0).reshape(5, 2)  # weights of rank 0 plus twice the same on rank 1
    for p, rows in zip(processes, (slice(0, 2), slice(2, 5)), strict=True):
        torch.testing.assert_close(p["gathered"], expected)
        torch.testing.assert_close(p["gradient"], gradient[rows])


@pytest.mark.parametrize(("world", "split", "method", "at_once"), CASES)
def test_several_processes_equal_one(
    world: int,
    split: tuple[int, ...],
    method: str,
    at_once: int | None,
    worlds: dict[int, list[dict[str, Any]]],
    alone: dict[str, dict[str, Any]],
) -> None:
    whole = alone[method]
    if METHODS[method]["order"] >= 2:
        assert whole["gradients"]["transitions.image.key.weight"].abs().max() > 1e-6
    assert whole["terms"].keys() >= {"contrastive"}
    for process in worlds[world]:
        part = process[f"{method} {split} {at_once}"]
        torch.testing.assert_close(part["loss"], whole["loss"], rtol=1e-12, atol=1e-12)
        for kind in ("gradients", "buffers", "terms", "logs"):
            assert part[kind].keys() == whole[kind].keys()
            for name, value in part[kind].items():
                torch.testing.assert_close(
                    value, whole[kind][name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_transition_heads_of_every_order_learn(alone: dict[str, dict[str, Any]]) -> None:
    for order in (2, 3, 4):
        gradients = alone[f"order {order}"]["gradients"]
        heads = {name: g for name, g in gradients.items() if name.startswith("transitions.")}
        assert len(heads) == 2 * (1 + (order - 1) + 3 * (order - 2) + 1)
        assert min(float(g.abs().max()) for g in heads.values()) > 1e-9


def test_validation_of_several_processes_equals_that_of_one(worlds: dict[int, list[dict[str, Any]]]) -> None:
    whole = run_validation(slice(None))
    for world, splits in SPLITS.items():
        for process in worlds[world]:
            for split in splits:
                found = process[f"validation {split}"]
                assert found.keys() == whole.keys()
                for name in ("drift/slope", "drift/change", "drift/remainder", "i2t_r1", "t2i_r1_trunk", "info_nce"):
                    assert found[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-11), name
                assert found["drift/finite_difference"] == pytest.approx(whole["drift/finite_difference"], rel=1e-7)
