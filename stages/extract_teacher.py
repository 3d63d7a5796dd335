"""`pipe extract-teacher`: stage one. The frozen teacher looks at every image of the manifest, once."""

from __future__ import annotations

import os
from typing import Any

import torch

from pipeline.cache.layout import GLOBAL, ScaleSpec
from pipeline.cache.part import Part
from pipeline.cache.reader import open_cache
from pipeline.config import Config
from pipeline.console import log
from pipeline.data import roi
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace
from pipeline.teacher.extract import Extraction, Settings, extract, summary
from pipeline.teacher.teacher import Teacher, load_teacher
from stages import extract_processes


def run(config: Config, limit: int | None = None, part: Part | None = None, processes: int | None = None) -> None:
    """Write workspace/teacher.zarr, or go on with it, and print what is in it.

    Args:
        limit: only the first rows.
        part: only this part of the shards; None: what the launcher says, else all of them.
        processes: how many processes this machine starts, each with a part; None: one a GPU, else one.

    Raises:
        PipeError: no manifest, no weights, or a cache of something else.
        Stopped: a signal arrived; the same command goes on.
    """
    workspace = Workspace(config.workspace)
    manifest = read_manifest(workspace.manifest)
    log.info("manifest: %d rows, %d of them usable", len(manifest), len(manifest.rows()))
    part = part or _launched()
    if (count := _processes(part, processes)) > 1:
        extract_processes.run(config, count, limit)
        print("\n".join(_report(Extraction(open_cache(workspace.teacher), 0, 0.0))))
        return
    settings, device = settings_of(config), _device()
    done = extract(manifest, load(config), workspace.teacher, settings, limit=limit, part=part, device=device)
    print("\n".join(_report(done)))


def _launched() -> Part:
    part, said = Part.of_environment(os.environ)
    if said:
        log.info("%s of the shards (%s)", part, said)
    return part


def _processes(part: Part, asked: int | None) -> int:
    if asked is not None and asked > 1 and not part.whole:
        raise PipeError(f"this process is {part} already", where="--processes", fix="leave it out")
    if asked is None and part.whole:
        return torch.cuda.device_count()
    return asked or 1


def _device() -> str | None:
    """Processes side by side on one machine take a GPU each, where there are several."""
    local = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "")
    gpus = torch.cuda.device_count()
    return f"cuda:{int(local) % gpus}" if gpus > 1 and local.isdigit() else None


def load(config: Config, **instead: Any) -> Teacher:
    """The teacher that a configuration names; `instead`: arguments of `load_teacher` that the caller knows better."""
    teacher = config.teacher
    arguments: dict[str, Any] = {
        "model_args": teacher.model_args,
        "checkpoint": teacher.checkpoint,
        "random_weights": teacher.random_weights,
        "image_size": teacher.image_size,
        "scales": [ScaleSpec(scale.name, scale.layer, scale.grid) for scale in teacher.scales],
        "mean": teacher.mean,
        "std": teacher.std,
        "seed": teacher.seed,
    }
    return load_teacher(teacher.name, **arguments | instead)


def settings_of(config: Config) -> Settings:
    """How its features become stored rows."""
    teacher = config.teacher
    return Settings(
        view=config.data.view,
        pca=teacher.pca,
        dtype=teacher.dtype,
        calibration_rows=teacher.calibration_rows,
        seed=teacher.seed,
        batch_size=teacher.batch_size,
        workers=config.data.workers,
        compile=teacher.compile,
        views=tuple(teacher.view_specs),
    )


def _report(done: Extraction) -> list[str]:
    figures: dict[str, Any] = summary(done.cache)
    rows, fidelity, baselines = figures["rows"], figures["fidelity"], figures["baselines"]
    lines = [
        f"teacher cache   {done.cache.path}",
        f"rows            {rows['ok']:,} ok, {rows['undecodable']:,} undecodable, {rows['absent']:,} absent",
        f"bytes an image  {figures['bytes_per_image']:,}",
    ]
    for view in done.cache.settings.get("views", []):
        lines.append(f"view            {_view(view)}")
    if done.rows:
        lines.append(f"this run        {done.rows:,} rows, {done.rows / max(done.seconds, 1e-9):,.1f} rows/s")
    lines.append("")
    lines.append("scale       layer  grid  kept   explained  cosine  worst 1%  Gram rms  mean-Gram loss  saturated")
    for scale in done.cache.scales:
        found = fidelity[scale.name]
        lines.append(
            f"{scale.name:<10}  {scale.layer:>5}  {scale.grid:>4}  {scale.components:>4}   {scale.explained:>9.4f}  "
            f"{found['cosine_mean']:.4f}  {found['cosine_worst_1pct']:>8.4f}  {found['gram_rms']:>8.4f}  "
            f"{baselines['gram'][scale.name]:>14.5f}  {figures['saturated'][scale.name]:>9,}"
        )
    names = [*(scale.name for scale in done.cache.scales), GLOBAL]
    rkd = ", ".join(f"{name} {baselines['rkd'][name]:.5f}" for name in names)
    lines.append("")
    lines.append(f"image-independent baselines: relational {rkd}; global {baselines['global']:.5f}")
    if done.cache.roi_cosine:
        lines.append(f"crops of stored maps (data.roi) are approximate: cosine {roi.described(done.cache.roi_cosine)}")
    return lines


def _view(view: dict[str, Any]) -> str:
    """A further view in a line: `crop: 0.4 to 1 of the area, aspect 0.75 to 1.3333, 50 % mirrored`."""
    (least, most), (narrow, wide) = view["area"], view["aspect"]
    mirrored = f"{100 * view['flip']:g} % mirrored"
    return f"{view['name']}: {least:g} to {most:g} of the area, aspect {narrow:g} to {wide:g}, {mirrored}"
