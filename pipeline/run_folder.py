"""Where things lie: the workspace, a run's folder, and the atomic writes that both are made with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.console import log
from pipeline.errors import PipeError

REFERENCE_ROWS = ("chance", "teacher")  # the result tables' own rows; pipeline.evaluation.records names them


@dataclass(frozen=True)
class RunFolder:
    """One trained model's folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """Rows that could not be read while it trained, one JSON object a line."""
        return self.path / "skipped.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        if not (self.weights.exists() and self.record.exists()):
            return False
        try:
            record = read_json(self.record)
        except PipeError as error:
            log.warning("run %s is left out: %s", self.name, error)
            return False
        if not isinstance(record, dict):
            log.warning("run %s is left out: its record.json holds no record", self.name)
            return False
        return bool(record.get("finished"))


@dataclass(frozen=True)
class Workspace:
    """The folder all commands share."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.parquet"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher.zarr"

    @property
    def captions(self) -> Path:
        """Synthetic captions (`pipe caption`)."""
        return self.root / "captions.parquet"

    @property
    def caption_parts(self) -> Path:
        """What `pipe caption` has made so far, while it is not finished."""
        return self.root / "captions.parts"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def embeddings(self) -> Path:
        return self.root / "embeddings"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def run(self, name: str) -> RunFolder:
        """The folder of run `name`; a name is one path component, so that it cannot leave the workspace."""
        if not name or name in {".", ".."} or any(c in name for c in '/\\:*?"<>|\0'):
            raise PipeError(
                "this run name cannot be a folder name", where=repr(name), fix="use letters, digits, - and _"
            )
        if name in REFERENCE_ROWS:
            raise PipeError("tables have a reference row of that name", where=repr(name), fix="name the run otherwise")
        return RunFolder(self.runs / name)

    def all_runs(self) -> list[RunFolder]:
        """Run folders that hold a record, by name."""
        if not self.runs.is_dir():
            return []
        return [RunFolder(p) for p in sorted(self.runs.iterdir()) if (p / "record.json").exists()]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. A reader of `path` sees the old file or the whole new one, also after a power cut.

    Raises:
        PipeError: the disk refuses; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise PipeError(
            f"cannot write: {error.strerror or error}", where=path, fix="free some space or fix the permissions"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Atomic, sorted, human-readable JSON; NaN is refused because no other reader accepts it."""
    write_bytes(
        path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def read_json(path: Path) -> Any:
    """Parse `path`; a missing or broken file is one clear line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PipeError("no such file", where=path) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PipeError(f"not valid JSON ({error})", where=path) from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout (`0.1.0+1a2b3c4` or `…-dirty`).

    Asked once a process: a long run must name the code it was started with, whatever is committed meanwhile.
    """
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return __version__
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found}"
