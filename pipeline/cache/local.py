"""Rows of a store on this machine's disks: through memory maps, or by positioned reads where maps are no good."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.cache.layout import RowArray
from pipeline.cache.mapped import MappedShards, NoSpan
from pipeline.cache.positioned import PositionedShards
from pipeline.cache.shards import States
from pipeline.console import log

NETWORK_DISKS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "9p", "juicefs"}
    | {"s3fs", "sshfs", "gcsfuse", "rclone", "weka", "wekafs", "mountpoint-s3", "orangefs", "pvfs2", "quobyte"}
)


class RowSource(Protocol):
    """Where a `Cache` gets rows from. Picklable; may be forked at any time."""

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        """rows (n,) int64, all ok, in any order, with repetitions → (n, ...) as stored; PipeError if damaged."""
        ...

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        """Bring these rows into the page cache. Fails only where reading them would."""
        ...

    def forget(self) -> None:
        """Close everything that is open."""
        ...


class LocalShards:
    """Maps until the system refuses them, then positioned reads.

    Args:
        mapped: try maps at all.
        max_open: shards open at once.
    """

    def __init__(self, root: Path, states: States, *, mapped: bool = True, max_open: int | None = None) -> None:
        self.root, self.states, self.max_open = root, states, max_open
        self.using: MappedShards | PositionedShards = (MappedShards if mapped else PositionedShards)(
            root, states, max_open=max_open
        )

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        try:
            return self.using.gather(array, rows, check)
        except NoSpan as error:
            self._without_maps(error)
        return self.using.gather(array, rows, check)  # here, where the error no longer keeps the maps

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        try:
            self.using.will_need(array, rows)
        except NoSpan as error:
            self._without_maps(error)

    def forget(self) -> None:
        self.using.forget()

    def _without_maps(self, error: NoSpan) -> None:
        log.debug("the cache is read without memory maps: %s", error)
        self.using = PositionedShards(self.root, self.states, max_open=self.max_open)


def on_network_disk(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether `path` lies on a file system that other machines serve; False where the system does not say."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    found, kind = Path("/"), ""
    real = path.resolve()
    for line in lines:
        before, _, after = line.partition(" - ")
        where = Path(before.split()[4].replace("\\040", " "))
        if after and real.is_relative_to(where) and len(where.parts) >= len(found.parts):
            found, kind = where, after.split()[0]
    return kind.removeprefix("fuse.") in NETWORK_DISKS
