"""What a cache is, how big, how faithful, how complete: from metadata, `state` and the sizes of files, never from rows.

Legend: R rows, S rows a shard.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.remote_path import RemotePath, in_parallel
from pipeline.data.geometry import BASE
from pipeline.data.manifest import Manifest


def cache_info(path: str | Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """JSON-able: path, digest, teacher, view, views, settings, scales, rows, shards, bytes, fidelity, baselines, ...

    Of a remote store, which lists no files, what they are and take is None.

    Args:
        path: a folder, or a URL as `open_cache` takes it.

    Raises:
        PipeError: no cache there, or its metadata or a `state` chunk is damaged.
    """
    cache = open_cache(path)
    state = cache.state()
    local = not isinstance(cache.path, RemotePath)
    on_disk, files = _disk_usage(cache.path) if local else (None, None)
    ok = int((state == layout.OK).sum())
    return {
        "path": str(cache.path),
        "digest": cache.digest,
        "teacher": cache.teacher,
        "view": cache.view,
        "views": cache.views,
        "plain": cache.plain,
        "settings": cache.settings,
        "scales": [
            {"name": s.name, "layer": s.layer, "grid": s.grid, "components": s.components, "dtype": s.dtype,
             "width": s.width, "explained": s.explained}
            for s in cache.scales
        ],
        "global_width": cache.global_width,
        "rows": {
            "all": cache.rows,
            "ok": ok,
            "undecodable": int((state == layout.UNDECODABLE).sum()),
            "absent": int((state == layout.ABSENT).sum()),
        },
        "shards": _shards(cache, state),
        "bytes": {
            "on_disk": on_disk,
            "files": files,
            "an_image": {array.name: array.row_bytes for array in cache.arrays},
            "an_image_all": sum(array.row_bytes for array in cache.arrays),
            "an_image_by_view": view_bytes(cache),
            "an_image_on_disk": on_disk / ok if ok and on_disk is not None else None,
        },
        "fidelity": cache.fidelity,
        "baselines": cache.baseline_losses,
        "saturated": cut_off(cache),
        "manifest": _manifest(cache, manifest),
    }  # fmt: skip


def cut_off(cache: Cache) -> dict[str, int]:
    """Values cut off so far, by scale, as `Cache.saturated`; of a remote store many shards at a time."""
    if not isinstance(cache.path, RemotePath):
        return cache.saturated
    found = in_parallel([partial(cache.saturated_in, shard) for shard in range(cache.shards)])
    return {scale.name: sum(counts[scale.name] for counts in found) for scale in cache.scales}


def view_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of a row, uncompressed, in each further view and in the base view."""
    sizes = dict.fromkeys([BASE, *cache.views], 0)
    for array in cache.arrays:
        _, _, below = array.name.partition(f"{layout.VIEWS}/")
        sizes[below.split("/")[0] or BASE] += array.row_bytes
    return sizes


def _disk_usage(root: Path) -> tuple[int, int]:
    """Bytes and number of all files below `root`."""
    sizes = [os.lstat(Path(folder) / name).st_size for folder, _, names in os.walk(root) for name in names]
    return sum(sizes), len(sizes)


def _shards(cache: Cache, state: np.ndarray) -> dict[str, int | None]:
    """How many shards are done, written in part, unfinished (files, but no `state`), or not there; all, and S."""
    counts = dict.fromkeys(("done", "in_part", "unfinished", "absent"), 0)
    local = not isinstance(cache.path, RemotePath)
    for shard in range(cache.shards):
        here = state[shard * cache.shard_rows : (shard + 1) * cache.shard_rows]
        if not local:  # rows without a state count as a shard that is not there
            kind = "absent" if not here.any() else "in_part" if (here == layout.ABSENT).any() else "done"
            counts[kind] += 1
        elif (cache.path / layout.chunk_path(layout.STATE, shard, 1)).exists():
            counts["in_part" if (here == layout.ABSENT).any() else "done"] += 1
        else:
            begun = any(array.file(cache.path, shard).exists() for array in cache.arrays)
            counts["unfinished" if begun else "absent"] += 1
    known: dict[str, int | None] = {**counts} if local else {**counts, "unfinished": None}
    return {"all": cache.shards, "rows_each": cache.shard_rows, **known}


def _manifest(cache: Cache, manifest: Manifest | None) -> dict[str, Any]:
    """Whether the manifest begins with the rows that the cache is of, and how many more it has."""
    if manifest is None:
        return {"matches": None}
    same = len(manifest) >= cache.rows and manifest.fingerprint(cache.rows) == cache.manifest_fingerprint
    return {"matches": same, "path": str(manifest.path), "new_rows": len(manifest) - cache.rows if same else None}


def info_lines(info: dict[str, Any]) -> list[str]:
    """The same as text, for people."""
    teacher, rows, shards, size = info["teacher"], info["rows"], info["shards"], info["bytes"]
    view = " ".join(str(value) for value in info["view"].values())
    base = {name: count for name, count in size["an_image"].items() if "/" not in name}
    an_image = " + ".join(f"{name} {count:,}" for name, count in base.items())
    unfinished = "" if shards["unfinished"] is None else f"{shards['unfinished']:,} unfinished, "
    kind = "uncompressed" if info["plain"] else "encoded otherwise than our writer does"
    on_disk = "not known of a remote store" if size["on_disk"] is None else f"{size['on_disk'] / 1e6:,.1f} MB"
    files = "" if size["files"] is None else f" in {size['files']:,} files"
    lines = [
        f"cache      {info['path']}",
        f"teacher    {teacher.get('name', '?')}, weights {str(teacher.get('weights_sha256', '?'))[:16]}, view {view}",
        f"settings   {', '.join(_setting(key, value) for key, value in info['settings'].items())}",
        f"manifest   {_manifest_line(info['manifest'])}",
        f"digest     {info['digest']}",
        f"rows       {rows['all']:,}: {rows['ok']:,} ok, {rows['undecodable']:,} undecodable, "
        f"{rows['absent']:,} absent",
        f"shards     {shards['all']:,} of {shards['rows_each']:,} rows: {shards['done']:,} done, "
        f"{shards['in_part']:,} in part, {unfinished}{shards['absent']:,} absent",
        f"size       {on_disk}{files}, {kind}",
        f"an image   {size['an_image_all']:,} bytes: {an_image}",
        *(f"view       {view}: {size['an_image_by_view'][view]:,} bytes of them" for view in info["views"]),
        "",
        "scale       layer  grid  kept  dtype       explained  cosine  worst 1%  Gram rms  mean-Gram loss  saturated",
    ]
    for scale in info["scales"]:
        found, loss = (
            info["fidelity"].get(scale["name"], {}),
            info["baselines"].get("gram", {}).get(scale["name"], np.nan),
        )
        cosine, worst, gram = (found.get(key, np.nan) for key in ("cosine_mean", "cosine_worst_1pct", "gram_rms"))
        lines.append(
            f"{scale['name']:<10}  {scale['layer']:>5}  {scale['grid']:>4}  {scale['components']:>4}  "
            f"{scale['dtype']:<10}  {scale['explained']:>9.4f}  {cosine:.4f}  {worst:>8.4f}  {gram:>8.4f}  "
            f"{loss:>14.5f}  {info['saturated'][scale['name']]:>9,}"
        )
    return lines


def _setting(key: str, value: Any) -> str:
    """`pca 256`; of further views their names."""
    return f"{key} {' '.join(view['name'] for view in value)}" if key == "views" else f"{key} {value}"


def _manifest_line(found: dict[str, Any]) -> str:
    if found["matches"] is None:
        return "not compared"
    if not found["matches"]:
        return f"of other rows than {found['path']}"
    more = f", which has {found['new_rows']:,} new rows behind them" if found["new_rows"] else ""
    return f"the rows of {found['path']}{more}"
