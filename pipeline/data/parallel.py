"""Independent pieces of reading, spread over threads or processes by Dask. The order of results never depends on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import dask
from dask.callbacks import Callback

Item = TypeVar("Item")
Result = TypeVar("Result")
Scheduler = Literal["auto", "threads", "processes"]
MOST_THREADS = 4  # decoding releases Python's lock, the rest does not: beyond about four, processes are faster


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int | Literal["auto"] = "auto",
    scheduler: Scheduler = "auto",
    on_done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """`[function(item) for item in items]`, several at a time.

    Args:
        function, items: picklable, where processes are used.
        workers: 0 and 1 run in the calling thread; auto takes one per core.
        scheduler: auto takes threads for few workers, processes for many.
        on_done: called with each result as it comes, in the calling thread.
    """
    count = min(usable_cores() if workers == "auto" else workers, len(items))
    if count <= 1:
        chosen = "synchronous"
    elif scheduler == "auto":
        chosen = "threads" if count <= MOST_THREADS else "processes"
    else:
        chosen = scheduler
    # Not dask's own hash of function and item: that would read all of the items, and merge equal ones.
    tasks = [dask.delayed(function)(item, dask_key_name=f"item-{n}") for n, item in enumerate(items)]

    def done(key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
        on_done(result)

    options: dict[str, Any] = {} if chosen == "synchronous" else {"num_workers": count}
    if chosen == "processes":
        options["chunksize"] = 1  # a piece is a whole tar: worth its own message
    with Callback(posttask=done):
        found = dask.compute(*tasks, scheduler=chosen, optimize_graph=False, **options)
    return list(found)
