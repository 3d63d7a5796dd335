"""The suite: which benchmarks there are, of which kind, where they lie and how to obtain them; and opening them.

An entry of configs/suites/NAME.yaml (`entries:` is a list of these):

    name      the benchmark's name in tables; several entries may share it (zero-shot and probe of one dataset)
    kind      retrieval | zero_shot | probe
    path      folder relative to evaluate.datasets; for retrieval also a glob or brace range of tars, or a CSV
    split     what is scored (default: test); for retrieval only the label of the row
    train     the probe's training split (default: train)
    domains   a probe's domains: fit on all others, test on each in turn (instead of train and split)
    obtain    one line on where to get it

A dataset that is not there is `Absent`: the caller lists it as a gap.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.console import log
from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.sources import expand
from pipeline.errors import PipeError
from pipeline.evaluation.datasets import Absent, Classification, open_classification
from pipeline.evaluation.embeddings import hash_json


class Entry(BaseModel):
    """One line of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    kind: Literal["retrieval", "zero_shot", "probe"]
    path: str = Field(min_length=1)
    split: str = "test"
    train: str = "train"
    domains: tuple[str, ...] = ()
    obtain: str = ""

    @model_validator(mode="after")
    def _domains_belong_to_probes(self) -> Entry:
        if self.domains and self.kind != "probe":
            raise ValueError("domains are for kind probe")
        if len(self.domains) == 1:
            raise ValueError("one domain cannot be left out of one")
        return self

    @property
    def splits(self) -> list[str]:
        """The folders this entry reads."""
        if self.domains:
            return list(self.domains)
        return [self.split] if self.kind == "zero_shot" else [self.train, self.split]


@dataclass(frozen=True)
class ManifestImages:
    """Unique images of a manifest. Implements `embeddings.Images`."""

    reader: SampleReader
    rows: NDArray[np.int64]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> Image.Image:
        return self.reader.image(int(self.rows[index]))


@dataclass(frozen=True)
class Retrieval:
    """Unique images and unique captions, and which belong together: `pair_image`, `pair_text` (P,) int64."""

    images: ManifestImages
    texts: tuple[str, ...]
    pair_image: NDArray[np.int64]
    pair_text: NDArray[np.int64]
    split: str

    @property
    def digest(self) -> str:
        return hash_json([self.images.digest, self.texts, self.pair_image.tolist(), self.pair_text.tolist()])


def parse_suite(mapping: Mapping[str, Any], where: str) -> list[Entry]:
    """Entries of a suite's YAML, all problems at once; an unknown key is refused with the nearest valid one."""
    rows = mapping.get("entries")
    if set(mapping) - {"entries", "title"} or not isinstance(rows, list):
        raise PipeError("a suite is a mapping with `entries: [...]`", where=where)
    entries: list[Entry] = []
    problems: list[str] = []
    for number, row in enumerate(rows):
        try:
            entries.append(Entry.model_validate(row))
        except ValidationError as error:
            label = row.get("name", number) if isinstance(row, dict) else number
            problems += [f"entry {label}: {_explain(problem)}" for problem in error.errors()]
    seen = [(entry.name, entry.kind) for entry in entries]
    problems += [f"two entries are {name} {kind}" for name, kind in sorted({s for s in seen if seen.count(s) > 1})]
    if problems:
        raise PipeError("; ".join(problems), where=where, fix=f"keys are {', '.join(Entry.model_fields)}")
    return entries


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{key} {problem['msg']}".strip()
    near = difflib.get_close_matches(key, Entry.model_fields, n=1)
    return f"unknown key {key}" + (f" (did you mean {near[0]}?)" if near else "")


def open_entry(entry: Entry, root: Path, cache: Path, workers: int) -> Retrieval | Classification:
    """The entry's data under `root` (evaluate.datasets); indices are kept in `cache`.

    Raises:
        Absent: it is not there.
    """
    if entry.kind != "retrieval":
        return open_classification(root / entry.path, entry.splits, cache)
    source = root / entry.path
    pattern = any(c in entry.path for c in "*?[{")
    if not pattern and not source.exists():
        raise Absent(f"no {entry.path}")
    try:
        files = [file.path for file in expand(str(source)).files]
    except PipeError as error:
        if pattern:
            raise Absent(f"nothing matches {entry.path}") from error
        raise
    signature = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    manifest = cache / "datasets" / f"{hash_json(signature)[:40]}.parquet"
    if not manifest.exists():
        build_manifest(str(source), manifest, workers=workers)
    return retrieval_of(read_manifest(manifest), None, entry.split)


def retrieval_of(manifest: Manifest, part: Literal["train", "val"] | None, split: str) -> Retrieval:
    """Unique images (by SHA-256) and unique captions of a manifest's usable rows.

    Args:
        part: the manifest's split to take; None: all rows.
        split: what records call it.
    """
    first_row: dict[str, int] = {}
    position: dict[str, int] = {}
    texts: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    rows = manifest.rows(part)
    for row, sha256 in zip(rows.tolist(), manifest.column("sha256")[rows].tolist(), strict=True):
        first_row.setdefault(sha256, row)
        image = position.setdefault(sha256, len(position))
        for caption in manifest.captions(row):
            pairs[image, texts.setdefault(caption, len(texts))] = None
    if not pairs:
        raise PipeError("no usable pair of image and caption", where=manifest.path, fix="see `pipe index`'s summary")
    if len(first_row) < len(rows):
        log.info("%s: %d copies of images are merged", split, len(rows) - len(first_row))
    pair_image, pair_text = np.array(list(pairs), dtype=np.int64).T
    images = ManifestImages(SampleReader(manifest), np.array(list(first_row.values())), hash_json(list(first_row)))
    return Retrieval(images, tuple(texts), pair_image, pair_text, split)


def subset(data: Retrieval, keep: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of the kept images (N,) bool, renumbered: pair_image, pair_text, and the texts (T',) that they use."""
    new_image = np.cumsum(keep) - 1
    pairs = keep[data.pair_image]
    used, pair_text = np.unique(data.pair_text[pairs], return_inverse=True)
    return new_image[data.pair_image[pairs]], pair_text.astype(np.int64), used.astype(np.int64)
