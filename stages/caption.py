"""`pipe caption`: a captioning model writes one synthetic caption of each manifest row's image."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pipeline.captioning.caption import Captioning, caption
from pipeline.captioning.captioner import Captioner, CaptionSettings
from pipeline.config import Config
from pipeline.console import log
from pipeline.data.manifest import read_manifest
from pipeline.data.synthetic_captions import ABSENT, OK
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace


def run(config: Config, *, overwrite: bool = False, limit: int | None = None, as_json: bool = False) -> None:
    """Write workspace/captions.parquet, or go on with it, and print what is in it.

    Args:
        overwrite: throw captions of another captioner, prompt or manifest away.
        limit: only the first rows.

    Raises:
        PipeError: no manifest, no captioner, or captions of another one.
        Stopped: a signal arrived; the same command goes on.
    """
    workspace, asked = Workspace(config.workspace), config.caption
    if asked.model is None:
        raise PipeError(
            "no captioner is named", where="caption.model", fix="give --model FOLDER or a repository of the hub"
        )
    manifest = read_manifest(workspace.manifest)
    log.info("manifest: %d rows, %d of them usable", len(manifest), len(manifest.rows()))
    settings = CaptionSettings(
        prompt=asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        num_beams=asked.num_beams,
        precision=asked.precision,
        batch_size=asked.batch_size,
    )
    done = caption(
        manifest,
        Captioner(asked.model, settings),
        workspace.captions,
        workspace.caption_parts,
        split=asked.split,
        limit=limit,
        overwrite=overwrite,
        workers=config.data.workers,
    )
    figures = _figures(done)
    _warn(figures["rows"])
    print(json.dumps(figures, ensure_ascii=False, indent=2) if as_json else "\n".join(_report(figures)))


def _figures(done: Captioning) -> dict[str, Any]:
    captions = done.captions
    return {
        "path": str(captions.path),
        "rows": captions.counts(),
        "captioned_now": done.rows,
        "rows_per_second": done.rows / max(done.seconds, 1e-9),
        "captioner": asdict(captions.identity),
    }


def _warn(counts: dict[str, int]) -> None:
    without = {status: number for status, number in sorted(counts.items()) if status not in (OK, ABSENT)}
    if without:
        listed = ", ".join(f"{number:,} {status}" for status, number in without.items())
        log.warning("%s rows got no caption: %s", f"{sum(without.values()):,}", listed)


def _report(figures: dict[str, Any]) -> list[str]:
    who = figures["captioner"]
    listed = [f"{number:,} {status}" for status, number in sorted(figures["rows"].items())]
    how = ", ".join(f"{key} {value}" for key, value in who["generation"].items())
    lines = [
        f"captions   {figures['path']}",
        f"rows       {', '.join(listed)}",
        f"captioner  {who['name']} ({who['architecture']}, {who['precision']}, files {who['files_sha256'][:12]}…)",
        f"prompt     {who['prompt'] or 'none'}",
        f"how        {how}",
    ]
    if figures["captioned_now"]:
        lines.append(f"this run   {figures['captioned_now']:,} rows, {figures['rows_per_second']:,.1f} rows/s")
    return lines
