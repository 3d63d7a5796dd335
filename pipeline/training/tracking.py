"""What a run writes while it trains: metrics.jsonl (the record) and TensorBoard (the same figures, to look at)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.run_folder import RunFolder, write_bytes


class Tracker:
    """Appends one JSON object a line. Non-finite values are written as null: JSON has no NaN.

    Only the main process tracks; elsewhere construct it with `folder=None` and every call does nothing.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self._file: Any = None
        self._board: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.path.mkdir(parents=True, exist_ok=True)
            self._file = folder.metrics.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder.tensorboard))

    def write(self, *, step: int, samples: int, epoch: float, seconds: float, values: dict[str, float]) -> None:
        """One line; `values` keys carry their own prefix (train/, val/)."""
        if self.folder is None:
            return
        line: dict[str, Any] = {"step": step, "samples": samples, "epoch": round(epoch, 4), "time": round(seconds, 3)}
        line |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def cut_back(path: Path, *, to_step: int) -> None:
    """Drop lines beyond `to_step`, so that a resumed run's metrics have no step twice."""
    kept = [line for line in read_metrics(path) if line["step"] <= to_step]
    if path.exists():
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
