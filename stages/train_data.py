"""What `pipe train` reads: manifest, teacher cache and second captions, opened, compared with the configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache, check_matches, open_cache
from pipeline.config import Config
from pipeline.config_schema import TeacherConfig
from pipeline.console import log
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.synthetic_captions import SyntheticCaptions, open_captions
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace, sha256_file

VALIDATION_ROWS = 1000  # enough for a curve; pipe evaluate measures on all of them


@dataclass
class Data:
    """What a run reads: the manifest, the cache (None without a student) and the rows of each split."""

    manifest: Manifest
    cache: Cache | None
    train_rows: np.ndarray
    val_rows: np.ndarray
    captions: SyntheticCaptions | None = None  # where the loss reads a second caption that is synthetic
    init: dict[str, str] | None = None  # path and sha256 of the weights it starts from, where it does
    projection: Any = None  # pipeline.models.projection.TextProjection, where the text branch's target is projected
    projection_sha256: str | None = None

    def identity(self) -> dict[str, Any]:
        """What decides, with the configuration, every batch and target; goes into checkpoints and the record."""
        found = {
            "rows": len(self.manifest),
            "manifest_fingerprint": self.manifest.fingerprint(),
            "split_sha256": self.manifest.split_sha256(),
            "train_rows": len(self.train_rows),
            "train_rows_sha256": hashlib.sha256(self.train_rows.astype("<i8").tobytes()).hexdigest(),
            "cache": None if self.cache is None else self.cache.digest,
        }
        if self.captions is not None:
            found["captions"] = sha256_file(self.captions.path)
        if self.projection_sha256 is not None:
            found["text_projection"] = self.projection_sha256
        return found if self.init is None else found | {"init_sha256": self.init["sha256"]}


def open_data(workspace: Workspace, config: Config) -> Data:
    """Open manifest and cache, refuse what does not fit, and leave out rows the teacher could not decode."""
    if not workspace.manifest.exists():
        raise PipeError("there is no manifest", where=workspace.manifest, fix="run: pipe index")
    manifest = read_manifest(workspace.manifest)
    rows = {split: manifest.rows(split) for split in ("train", "val")}
    cache = None
    if config.model.parts.student:
        # Checksums of every row: far cheaper than decoding its image.
        cache = open_cache(cache_place(workspace, config), verify=True, access=config.data.cache_access)
        check_matches(
            cache,
            manifest_fingerprint=manifest.fingerprint(min(cache.rows, len(manifest))),
            teacher=asked_teacher(config, cache.teacher.get("layers", 0)),
            settings=asked_settings(config),
        )
        rows = {split: _cached_rows(cache, of_split, config) for split, of_split in rows.items()}
    captions = None
    if config.loss.contrastive == "alip":
        captions, rows = _second_captions(workspace, config, manifest, rows)
    generator = np.random.default_rng([config.train.seed, 0x7A])
    val = rows["val"]
    if len(val) > VALIDATION_ROWS:
        val = np.sort(generator.choice(val, VALIDATION_ROWS, replace=False))
    projection, sha256 = _projection(config, cache)
    return Data(manifest, cache, rows["train"], val, captions, projection=projection, projection_sha256=sha256)


def _projection(config: Config, cache: Cache | None) -> tuple[Any, str | None]:
    """The map of the text branch's target and its file's hash; nothing where there is no such branch."""
    path = config.loss.text_projection
    if path is None or cache is None or not config.model.parts.text_side:
        return None, None
    from pipeline.models.projection import read_projection

    return read_projection(path, cache.global_width), sha256_file(path)


def _second_captions(
    workspace: Workspace, config: Config, manifest: Manifest, rows: dict[str, np.ndarray]
) -> tuple[SyntheticCaptions | None, dict[str, np.ndarray]]:
    """Where second captions come from, and the rows that have one."""
    if config.data.second_caption == "another":
        for split, of_split in rows.items():
            single = int((manifest.caption_counts(of_split) < 2).sum())
            if single:
                raise PipeError(
                    f"{single:,} of {len(of_split):,} {split} rows have one caption only, and ALIP reads two",
                    where="data.second_caption",
                    fix="write synthetic ones: pipe caption, then --set data.second_caption=synthetic",
                )
        return None, rows
    captions = open_captions(workspace.captions, manifest)
    return captions, {split: _captioned(captions, of_split, split) for split, of_split in rows.items()}


def _captioned(captions: SyntheticCaptions, rows: np.ndarray, split: str) -> np.ndarray:
    """The rows that have a synthetic caption; those that the captioner failed at are left out."""
    absent, failed = captions.without(rows)
    if absent.any():
        raise PipeError(
            f"{int(absent.sum()):,} of {len(rows):,} {split} rows have not been captioned",
            where=captions.path,
            fix="run: pipe caption --set caption.split=all" if split == "val" else "run: pipe caption",
        )
    if failed.any():
        log.info("leaving out %d %s rows that the captioner could say nothing of", int(failed.sum()), split)
    return rows[~failed]


def cache_place(workspace: Workspace, config: Config) -> str:
    """Folder or URL of the teacher cache; PipeError where there should be a folder and is none."""
    place = config.data.cache or str(workspace.teacher)
    if "://" not in place and not Path(place).exists():
        raise PipeError(
            "there is no teacher cache", where=place, fix="run: pipe extract-teacher (or train --fusion none)"
        )
    return place


def asked_teacher(config: Config, layers: int) -> dict[str, Any]:
    """The fields of a cache's teacher that the configuration fixes; `layers`: how many the teacher has."""
    from pipeline.teacher.huggingface_folder import label

    teacher = config.teacher
    asked: dict[str, Any] = {
        "name": label(teacher.name),
        "image_size": teacher.image_size,
        "view": config.data.view,
        "scales": [{"name": s.name, "grid": s.grid, "layer": _resolved(s.layer, layers)} for s in teacher.scales],
        "model_args": teacher.model_args,
        "weights": _asked_weights(teacher),
    }
    # Those not set are the network's own, which only the network knows.
    return asked | {key: list(value) for key in ("mean", "std") if (value := getattr(teacher, key)) is not None}


def _resolved(layer: int, layers: int) -> int:
    """A layer from the end as the cache names it; one that the teacher does not have stays as it is, to be refused."""
    return layer + layers if -layers <= layer < 0 else layer


def _asked_weights(teacher: TeacherConfig) -> dict[str, str]:
    """The teacher itself is not needed here; its file is compared where it is at hand."""
    from pipeline.teacher.huggingface_folder import asked_origin, is_huggingface
    from pipeline.teacher.weights import weights_origin

    if is_huggingface(teacher.name):
        return asked_origin(teacher.name, random_weights=teacher.random_weights)

    if teacher.checkpoint is None or Path(teacher.checkpoint).is_file():
        path = None if teacher.checkpoint is None else Path(teacher.checkpoint)
        return weights_origin(path, random_weights=teacher.random_weights)
    log.info("%s is not on this machine: not compared with the teacher cache's weights", teacher.checkpoint)
    return {"origin": "checkpoint"}


def asked_settings(config: Config) -> dict[str, Any]:
    """What else shapes a cache's numbers, as the configuration has it."""
    asked = config.teacher.model_dump(include={"pca", "dtype", "calibration_rows", "seed"})
    views = [spec.to_json() for spec in config.teacher.view_specs]
    return asked | ({"views": views} if views else {})


def _cached_rows(cache: Cache, rows: np.ndarray, config: Config) -> np.ndarray:
    state = np.zeros(max(int(rows.max(initial=-1)) + 1, cache.rows), np.uint8)  # the manifest may have grown since
    state[: cache.rows] = cache.state()
    state = state[rows]
    absent = int((state == 0).sum())
    looked_at_now = config.teacher.online and config.data.rows == "all"  # what is absent, by a teacher in the loop
    if absent and config.data.rows == "all" and not looked_at_now:
        raise PipeError(
            f"{absent:,} of {len(rows):,} rows are not in the teacher cache",
            where=cache.path,
            fix="run: pipe extract-teacher (or --set data.rows=cached to train on those that are)",
        )
    if undecodable := int((state == 2).sum()):
        log.info("leaving out %d rows whose image the teacher could not decode", undecodable)
    return rows[state != 2] if looked_at_now else rows[state == 1]
