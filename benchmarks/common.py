"""What every benchmark shares: a command line, fair timing of several ways to do one thing, a table, a JSON file.

A benchmark's JSON is {"machine": text, "date": YYYY-MM-DD, "command": text, "figures": {name: number}}. Ratios say so
in their name (`…/ratio_of_rate_to_memmap`); the other figures carry their unit.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pipeline.run_folder import write_json

Task = Callable[[int], object]  # takes the round's number


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the two options that all benchmarks have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds: does it work, not how fast")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return found


def parse(
    command: argparse.ArgumentParser, counts: Mapping[str, tuple[int, int, str]]
) -> tuple[argparse.Namespace, list[int]]:
    """Parse the command line of a benchmark that takes whole numbers from 1.

    Args:
        counts: option, without its dashes → its default, the default with --quick, and what it counts.

    Returns:
        the arguments, and the numbers in the order of `counts`.
    """
    for option, (full, quick, what) in counts.items():
        command.add_argument(f"--{option}", type=int, help=f"{what} ({full:,}; quick {quick:,})")
    arguments = command.parse_args()
    numbers = []
    for option, (full, quick, _) in counts.items():
        given: int | None = getattr(arguments, option.replace("-", "_"))
        number = (quick if arguments.quick else full) if given is None else given
        if number < 1:
            command.error(f"--{option} takes whole numbers from 1")
        numbers.append(number)
    return arguments, numbers


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(packages: Sequence[str] = ()) -> str:
    """One line: cores, processor, memory, system, and the versions of what is compared."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{os.cpu_count()} cores" + (f" ({usable} for this process)" if usable != os.cpu_count() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    system = f"{platform.system()} {platform.machine()}"
    return f"{cores} of {_processor()}, {memory:.0f} GiB, {system}; {', '.join(versions)}"


def _processor() -> str:
    """The processor as it calls itself, with what tells models of one name apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or "an unnamed processor"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", "an unnamed processor")
    return f"{name} (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else name


def load() -> float:
    """Processes that wanted to run, on average over the last minute, this one included."""
    return os.getloadavg()[0]


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of one task by round: on the wall, and of all this process's threads on the CPU."""

    wall: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)

    def median(self, clock: str = "wall") -> float:
        return statistics.median(getattr(self, clock).values())

    def ratio(self, other: Timing, clock: str = "wall") -> float:
        """The median over rounds that both ran of own seconds / the other's: what slows a whole round cancels."""
        own, theirs = getattr(self, clock), getattr(other, clock)
        return statistics.median(own[i] / theirs[i] for i in own if i in theirs)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of `values` between which their distribution's median lies with at least `confidence`, whatever its shape.

    n values fall on either side of the median like coins: the k-th smallest lies above it with the probability of
    fewer than k heads in n throws. Too few values for `confidence` (fewer than 6 at 95 %): nothing is known,
    (-inf, inf).
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n / 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - confidence:
        outside, k = outside + math.comb(n, k) / 2**n, k + 1
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)


def interleave(
    tasks: Mapping[str, Task],
    rounds: int,
    at_most: Mapping[str, int] | None = None,
    before: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time `tasks` in turns, so that a change of the machine's load meets all of them alike.

    Each is called once untimed (round 0), then once a round; whoever begins changes from round to round.

    Args:
        at_most: rounds of the tasks that are too slow for all of them.
        before: called before every task, outside the clock.
    """
    for task in tasks.values():
        task(0)
    timings = {name: Timing() for name in tasks}
    names = list(tasks)
    for index in range(1, rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if index > (at_most or {}).get(name, rounds):
                continue
            if before is not None:
                before()
            wall, cpu = time.perf_counter(), time.process_time()
            result = tasks[name](index)
            timings[name].cpu[index] = time.process_time() - cpu
            timings[name].wall[index] = time.perf_counter() - wall
            del result  # freed outside the clock
    return timings


# --- results ----------------------------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned for a terminal too."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]) + " |"

    first, *others = widths
    rule = "| " + " | ".join(["-" * max(3, first), *("-" * (max(3, w) - 1) + ":" for w in others)]) + " |"
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])


def report(
    arguments: argparse.Namespace, described: str, load_before: float, table: str, figures: Mapping[str, float]
) -> None:
    """Print where and how it was measured, and the table; write the JSON file if one is asked for."""
    date = datetime.date.today().isoformat()
    loads = {"load_before": load_before, "load_after": load()}
    command = _command()
    print(
        f"{described}\n{date}, load {load_before:.1f} before and {loads['load_after']:.1f} after, {command}\n\n{table}"
    )
    if arguments.json is not None:
        numbers = {name: float(value) for name, value in {**figures, **loads}.items()}
        write_json(
            arguments.json,
            {"machine": described, "date": date, "command": command, "figures": dict(sorted(numbers.items()))},
        )


def _command() -> str:
    """The command that gives these figures again: without where the file of figures went."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


if __name__ == "__main__":  # `make bench` runs every file of this folder; this one compares nothing
    print(machine(("numpy", "torch", "zarr", "tensorstore")))
