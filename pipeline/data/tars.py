"""One tar of samples: key.jpg, key.txt, key.json, as img2dataset and cc3m-wds write them.

A tar is read once, in order. What can be read is read: a cut or damaged tar gives the samples before the damage.
As in webdataset, a member's key is its path up to the first dot of its name, what follows is its kind.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.data.captions import MAX_CAPTION_BYTES, read_captions
from pipeline.data.manifest import Issue, Source
from pipeline.data.scan import IMAGE_MISSING, KEY_REPEATED, Sample, Scan, to_table, valid_utf8

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
TEXT, JSON = "txt", "json"
KINDS = (*IMAGE_KINDS, TEXT, JSON)
BLOCK, RECORD = 512, 10_240  # bytes: tar's unit, and what writers pad the end to
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


@dataclass
class Group:
    """The members of one key: kind → (offset of the data, size), in the tar's order."""

    key: str
    repeated: bool
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""


def scan_tar(name: str, path: Path) -> Scan:
    """Read one tar. Nothing in it is fatal: what is wrong with a key stands in its row, the rest among the issues."""
    try:
        with open(path, "rb") as file:
            walk = _Walk(file)
            samples = [_sample(group, file) for group in _groups(walk.members())]
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stat = path.stat()
    except OSError as error:
        issue = Issue(name, "", "source_unreadable", error.strerror or str(error))
        return Scan(Source(name, "tar", 0, 0, "", 0), to_table([]), [issue])
    issues = [Issue(name, "", status, reason) for status, reason in walk.problems]
    if not samples and not issues:
        issues.append(Issue(name, "", "source_empty", "no sample in it"))
    source = Source(name, "tar", stat.st_size, stat.st_mtime_ns, digest, len(samples))
    return Scan(source, to_table(samples), issues)


def read_groups(file: BinaryIO) -> tuple[list[Group], list[tuple[str, str]]]:
    """Where the samples of an open tar lie, by key; and (status, reason) of what is wrong with the tar itself.

    Only headers are read: no image, and no caption.
    """
    walk = _Walk(file)
    return _groups(walk.members()), walk.problems


def captions_of(group: Group, file: BinaryIO) -> list[str]:
    """The usable captions of a sample, read from its open tar."""
    parts = {kind: _caption_part(file, group.parts[kind]) for kind in (TEXT, JSON) if kind in group.parts}
    return read_captions(parts.get(TEXT), parts.get(JSON)).texts


class _Walk:
    """The members of a tar, and in `problems` why their list ends where it should not."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.problems = file, list[tuple[str, str]]()
        self.size = file.seek(0, 2)

    def members(self) -> Iterator[tarfile.TarInfo]:
        self.file.seek(0)
        if self.size == 0:
            self.problems.append(("source_empty", "0 bytes"))
            return
        try:
            tar = tarfile.TarFile(fileobj=self.file, mode="r", encoding="utf-8", errors="surrogateescape")
        except (tarfile.TarError, ValueError) as error:
            self.problems.append(("source_not_tar", self._not_a_tar(error)))
            return
        count = end = 0
        try:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= end:  # older versions of tarfile would walk in circles
                    raise tarfile.ReadError("a size that cannot be")
                count, end = count + 1, tar.offset
                yield member
        except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
            self.problems.append(("source_cut", f"{error} after {count} files, at byte {min(tar.offset, self.size):,}"))
            return
        self._check_end(tar.offset, count)

    def _not_a_tar(self, error: Exception) -> str:
        self.file.seek(0)
        head = self.file.read(8)
        packed = next((packer for magic, packer in _PACKED.items() if head.startswith(magic)), None)
        return f"it is packed with {packed}: unpack it first" if packed else f"not a tar ({error})"

    def _check_end(self, offset: int, count: int) -> None:
        """tarfile takes whatever is no header for the end: only zeros to the end of the file are one."""
        self.file.seek(offset)
        block = self.file.read(BLOCK)
        if not block:
            self.problems.append(("source_cut", f"no end mark after {count} files: more may have followed"))
            return
        if block.strip(b"\0"):
            self.problems.append(("source_cut", f"no valid header after {count} files, at byte {offset:,}"))
            return
        while chunk := self.file.read(2**20):
            if chunk.strip(b"\0"):
                self.problems.append(("source_cut", f"data behind the end mark, not read, from byte {offset:,}"))
                return
        if self.size - offset > 2 * RECORD and count == 0:
            self.problems.append(("source_empty", f"{self.size:,} bytes of zeros"))


def _groups(members: Iterator[tarfile.TarInfo]) -> list[Group]:
    """Members by key, keys in order of first appearance.

    A key whose kind comes a second time starts a group of its own, and later members of the key belong to that: a
    caption then never joins an earlier image that it may not describe.
    """
    groups: list[Group] = []
    newest: dict[str, Group] = {}
    for member in members:
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, kind = base.partition(".")
        kind = kind.lower()
        if member.isdir() or not stem or kind.rpartition(".")[2] not in KINDS:
            continue
        key = valid_utf8(folder + slash + stem)
        group = newest.get(key)
        if group is None or kind in group.parts:
            group = Group(key, repeated=group is not None)
            newest[key] = group
            groups.append(group)
        if not member.isreg() or member.issparse():
            group.note = f"{valid_utf8(base)} is a link or sparse, not a plain file"
        elif kind in KINDS:
            group.parts[kind] = (member.offset_data, member.size)
        elif not group.note:
            group.note = f"{valid_utf8(base)} is not {stem}.{kind.rpartition('.')[2]}"
    return groups


def _sample(group: Group, file: BinaryIO) -> Sample:
    sample = Sample(group.key)
    images = [kind for kind in group.parts if kind in IMAGE_KINDS]
    if group.repeated:
        sample.mark(KEY_REPEATED, "an earlier sample of this tar has this key")
    if images:
        sample.image_offset, sample.image_bytes = group.parts[images[0]]
        if not sample.refuse_size():
            sample.check_image(_read(file, sample.image_offset, sample.image_bytes))
    else:
        sample.mark(IMAGE_MISSING, group.note or "no image")
    captions = {kind: _caption_part(file, group.parts[kind]) for kind in (TEXT, JSON) if kind in group.parts}
    for kind in captions:
        if sample.caption_offset < 0:
            sample.caption_offset, sample.caption_bytes = group.parts[kind]
    sample.take_captions(read_captions(captions.get(TEXT), captions.get(JSON)))
    if None in captions.values():
        sample.add_reason("a caption is cut")
    return sample


def _caption_part(file: BinaryIO, part: tuple[int, int]) -> bytes | None:
    """The bytes of a text or JSON member: None if it is cut (half a caption is none), of a far too long one a part."""
    wanted = min(part[1], MAX_CAPTION_BYTES + 1)
    data = _read(file, part[0], wanted)
    return data if len(data) == wanted else None


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
