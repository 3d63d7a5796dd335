"""Files of a store: written whole or not at all, and read with errors that say which file."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cache import layout
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder


def publish(root: Path, file: Path, *parts: Any) -> None:
    """Write `parts` one after the other to `file` below `root`, so that it is there whole or not at all.

    Raises:
        PipeError: the disk refuses; nothing is left behind.
    """
    temporary = root / layout.TEMPORARY / uuid.uuid4().hex
    try:
        temporary.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as handle:
            for part in parts:
                handle.write(part)
            handle.flush()
            os.fsync(handle.fileno())
        _make_folders(root, file.parent)
        os.replace(temporary, file)
        sync_folder(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise PipeError(
            f"cannot write the cache: {error.strerror or error}",
            where=file,
            fix="free some space or fix the permissions, then run the same command",
        ) from error


def _make_folders(root: Path, folder: Path) -> None:
    """Create `folder` below `root`, each new level made durable in the one above it."""
    if folder == root or folder.is_dir():
        return
    _make_folders(root, folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _guarded(read: Callable[[Path], Any], file: Path) -> Any:
    try:
        return read(file)
    except OSError as error:
        raise PipeError(f"cannot read the cache: {error.strerror}", where=file) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PipeError("this file is damaged (not valid JSON)", where=file) from error


def read_bytes(file: Path) -> bytes:
    """A file's bytes; whatever is wrong with it is one clear line."""
    data: bytes = _guarded(Path.read_bytes, file)
    return data


def read_json(file: Path) -> Any:
    """A file's JSON; whatever is wrong with it is one clear line."""
    return _guarded(lambda f: json.loads(f.read_text(encoding="utf-8")), file)
