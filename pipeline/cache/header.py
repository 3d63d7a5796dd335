"""The metadata of a cache: what `digest.json` covers, written once before any row and believed only after a check."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import counts, layout
from pipeline.cache.codec import ScaleCodec
from pipeline.cache.layout import CacheIdentity, ScaleInfo
from pipeline.cache.seals import SEALS
from pipeline.cache.seals import document as seals_document
from pipeline.cache.shards import with_crc, without_crc
from pipeline.cache.store import publish, read_bytes, read_json
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder

SmallArrays = dict[str, tuple[np.ndarray, tuple[str, ...]]]  # name → values, names of the axes


@dataclass(frozen=True, eq=False)
class CacheFit:
    """What one process fits before any row is written.

    Args:
        codecs: how each scale is stored, steps included.
        calibration_rows, heldout_rows: int64 manifest rows that were fitted on and scored on.
        baselines: `<scale>_gram_mean` (T, T) and `global_mean` (C,).
        baseline_losses, fidelity: JSON-able figures (see `baselines` and `codec.Fidelity`).
        roi_cosine: scale (and "global") → share of the area → cosine of stored maps, resampled over crops, to the
            teacher's own of these crops (see data.roi).
    """

    codecs: Mapping[str, ScaleCodec]
    calibration_rows: np.ndarray
    heldout_rows: np.ndarray
    baselines: Mapping[str, np.ndarray]
    baseline_losses: Mapping[str, Any]
    fidelity: Mapping[str, Any]
    roi_cosine: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def build_header(identity: CacheIdentity, fit: CacheFit, shard_rows: int | None) -> tuple[dict[str, Any], SmallArrays]:
    """The group's attributes, and the small arrays with the names of their axes."""
    if identity.rows < 1:
        raise PipeError("the manifest has no rows", fix="run: pipe index")
    infos: list[ScaleInfo] = []
    small: SmallArrays = {}
    for spec in identity.scales:
        codec = fit.codecs[spec.name]
        stored = (codec.components, codec.dtype, codec.width, codec.explained)
        infos.append(ScaleInfo(spec.name, spec.layer, spec.grid, *stored))
        if codec.basis is not None:
            small[layout.basis_name(spec.name)] = (codec.basis.astype("<f4"), ("channel", "component"))
        if codec.dtype == "int8":
            if codec.steps is None:
                raise ValueError(f"{spec.name}: int8 needs the steps of a calibration")
            small[layout.steps_name(spec.name)] = (codec.steps.astype("<f4"), ("component",))
        name = layout.gram_mean_name(spec.name)
        small[name] = (fit.baselines[name].astype("<f4"), ("token", "token_too"))
    small[layout.GLOBAL_MEAN] = (fit.baselines[layout.GLOBAL_MEAN].astype("<f4"), ("channel",))
    small[layout.CALIBRATION_ROWS] = (fit.calibration_rows.astype("<i8"), ("entry",))
    small[layout.HELDOUT_ROWS] = (fit.heldout_rows.astype("<i8"), ("entry",))
    views = [view["name"] for view in identity.settings.get("views", [])]
    arrays = layout.row_arrays(infos, identity.global_width, views)
    row_bytes = sum(array.row_bytes for array in arrays)
    attributes = identity.to_json() | {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "segments": [identity.rows],
        counts.ATTRIBUTE: counts.BY_ROW,
        "views": views,
        "shard_rows": shard_rows or layout.auto_shard_rows(row_bytes, identity.rows),
        "scales": [asdict(info) for info in infos],
        "baseline_losses": dict(fit.baseline_losses),
        "fidelity": dict(fit.fidelity),
        "roi_cosine": {name: dict(of) for name, of in fit.roi_cosine.items()},
    }
    return attributes, small


def write_header(path: Path, attributes: dict[str, Any], small: SmallArrays) -> None:
    """All metadata; `digest.json` last: without it the folder is not a cache and is set up anew."""
    publish_header(path, header_contents(attributes, small))


def header_contents(attributes: dict[str, Any], small: SmallArrays) -> dict[str, bytes]:
    """The files that `digest.json` covers, by name."""
    contents = _row_documents(attributes)  # the group's own comes first: by it we know an unfinished cache as ours
    for name, (values, axes) in small.items():
        chunk = tuple(max(side, 1) for side in values.shape)
        document = layout.plain_array_document(values.shape, chunk, values.dtype, axes)
        contents[f"{name}/{layout.METADATA}"] = layout.json_bytes(document)
        if values.size:
            contents[layout.chunk_path(name, 0, values.ndim)] = with_crc(values.tobytes())
    return contents


def publish_header(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write `contents` and then the `digest.json` over them."""
    for name, data in contents.items():
        publish(path, path / name, data)
    digest = {"sha256": layout.digest_of(path, list(contents), contents), "files": sorted(contents)}
    publish(path, path / layout.DIGEST, layout.json_bytes(digest))


def _row_documents(attributes: dict[str, Any]) -> dict[str, bytes]:
    """The metadata files that depend on the number of rows, by name."""
    rows, shard_rows = attributes["rows"], attributes["shard_rows"]
    scales = [ScaleInfo(**scale) for scale in attributes["scales"]]
    documents = {
        array.name: layout.row_array_document(array, rows, shard_rows)
        for array in layout.row_arrays(scales, attributes["global_width"], attributes.get("views", []))
    }
    documents[layout.STATE] = layout.plain_array_document((rows,), (shard_rows,), np.dtype("u1"), ("row",))
    documents[SEALS] = seals_document(
        layout.row_arrays(scales, attributes["global_width"], attributes.get("views", [])), -(-rows // shard_rows)
    )
    documents[layout.SATURATED] = counts.document(attributes)
    if attributes.get("views", []):
        groups = [layout.VIEWS, *(f"{layout.VIEWS}/{view}" for view in attributes.get("views", []))]
        documents |= dict.fromkeys(groups, layout.group_document({}))
    files = {f"{name}/{layout.METADATA}": layout.json_bytes(document) for name, document in documents.items()}
    return {layout.METADATA: layout.json_bytes(layout.group_document(attributes)), **files}


def grow_header(path: Path, identity: CacheIdentity) -> None:
    """Make room for the rows that a grown manifest has more; nothing that is stored changes.

    Several files have to change together, so all of them are written to `growing.json` first. What is there can be
    finished by anyone at any time (`finish_growth`); what is not there has changed nothing.
    """
    attributes, _, covered = read_header(path)
    attributes |= {
        "rows": identity.rows,
        "manifest_fingerprint": identity.manifest_fingerprint,
        "segments": [*attributes["segments"], identity.rows],
    }
    contents = {name: data for name, data in _row_documents(attributes).items() if name in covered}  # seals may not be
    digest = {"sha256": layout.digest_of(path, covered, contents), "files": covered}
    contents[layout.DIGEST] = layout.json_bytes(digest)
    texts = {name: data.decode() for name, data in contents.items()}
    publish(path, path / layout.GROWING, layout.json_bytes({"files": texts}))
    finish_growth(path)


def finish_growth(path: Path) -> None:
    """Put the files of `growing.json` in their places, `digest.json` last; nothing where there is no such file."""
    journal = path / layout.GROWING
    if not journal.exists():
        return
    texts: dict[str, str] = read_json(journal)["files"]
    for name in sorted(texts, key=lambda name: name == layout.DIGEST):
        publish(path, path / name, texts[name].encode())
    journal.unlink()
    sync_folder(path)


def refuse_foreign(path: Path) -> None:
    """Pass an empty folder, or one in which setting up a cache was cut off.

    Raises:
        PipeError: the folder is not ours, or it is a cache with rows whose digest.json is gone.
    """
    metadata, others = path / layout.METADATA, [entry.name for entry in _beside_our_own(path)]
    if (path / layout.DIGEST).exists() or not (others or metadata.exists()):
        return
    if not metadata.exists() or layout.FORMAT not in metadata.read_text(encoding="utf-8", errors="replace"):
        raise PipeError(
            f"this folder holds something that is not a teacher cache ({[*others, layout.METADATA][0]})",
            where=path,
            fix="move it away",
        )
    if _has_entries(path / layout.STATE / "c"):
        raise PipeError(
            "this cache holds rows, but its digest.json is gone", where=path, fix="restore it or move it away"
        )


def clear_unfinished(path: Path) -> None:
    """Empty a folder in which setting up a cache was cut off: no row can have been written yet. Refuses as above."""
    refuse_foreign(path)
    for entry in _beside_our_own(path):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _has_entries(folder: Path) -> bool:
    """Whether there is anything in a folder, which another process may be clearing."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return next(entries, None) is not None
    return False


def _beside_our_own(path: Path) -> list[Path]:
    ours = {layout.LOCK, layout.TEMPORARY, layout.METADATA, layout.GROWING}
    return sorted(entry for entry in path.iterdir() if entry.name not in ours)


def read_header(path: Path) -> tuple[dict[str, Any], str, list[str]]:
    """The group's attributes, the digest, and the files that it covers; all checked."""
    metadata = path / layout.METADATA
    if not metadata.exists():
        raise PipeError("there is no teacher cache", where=path, fix="run: pipe extract-teacher")
    if not (path / layout.DIGEST).exists():
        raise PipeError("this cache was never finished being set up", where=path, fix="run: pipe extract-teacher")
    recorded = read_json(path / layout.DIGEST)
    files: Any = recorded.get("files") if isinstance(recorded, dict) else None
    listed = isinstance(files, list) and all(isinstance(name, str) for name in files)
    # The digest is checked before anything is believed; the list itself is part of what it covers.
    if not listed or layout.digest_of(path, files) != recorded.get("sha256"):
        if (path / layout.GROWING).exists():
            raise PipeError("this cache is being made larger", where=path, fix="run: pipe extract-teacher")
        raise PipeError(
            "this cache's metadata was altered or damaged (its digest does not fit)",
            where=path,
            fix="restore it from a copy, or extract the cache again",
        )
    header = read_json(metadata).get("attributes", {})
    if header.get("format") != layout.FORMAT or header.get("version") != layout.VERSION:
        raise PipeError(
            f"this is not a {layout.FORMAT} of version {layout.VERSION}", where=metadata, fix="extract the cache again"
        )
    header.setdefault("segments", [header["rows"]])  # caches made before they could grow
    header.setdefault("views", [])
    header.setdefault("roi_cosine", {})  # not measured by older extractions
    return header, str(recorded["sha256"]), files


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings that the group's attributes speak of, unchecked; growing does not change them, so that they can be
    read while it is under way. {} where nothing says."""
    found: Any = read_json(path / layout.METADATA)
    for key in ("attributes", "settings"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def require_covered(path: Path, covered: list[str], arrays: Iterable[str]) -> None:
    """Refuse a cache whose digest leaves out the metadata of an array that is going to be believed."""
    needed = [layout.METADATA, *(f"{name}/{layout.METADATA}" for name in arrays)]
    if left_out := sorted(set(needed) - set(covered)):
        raise PipeError(f"the digest does not cover {left_out[0]}", where=path, fix="extract the cache again")


def read_small(path: Path, name: str) -> np.ndarray:
    """A small array stored as one chunk, shape and dtype by its zarr.json; native byte order, writable."""
    document = read_json(path / name / layout.METADATA)
    shape = tuple(document["shape"])
    if 0 in shape:
        return np.zeros(shape, document["data_type"])
    file = path / layout.chunk_path(name, 0, len(shape))
    values = np.frombuffer(without_crc(read_bytes(file), file), np.dtype(document["data_type"]).newbyteorder("<"))
    return values.reshape(shape).astype(document["data_type"])
