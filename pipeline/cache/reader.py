"""Reading a teacher cache: what is in it, which rows are there, and their values.

A missing chunk reads as zeros in every Zarr library; this reader raises instead, for every row whose `state` is not 1.
Where the values come from (memory maps, positioned reads, a remote or compressed store) is a `RowSource`'s business.
Nothing is opened before the first read, and a `Cache` may be pickled or forked at any time.

Legend: R rows, S rows a shard, T = grid² tokens, K components, C width of `global`, n rows asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from pipeline.cache import codec, counts, layout
from pipeline.cache.ahead import Ahead
from pipeline.cache.chunks import check_foreign_document, is_plain
from pipeline.cache.header import read_header, read_small, require_covered
from pipeline.cache.layout import RowArray, ScaleInfo
from pipeline.cache.local import LocalShards, RowSource, on_network_disk
from pipeline.cache.remote_path import RemotePath
from pipeline.cache.shards import States, bytes_if_there, named_rows, without_crc
from pipeline.cache.store import read_json
from pipeline.errors import PipeError

FIX = "run: pipe extract-teacher"

Access = Literal["auto", "map", "read"]


def open_cache(
    path: str | Path, *, verify: bool = False, access: Access = "auto", max_open: int | None = None
) -> Cache:
    """Open the cache at `path`: read its metadata, check its digest, open no shard yet.

    Args:
        path: a folder, or a URL (s3://, gs://, http://, https://, or a scheme of fsspec's).
        verify: check every row's CRC-32C at each read (each shard's index is always checked when it is opened).
        access: "map": memory maps; "read": positioned reads, for network disks; "auto": by the kind of disk.
        max_open: shards mapped or open at once; default as many as the system takes well.

    Raises:
        PipeError: no cache there, one that is not finished, of another format, or whose metadata was altered.
    """
    return Cache(place_of(path), verify=verify, access=access, max_open=max_open)


def place_of(path: str | Path) -> Path:
    """A folder, or what stands for the URL `path`: what that has of pathlib's is all that is used of either."""
    return cast(Path, RemotePath(str(path))) if "://" in str(path) else Path(path)


class Cache:
    """A teacher cache. Attributes say what is in it; `read` and `read_raw` give rows.

    Attributes:
        path, rows, shard_rows, global_width: R, S, C.
        scales: how each scale is stored.
        views: names of the further views.
        plain: whether its arrays are uncompressed, in our writer's own layout.
        view, teacher, manifest_fingerprint, settings: what the cache is of.
        segments: how many rows the cache had when it was set up, and each time it grew; batches never straddle these.
        digest: SHA-256 (hex) of all metadata, basis, steps and baselines.
        steps: scale → (K,) float32 for int8, else None (int8_token: per-token steps come with `read_raw`).
        baselines: `<scale>_gram_mean` (T, T) and `global_mean` (C,), float32.
        baseline_losses: {"gram": {scale: x}, "rkd": {scale: x, "global": x}, "global": x}.
        fidelity: what is lost against the raw teacher, per scale, on held-out rows.
        roi_cosine: scale → share of the area → cosine of a resampled map to the teacher's of that crop; {} if unknown.
        calibration_rows, heldout_rows: int64.
        counts_by_row: whether values cut off are known of each row, else of whole shards only.
        counting: those attributes that say how they are stored (see `counts`).
    """

    def __init__(
        self, path: Path, *, verify: bool = False, access: Access = "auto", max_open: int | None = None
    ) -> None:
        self.path, self.verify = path, verify
        header, self.digest, covered = read_header(path)
        self.rows: int = header["rows"]
        self.shard_rows: int = header["shard_rows"]
        self.scales = [ScaleInfo(**scale) for scale in header["scales"]]
        self.global_width: int = header["global_width"]
        self.view: dict[str, Any] = header["view"]
        self.teacher: dict[str, Any] = header["teacher"]
        self.manifest_fingerprint: str = header["manifest_fingerprint"]
        self.settings: dict[str, Any] = header["settings"]
        self.segments: list[int] = header["segments"]
        self.baseline_losses: dict[str, Any] = header["baseline_losses"]
        self.fidelity: dict[str, Any] = header["fidelity"]
        self.roi_cosine: dict[str, dict[str, float]] = header["roi_cosine"]
        self.counting = {key: header.get(key) for key in ("rows", "shard_rows", "scales", counts.ATTRIBUTE)}
        self.counts_by_row = counts.by_row(header)
        self.views: list[str] = header["views"]
        self.arrays = layout.row_arrays(self.scales, self.global_width, self.views)
        self._by_view = {view: self._arrays_of(view) for view in (None, *self.views)}
        self._based = {s.name for s in self.scales if f"{layout.basis_name(s.name)}/{layout.METADATA}" in covered}
        names = [*(layout.gram_mean_name(s.name) for s in self.scales), layout.GLOBAL_MEAN]
        lists = [layout.STATE, layout.SATURATED, layout.CALIBRATION_ROWS, layout.HELDOUT_ROWS]
        steps = [layout.steps_name(s.name) for s in self.scales if s.dtype == "int8"]
        require_covered(path, covered, [*(array.name for array in self.arrays), *names, *lists, *steps])
        self.plain = self._check_documents()
        self.steps = {
            s.name: read_small(self.path, layout.steps_name(s.name)) if s.dtype == "int8" else None for s in self.scales
        }
        self.baselines = {name: read_small(self.path, name) for name in names}
        self.calibration_rows = read_small(self.path, layout.CALIBRATION_ROWS)
        self.heldout_rows = read_small(self.path, layout.HELDOUT_ROWS)
        self._states = States(path, self.rows, self.shard_rows)
        self.source, self._ahead = self._source(access, max_open), Ahead()

    def _check_documents(self) -> bool:
        """Whether all arrays are as our writer stores them; others need only the same values, in any codecs."""
        plain = True
        for array in self.arrays:
            document = read_json(self.path / array.name / layout.METADATA)
            if not is_plain(document, array, self.rows, self.shard_rows):
                check_foreign_document(document, array, self.rows)
                plain = False
        return plain

    def _source(self, access: Access, max_open: int | None) -> RowSource:
        if isinstance(self.path, RemotePath) or not self.plain:
            from pipeline.cache.remote import TensorStoreRows

            return TensorStoreRows(self.path)
        mapped = access == "map" or (access == "auto" and not on_network_disk(self.path))
        return LocalShards(self.path, self._states, mapped=mapped, max_open=max_open)

    def __len__(self) -> int:
        return self.rows

    def _arrays_of(self, view: str | None) -> dict[str, RowArray]:
        """Arrays of a view by the names that `read_raw` gives them."""
        names = [array.name for array in layout.row_arrays(self.scales, self.global_width)]
        if view is not None:
            names = [*names, layout.GEOMETRY]
        whole = {array.name: array for array in self.arrays}
        return {name: whole[name if view is None else layout.view_name(view, name)] for name in names}

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def saturated(self) -> dict[str, int]:
        """Values cut off at ±127 (or at float16's range) so far, by scale."""
        found = {scale.name: 0 for scale in self.scales}
        for shard in range(self.shards):
            found = {name: total + self.saturated_in(shard)[name] for name, total in found.items()}
        return found

    def saturated_in(self, shard: int) -> dict[str, int]:
        """The same, of one shard; zeros where none has been written."""
        totals = self.counts(shard).sum(axis=0).tolist()
        return {scale.name: total for scale, total in zip(self.scales, totals, strict=True)}

    def counts(self, shard: int) -> np.ndarray:
        """Values cut off in the rows of a shard, by scale in their order: (S, L) int64, of caches that count whole
        shards only (1, L); zeros where none has been written."""
        file = self.path / layout.chunk_path(layout.SATURATED, shard, 2)
        if (data := bytes_if_there(file)) is None:
            return np.zeros((self.shard_rows if self.counts_by_row else 1, len(self.scales)), np.int64)
        return counts.parse(without_crc(data, file), self.counting)

    def refresh(self) -> None:
        """Forget `state` and all open shards, so that rows written since the last look are seen."""
        self._states.forget()
        self.source.forget()

    def basis(self, scale: str) -> np.ndarray | None:
        """V (C, K) float32 of `scale`, or None where every channel was kept."""
        return read_small(self.path, layout.basis_name(scale)) if scale in self._based else None

    def state(self) -> np.ndarray:
        """(R,) uint8: 0 absent, 1 ok, 2 undecodable. Read once; read-only."""
        return self._states.all()

    def read(self, rows: Any, *, view: str | None = None, verify: bool | None = None) -> dict[str, np.ndarray]:
        """Coefficients of `rows` (n,) int: scale → (n, T, K) float32, "global" → (n, C) float32.

        Args:
            view: one of `views`; then "geometry" → (n, 5) float32 comes too. None: the view that everyone has.

        Raises:
            PipeError: a row is out of range, absent or undecodable, its data is missing or damaged, or no such view.
        """
        raw = self.read_raw(rows, view=view, verify=verify)
        values = {}
        for scale in self.scales:
            token_steps = raw.get(layout.steps_name(scale.name))
            steps = self.steps[scale.name] if token_steps is None else token_steps
            values[scale.name] = codec.dequantise(raw[scale.name], steps)
        values[layout.GLOBAL] = raw[layout.GLOBAL].astype(np.float32)
        return values | {name: raw[name] for name in (layout.GEOMETRY,) if name in raw}

    def read_raw(self, rows: Any, *, view: str | None = None, verify: bool | None = None) -> dict[str, np.ndarray]:
        """The rows as stored: int8 or float16, and "<scale>_steps" (n, T) float32 for int8_token scales.

        Rows come in the order asked for; duplicates are allowed. Raises as `read` does.
        """
        wanted = self._checked(rows)
        self._ahead.wait_for(wanted)
        check = self.verify if verify is None else verify
        return {name: self.source.gather(array, wanted, check) for name, array in self._view(view).items()}

    def geometry(self, rows: Any, view: str, *, verify: bool | None = None) -> np.ndarray:
        """(n, 5) float32: box and flip of a further view of `rows` (see data.geometry)."""
        check = self.verify if verify is None else verify
        return self.source.gather(self._view(view)[layout.GEOMETRY], self._checked(rows), check)

    def will_need(self, rows: Any, *, view: str | None = None) -> None:
        """Begin to read `rows` (n,) from the disk, and return at once: for the batches that come next.

        Rows that are not there are passed over, and nothing is raised.
        """
        wanted = np.asarray(rows, np.int64)
        wanted = wanted[(wanted >= 0) & (wanted < self.rows)]
        wanted = wanted[self.state()[wanted] == layout.OK]
        source, arrays = self.source, list(self._view(view).values())

        def read() -> None:
            for array in arrays:
                source.will_need(array, wanted)

        if len(wanted):
            self._ahead.hint(wanted, read)

    def _view(self, view: str | None) -> dict[str, RowArray]:
        if view not in self._by_view:
            has = ", ".join(self.views) or "none but the base view"
            raise PipeError(f"this cache has no view {view!r}", where=self.path, fix=f"it has {has}")
        return self._by_view[view]

    def _checked(self, rows: Any) -> np.ndarray:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise PipeError(f"rows must be a list of whole numbers, not {wanted.dtype} of shape {wanted.shape}")
        wanted = wanted.astype(np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self.rows)]
        if len(outside):
            raise PipeError(
                f"the cache has rows 0 to {self.rows - 1:,}; asked for {named_rows(outside)}", where=self.path
            )
        state = self.state()[wanted]
        if (state != layout.OK).any():
            absent, broken = wanted[state == layout.ABSENT], wanted[state == layout.UNDECODABLE]
            parts = [f"absent {named_rows(absent)}"] if len(absent) else []
            parts += [f"undecodable {named_rows(broken)}"] if len(broken) else []
            fix = FIX if len(absent) else "leave them out: Cache.state() says which rows are ok"
            raise PipeError(f"rows without teacher features: {'; '.join(parts)}", where=self.path, fix=fix)
        return wanted


def check_matches(
    cache: Cache,
    *,
    manifest_fingerprint: str | None = None,
    teacher: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a cache of another manifest or teacher, or fitted otherwise, naming the first field that differs.

    Args:
        manifest_fingerprint: of the manifest in use; None asks nothing.
        teacher: the fields of the teacher's fingerprint to compare (a subset will do); None asks nothing.
        settings: those of the cache's settings to compare; None asks nothing.
    """
    difference = None
    if manifest_fingerprint is not None:
        difference = layout.first_difference(manifest_fingerprint, cache.manifest_fingerprint, "manifest_fingerprint")
    if difference is None and teacher is not None:
        difference = layout.first_difference(teacher, cache.teacher, "teacher")
    if difference is None and settings is not None:
        difference = layout.first_difference(settings, cache.settings, "settings")
    if difference:
        raise PipeError(
            f"this cache does not match: {difference}",
            where=cache.path,
            fix="extract it again (pipe extract-teacher, into a new workspace), or use the settings it was made with",
        )
