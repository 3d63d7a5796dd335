"""Which shards a process writes, when several write one cache: every count-th, from its own number on.

Shards are dealt out like cards, by their number alone: a process needs to know nothing of the others, may start at any
time, on any machine that sees the store, and a later run may be cut into another number of parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import PipeError


@dataclass(frozen=True)
class Part:
    """Part `index` (from 0) of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise PipeError(
                f"there is no part {self.index + 1} of {self.count}", where="--part", fix="use 1/8, 2/8 ... 8/8"
            )

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.count}"

    @property
    def whole(self) -> bool:
        return self.count == 1

    def shards(self, total: int) -> range:
        """Numbers of its shards, of `total`."""
        return range(self.index, total, self.count)

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8`: the third of eight."""
        number, slash, count = text.partition("/")
        if not (slash and number.strip().isdigit() and count.strip().isdigit()):
            raise PipeError(
                f"{text!r} is no part", where="--part", fix="use NUMBER/COUNT, e.g. 3/8: the third of eight"
            )
        return cls(int(number) - 1, int(count))

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> tuple[Part, str]:
        """The part that a launcher gives this process, and what said so ("" where none did).

        torchrun and accelerate launch: RANK of WORLD_SIZE. Slurm: the tasks of an `srun` step, times those of an
        array. SLURM_NTASKS does not count: it stands in a batch script too, where one process has to do it all.
        """

        def number(name: str, otherwise: int) -> int:
            value = environ.get(name, "")
            return int(value) if value.isdigit() else otherwise

        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls(number("RANK", 0), number("WORLD_SIZE", 1)), "RANK, WORLD_SIZE"
        tasks, task = number("SLURM_STEP_NUM_TASKS", 1), number("SLURM_PROCID", 0)
        jobs, job = number("SLURM_ARRAY_TASK_COUNT", 1), 0
        if jobs > 1:
            first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
            job = (number("SLURM_ARRAY_TASK_ID", first) - first) // max(step, 1)
        said = [name for name, count in (("SLURM_STEP_NUM_TASKS", tasks), ("SLURM_ARRAY_TASK_ID", jobs)) if count > 1]
        return cls(job * tasks + task, jobs * tasks), ", ".join(said)
