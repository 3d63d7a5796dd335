"""Two gloo processes against one: the same loss and the same gradients, in float64."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.distributed import all_gather_sizes, barrier, gather_with_grad, mean_over_ranks, rank, world_size

sys.path.insert(0, str(Path(__file__).parent / "losses"))  # the spawned processes import this file alone

CASES = [(order, split) for order in (0, 1, 3) for split in ((4, 4), (5, 3))]


def run_case(order: int, rows: slice) -> tuple[Any, dict[str, Any]]:
    """An objective with everything in it, and this process's part of one batch of 8."""
    from tiny_model import batch, objective

    images, tokens, stored = batch(8)
    own = images[rows], tokens[rows], {key: value[rows] for key, value in stored.items()}
    tested = objective(order, positions="head_tail", conflict=3.0)
    tested.log_details = True
    return tested, {"batch": own}


def as_process(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/meet", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2, timeout=patience)
    try:
        found = everything(number)
    finally:
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{number}.pt")


def everything(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"place": (rank(), world_size()), "sizes": all_gather_sizes(3 + number)}
    found["mean"] = mean_over_ranks(torch.tensor([1.0, 2.0]) * (number + 1))
    x = torch.arange(2.0 * (2 + number)).reshape(-1, 2).add(100 * number).requires_grad_()
    gathered = gather_with_grad(x)
    weights = torch.arange(float(gathered.numel())).reshape(gathered.shape) * (number + 1)
    (gathered * weights).sum().backward()
    found["gathered"], found["gradient"] = gathered.detach(), x.grad
    for order, split in CASES:
        first = sum(split[:number])
        tested, given = run_case(order, slice(first, first + split[number]))
        loss, logs = tested(*given["batch"], 0.5)
        loss.backward()
        for parameter in tested.parameters():  # what DDP does; importing it costs seconds
            parameter.grad = mean_over_ranks(parameter.grad)
        found[f"{order} {split}"] = {
            "loss": mean_over_ranks(loss),
            "logs": logs,
            "gradients": {name: p.grad for name, p in tested.named_parameters()},
        }
    barrier()
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    # This process is rank 0: one import of torch less than with two children.
    other = mp.get_context("spawn").Process(target=as_process, args=(1, str(folder)))
    other.start()
    try:
        as_process(0, str(folder))
    finally:
        other.join(timeout=60)
        other.kill()
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


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


@pytest.mark.parametrize(("order", "split"), CASES)
def test_two_processes_equal_one(order: int, split: tuple[int, int], processes: list[dict[str, Any]]) -> None:
    tested, given = run_case(order, slice(None))
    loss, logs = tested(*given["batch"], 0.5)
    loss.backward()
    whole = {name: p.grad for name, p in tested.named_parameters()}
    assert order < 2 or whole["transitions.image.key.weight"].abs().max() > 1e-6
    for p in processes:
        part = p[f"{order} {split}"]
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
        assert part["gradients"].keys() == whole.keys()
        for name, gradient in part["gradients"].items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        for key in logs:
            if not key.startswith("kendall_tau"):  # each process samples rows of its own
                torch.testing.assert_close(part["logs"][key], logs[key], rtol=1e-9, atol=1e-12)
