"""`pipe init`: write a config that holds a preset and the user's data source, ready to be read and changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.config import configs_folder, load_config, merge, parse_set, put, shipped
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import write_bytes


def run(data: str, *, preset: str, sets: Sequence[str], out: Path) -> None:
    """Write `out`; an existing file is never replaced.

    Raises:
        PipeError: `out` exists, the preset is unknown, or a --set does not fit.
    """
    if out.exists():
        raise PipeError("this file exists already", where=out, fix="remove it or choose another with --out")
    explicit: dict[str, object] = {}
    for item in sets:
        put(explicit, *parse_set(item))
    source = data if "://" in data else str(Path(data).expanduser().absolute())
    own = merge({"workspace": "./workspace", "data": {"source": source}}, explicit, whole=False)
    load_config(
        None, preset=preset, sets=[f"data.source={yaml.safe_dump(source)}", *sets]
    )  # refuse now, not at the first use
    body = merge(shipped("", preset), own, whole=False)
    ordered = {
        key: body[key] for key in ["workspace", "data", *sorted(set(body) - {"workspace", "data"}, key=_section_order)]
    }
    comment = _leading_comment((configs_folder() / f"{preset}.yaml").read_text(encoding="utf-8"))
    header = f"# Written by `pipe init --preset {preset}`. Paths are relative to this file's folder.\n{comment}"
    write_bytes(out, (header + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)).encode())
    log.info("wrote %s; next: pipe index", out)


def _section_order(section: str) -> int:
    order = ["teacher", "model", "train", "loss", "evaluate"]
    return order.index(section) if section in order else len(order)


def _leading_comment(text: str) -> str:
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            break
        lines.append(line)
    return "".join(lines)
