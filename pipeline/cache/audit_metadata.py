"""Auditing what all rows of a store share: digest.json, every zarr.json, and the small arrays.

Metadata is not believed, it is compared: every zarr.json with the bytes that `layout` gives for it, the digest with the
files. Of arrays that were encoded otherwise (a compressed copy) it is compared what must hold: shape, type, checksums.

Legend: R rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout, seals
from pipeline.cache.audit_plan import (
    OWN_SHAPE,
    Plan,
    array_documents,
    borne_out,
    group_documents,
    plan_of_documents,
    plan_of_header,
)
from pipeline.cache.findings import RESTORE, Finding
from pipeline.cache.remote_path import RemotePath
from pipeline.cache.shards import CRC_BYTES, without_crc
from pipeline.errors import PipeError

PLACES = ("*", f"{layout.VIEWS}/*", f"{layout.VIEWS}/*/*")  # of arrays and groups below a store


class MetadataAudit:
    """What was found in the metadata; `run` does the work.

    Attributes:
        findings: all of them.
        plan: what rows to look for, or None where nothing says so any more.
        covered: the files that the digest should cover, relative paths.
        header: the group's attributes, {} where they cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.findings = root, list[Finding]()
        self.plan: Plan | None = None
        self.covered: set[str] = {layout.METADATA}
        self.header: dict[str, Any] = {}
        self.growing: dict[str, bytes] = {}  # files that are about to be replaced by these
        self.otherwise: set[str] = set()  # arrays whose zarr.json is sound JSON in another form than ours

    def run(self) -> MetadataAudit:
        self._growth()
        recorded = self._digest_file()
        listed = set(recorded["files"]) if recorded else set()
        documents = self._documents(listed)
        planned = self._plan_of_header(documents, listed)
        arrays = {} if planned is None else array_documents(self.header, planned, documents, listed)
        groups = {} if planned is None else group_documents(planned)
        self._compare(groups | arrays, documents)
        for name in sorted(self.otherwise - (planned.foreign if planned else set())):
            self._note("altered (not in the form in which it was written)", f"{name}/{layout.METADATA}", name)
        self._small_arrays(arrays, planned)
        intact = self._check_digest(recorded, listed)
        if planned is not None and (intact or borne_out(planned, arrays, documents, listed)):
            self.plan = planned
        else:
            self.plan = plan_of_documents(self.root, documents) or planned
        if not intact:  # what the attributes leave out is then not yet a stray file
            self.covered |= listed | {f"{name}/{layout.METADATA}" for name in documents}
        return self

    def _note(self, what: str, file: str, array: str | None = None, *, fix: str = RESTORE) -> None:
        self.findings.append(Finding(what, file, array, fix=fix))

    def _read(self, name: str, array: str | None = None) -> bytes | None:
        """A file's bytes, or None after a finding."""
        if name in self.growing:
            return self.growing[name]
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            self._note("the file is missing", name, array)
        except OSError as error:
            self._note(f"the file cannot be read ({error.strerror})", name, array)
        return None

    def _json(self, name: str, array: str | None = None) -> dict[str, Any] | None:
        """A file's JSON object, which must be written in the store's one form (of an array it is asked later: other
        programs have their own); None after a finding."""
        if (data := self._read(name, array)) is None:
            return None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._note("damaged (no JSON object)", name, array)
            return None
        if not _is_canonical(value, data) and array is not None:
            self.otherwise.add(array)
        elif not _is_canonical(value, data):
            self._note("altered (not in the form in which it was written)", name)
        return value

    def _growth(self) -> None:
        """What growing.json holds counts for the files that it is about to replace; that is no damage."""
        if not (self.root / layout.GROWING).exists() or (value := self._json(layout.GROWING)) is None:
            return
        files = value.get("files")
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            self._note("altered (not a list of files)", layout.GROWING)
            return
        self.growing = {name: text.encode(errors="surrogatepass") for name, text in files.items()}
        what = "the cache is being made larger, or that was cut off; pipe extract-teacher goes on with it"
        self.findings.append(Finding(what, layout.GROWING, kind="unfinished"))

    def _digest_file(self) -> dict[str, Any] | None:
        """digest.json, where it has what it must."""
        recorded = self._json(layout.DIGEST)
        if recorded is None:
            return None
        files, digest = recorded.get("files"), recorded.get("sha256")
        sound = isinstance(files, list) and all(isinstance(name, str) for name in files) and isinstance(digest, str)
        if not sound or set(recorded) != {"files", "sha256"} or sorted(set(files or ())) != files:
            self._note("altered (not a sorted list of files and their digest)", layout.DIGEST)
        return recorded if sound else None

    def _documents(self, listed: set[str]) -> dict[str, dict[str, Any]]:
        """Array or group → its zarr.json as it is, the store's own attributes into `header`."""
        group = self._json(layout.METADATA)
        if group is not None:
            attributes = group.get("attributes")
            self.header = attributes if isinstance(attributes, dict) else {}
            if group != layout.group_document(self.header):
                self._note("altered (not the metadata of a group)", layout.METADATA)
        found = {}
        for name in sorted(self._names(listed)):
            if (document := self._json(f"{name}/{layout.METADATA}", name)) is not None:
                found[name] = document
        return found

    def _names(self, listed: set[str]) -> set[str]:
        """Arrays and groups that have a zarr.json; of a remote store, which lists no files, those in `listed`."""
        if isinstance(self.root, RemotePath):
            return {name.removesuffix(f"/{layout.METADATA}") for name in listed if name.endswith(f"/{layout.METADATA}")}
        files = (file for place in PLACES for file in self.root.glob(f"{place}/{layout.METADATA}"))
        return {file.parent.relative_to(self.root).as_posix() for file in files}

    def _plan_of_header(self, documents: Mapping[str, Any], listed: set[str]) -> Plan | None:
        """What the group's attributes say is there, or None after a finding."""
        if not self.header:
            return None
        try:
            if self.header["format"] != layout.FORMAT or self.header["version"] != layout.VERSION:
                self._note(f"not a {layout.FORMAT} of version {layout.VERSION}", layout.METADATA)
            return plan_of_header(self.root, self.header, documents, listed)
        except (KeyError, TypeError, ValueError):
            self._note("altered (its attributes are not those of a teacher cache)", layout.METADATA)
            return None

    def _compare(self, expected: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
        """Every zarr.json against what `layout` writes."""
        for name, document in expected.items():
            file = f"{name}/{layout.METADATA}"
            self.covered.add(file)
            if name not in documents:
                if not (self.root / file).exists():
                    self._note("the file is missing", file, name)
            elif documents[name] != document:
                fields = [key for key in document if documents[name].get(key) != document[key]]
                what = ", ".join(f"`{key}`" for key in fields) or "unknown keys"
                self._note(f"not what the cache's attributes say: {what}", file, name)

    def _small_arrays(self, expected: Mapping[str, Any], plan: Plan | None) -> None:
        """The chunk of each small array: length, checksum, values."""
        several = {layout.STATE, layout.SATURATED, seals.SEALS, *(a.name for a in plan.arrays)} if plan else set()
        for name in (name for name in expected if name not in several):
            shape, dtype = expected[name]["shape"], np.dtype(expected[name]["data_type"]).newbyteorder("<")
            if 0 in shape:
                continue
            file = layout.chunk_path(name, 0, len(shape))
            self.covered.add(file)
            if (data := self._read(file, name)) is None:
                continue
            length = int(np.prod(shape)) * dtype.itemsize + CRC_BYTES
            if len(data) != length:
                self._note(f"{len(data):,} bytes where there should be {length:,}", file, name)
                continue
            try:
                values = np.frombuffer(without_crc(data, self.root / file), dtype)
            except PipeError:
                self._note("the checksum does not fit", file, name)
                continue
            if name in OWN_SHAPE and plan is not None and not ((values >= 0) & (values < plan.rows)).all():
                self._note("rows that the cache does not have", file, name)
            if name not in OWN_SHAPE and not np.isfinite(values).all():
                self._note("values are not finite", file, name)

    def _check_digest(self, recorded: Mapping[str, Any] | None, listed: set[str]) -> bool:
        """The digest against the files; whether it fits."""
        if recorded is None:
            return False
        for name in sorted(listed - self.covered) if self.plan_known else []:
            self._note(f"lists a file that it does not cover: {name}", layout.DIGEST)
        for name in sorted(self.covered - listed) if self.plan_known else []:
            self._note(f"does not cover {name}", layout.DIGEST)
        try:
            digest = layout.digest_of(self.root, recorded["files"], self.growing)
        except PipeError:
            self._note("cannot be compared: a file that it covers cannot be read", layout.DIGEST)
            return False
        if digest != recorded["sha256"]:
            named = any(finding.file in self.covered or finding.file == layout.DIGEST for finding in self.findings)
            what = "the files that it covers" if named else "the attributes in zarr.json: one of the two was altered"
            self._note(f"does not fit {what}", layout.DIGEST)
        return bool(digest == recorded["sha256"])

    @property
    def plan_known(self) -> bool:
        """Whether `covered` holds more than the group's own file."""
        return len(self.covered) > 1


def _is_canonical(value: Any, data: bytes) -> bool:
    try:
        return layout.json_bytes(value) == data
    except (ValueError, RecursionError):  # NaN, half a surrogate pair
        return False
