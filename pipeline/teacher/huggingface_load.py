"""What loading any model of the transformers library needs: its folder from the hub, silence, and keys that fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.teacher.huggingface_folder import CONFIG, PREFIX, is_path
from pipeline.teacher.weights import WeightsUnavailable, misfits


def download(name: str, wanted: Sequence[str], where: str) -> Path:
    """The repository `name` as a local folder, downloaded unless the hub's own cache has it.

    Args:
        wanted: patterns of the files that are needed; none in folders below.
        where: the configuration's key and value, for messages.

    Raises:
        WeightsUnavailable: there is no such folder, or no such repository that can be reached.
    """
    if is_path(name):
        raise WeightsUnavailable("there is no such folder", where=where, fix="correct the path")
    from huggingface_hub import snapshot_download

    log.info("looking for %s on the hub (downloaded on first use)", name)
    try:
        return Path(snapshot_download(name.removeprefix(PREFIX), allow_patterns=list(wanted), ignore_patterns="*/*"))
    except Exception as error:  # of the hub's library, of its HTTP library, of the system: they share no base
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise WeightsUnavailable(
            f"cannot get this model from the hub ({reason})",
            where=where,
            fix="fetch its folder where there is a network (gated models: accept their licence and log in first) and "
            "name it hf:./FOLDER",
        ) from error


def kept(name: str, file: str) -> Path | None:
    """The folder in the hub's own cache that holds `file` of the repository `name`; None without. No network."""
    from huggingface_hub import try_to_load_from_cache

    found = None if is_path(name) else try_to_load_from_cache(name.removeprefix(PREFIX), file)
    return Path(found).parent if isinstance(found, str) else None


def model_type(folder: Path) -> str:
    """What config.json says the model is; PipeError where it says nothing."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PipeError(
            f"this folder holds no model of the transformers library ({CONFIG}: {type(error).__name__})",
            where=folder,
            fix="name a folder that save_pretrained wrote, or one downloaded from the hub",
        ) from error


def refuse_misfits(folder: Path, network: str, info: Mapping[str, Any]) -> None:
    """`info`: what the library reports of the keys it loaded. It fills gaps with random numbers; we do not.

    Raises:
        PipeError: keys are missing, unexpected or of another shape; the first are named.
    """
    differences = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": info["mismatched_keys"],
    }
    if listed := misfits(differences):
        raise PipeError(
            f"the weights do not fit {network} ({listed})",
            where=folder,
            fix="use the config.json that belongs to these weights",
        )


def short(error: Exception) -> str:
    """An error of a library in a few words, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own bars and reports: what matters of them becomes an error of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as reports

    level, bars, hub_bars = reports.get_verbosity(), reports.is_progress_bar_enabled(), are_progress_bars_disabled()
    reports.set_verbosity(logging.CRITICAL)
    reports.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
        if not hub_bars:
            enable_progress_bars()
