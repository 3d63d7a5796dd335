"""Which trained model a command is about: a run's name in the workspace, or the path of a folder that holds one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipeError
from pipeline.run_folder import REFERENCE_ROWS, RunFolder, Workspace, read_json

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class Found:
    """A finished run, or an exported model. `workspace`: where it was found by name, None for a path."""

    folder: RunFolder
    workspace: Workspace | None = None

    @property
    def record(self) -> dict[str, Any]:
        """record.json, {} where there is none."""
        return read_json(self.folder.record) if self.folder.record.exists() else {}

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.folder.name)


def is_path(run: str) -> bool:
    """`./clip`, `runs/clip`, `~/clip` are paths; `clip` is the name of a run."""
    return os.sep in run or "/" in run or run in {".", ".."} or run.startswith("~")


def find_model(run: str, config: Config | None) -> Found:
    """The model called `run`.

    Args:
        config: whose workspace holds the run; None where a path is given, or no config is at hand.

    Raises:
        PipeError: there is none, or it is not finished.
    """
    if is_path(run) or (config is None and Path(run).is_dir()):
        return Found(finished_at(Path(run).expanduser()))
    if config is None:
        raise PipeError(
            f"no config says in which workspace run {run!r} is",
            where="pipe.yaml",
            fix="name it with --config, or give the run's path: ./FOLDER",
        )
    workspace = Workspace(config.workspace)
    return Found(choose_runs(workspace, [run])[0], workspace)


def choose_runs(workspace: Workspace, names: Sequence[str]) -> list[RunFolder]:
    """The runs named, by name or path, or all finished ones of the workspace.

    What is wrong with a name is said with what would be right.
    """
    finished = [folder for folder in workspace.all_runs() if folder.finished]
    if not names:
        if not finished:
            raise PipeError("no finished run", where=workspace.runs, fix="train one: pipe train")
        return finished
    known = [folder.name for folder in finished]
    chosen = [
        finished_at(Path(name).expanduser()) if is_path(name) else _named(workspace, name, known)
        for name in dict.fromkeys(names)
    ]
    called: dict[str, Path] = {}
    for folder in chosen:  # tables and records know a run by its name alone
        other = called.setdefault(folder.name, folder.path)
        if folder.name in REFERENCE_ROWS or other != folder.path:
            where = f"{folder.path}" if other == folder.path else f"{other} and {folder.path}"
            raise PipeError(f"another row of the tables is called {folder.name}", where=where, fix="rename the folder")
    return chosen


def _named(workspace: Workspace, name: str, known: Sequence[str]) -> RunFolder:
    folder = workspace.run(name)
    if folder.path.is_dir() and not folder.finished:
        raise PipeError(f"run {name} is not finished", where=folder.path, fix="pipe train --resume with its name")
    if not folder.path.is_dir():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        fix = f"the nearest is {near[0]}; there are {', '.join(known)}" if near else "train one: pipe train"
        raise PipeError(f"no run {name!r}", where=workspace.runs, fix=fix)
    return folder


def finished_at(path: Path) -> RunFolder:
    """The folder at `path`, which holds a run that is finished, or an exported model."""
    path = path.absolute()
    folder = RunFolder(path)
    if not path.is_dir():
        raise PipeError("there is no such folder", where=path, fix="name a run's folder, or an exported model's")
    if folder.record.exists() and not folder.finished:
        raise PipeError(f"run {folder.name} is not finished", where=path, fix="pipe train --resume with its name")
    if not folder.weights.exists():
        other = (
            "; an open_clip checkpoint is loaded with open_clip" if (path / "open_clip_config.json").exists() else ""
        )
        raise PipeError(f"this folder holds no trained model{other}", where=path, fix="name a run's or an export's")
    return folder
