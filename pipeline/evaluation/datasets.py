"""Classification datasets on disk: CLIP_benchmark's webdatasets and image folders, indexed once.

    webdataset      ROOT/SPLIT/N.tar with KEY.jpg|png|webp and KEY.cls (a class number), ROOT/SPLIT/nshards.txt,
                    ROOT/classnames.txt, ROOT/zeroshot_classification_templates.txt (with {c})
    image folder    ROOT/SPLIT/CLASS/*.jpg|png|webp; classes are the folders in sorted order

The index (where each image's bytes lie, their SHA-256, the label) is kept as JSON beside the embeddings and is made
again when a file's size or time changes. A sample without a usable label is counted, logged and skipped.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.console import log, progress
from pipeline.data.samples import SampleError, decode_image
from pipeline.errors import PipeError
from pipeline.evaluation.embeddings import hash_json
from pipeline.evaluation.zero_shot import TEMPLATES
from pipeline.run_folder import read_json, write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CLASS_NAMES = "classnames.txt"
PROMPTS = "zeroshot_classification_templates.txt"
INDEX_VERSION = 1


class Absent(Exception):
    """The dataset, or a split of it, is not there: a gap in the table, not an error."""


@dataclass(frozen=True)
class Member:
    """One labelled image: `size` bytes at `offset` of `file` (relative to the dataset's root)."""

    file: str
    offset: int
    size: int
    sha256: str
    label: int


@dataclass(frozen=True)
class StoredImages:
    """Images that are byte ranges of files. Implements `embeddings.Images`; loading is safe from threads."""

    root: Path
    members: tuple[Member, ...]

    @property
    def digest(self) -> str:
        return hash_json([member.sha256 for member in self.members])

    def __len__(self) -> int:
        return len(self.members)

    def load(self, index: int) -> Image.Image:
        member = self.members[index]
        try:
            with open(self.root / member.file, "rb") as file:
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise SampleError(f"cannot read: {error}") from error
        return decode_image(data)


@dataclass(frozen=True)
class LabelledImages:
    """One split: images and their class numbers (n,) int64."""

    images: StoredImages
    labels: NDArray[np.int64]

    @property
    def digest(self) -> str:
        return hash_json([self.images.digest, self.labels.tolist()])


@dataclass(frozen=True)
class Classification:
    """A dataset's splits with the words for its classes."""

    splits: dict[str, LabelledImages]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all that decides a number here: images, labels, class names, templates."""
        splits = {name: split.digest for name, split in self.splits.items()}
        return hash_json([splits, self.class_names, self.templates])


def open_classification(root: Path, splits: list[str], cache: Path) -> Classification:
    """Open the named splits of a dataset of either layout.

    Args:
        root: the dataset's folder.
        splits: names of folders in it.
        cache: where indices are kept.

    Raises:
        Absent: the folder or a split is not there.
        PipeError: it is there, but nothing in it can be used.
    """
    if not root.is_dir():
        raise Absent(f"no folder {root.name}")
    for split in splits:
        if not (root / split).is_dir():
            raise Absent(f"no split {split} in {root.name}")
    names = _lines(root / CLASS_NAMES)
    folders = _class_folders(root, splits)
    if names is None:
        if not folders:
            raise PipeError(f"no {CLASS_NAMES} and no class folders", where=root, fix="see `obtain` in the suite")
        names = [_spoken(folder) for folder in folders]
    elif folders:
        folders = _in_order_of(names, folders, root)
    found = {}
    for split in splits:
        members = _index(root, split, folders, len(names), cache)
        if not members:
            raise PipeError("not one labelled image", where=root / split, fix="see `obtain` in the suite")
        labels = np.array([member.label for member in members], dtype=np.int64)
        found[split] = LabelledImages(StoredImages(root, tuple(members)), labels)
    templates = _lines(root / PROMPTS) or list(TEMPLATES)
    wrong = [template for template in templates if "{c}" not in template]
    if wrong:
        raise PipeError(f"a template without {{c}}: {wrong[0]!r}", where=root / PROMPTS)
    return Classification(found, tuple(names), tuple(templates))


def _lines(path: Path) -> list[str] | None:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise PipeError("not UTF-8 text", where=path) from error


def _class_folders(root: Path, splits: list[str]) -> list[str]:
    """Names of class folders over all splits, sorted: a class that only one split has keeps its number in the other.

    A folder without an image (or a hidden one) is no class.
    """
    within = [folder for split in splits for folder in (root / split).iterdir() if folder.is_dir()]
    return sorted({folder.name for folder in within if not folder.name.startswith(".") and _has_image(folder)})


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES and path.is_file() for path in folder.rglob("*"))


def _spoken(folder: str) -> str:
    return folder.replace("_", " ")


def _in_order_of(names: list[str], folders: list[str], root: Path) -> list[str]:
    """Folders by class number: matched by name where the names are the same, else by position (WordNet ids, say)."""
    asked, there = [_spoken(name).lower() for name in names], [_spoken(folder).lower() for folder in folders]
    if sorted(asked) == sorted(there):
        return [folders[there.index(name)] for name in asked]
    elsewhere = [name for k, name in enumerate(asked) if name in there and there.index(name) != k]
    if len(names) != len(folders) or elsewhere:
        by_position = f"; {elsewhere[0]!r} would be another folder's" if elsewhere else ""
        raise PipeError(
            f"{len(names)} class names do not fit {len(folders)} class folders{by_position}",
            where=root / CLASS_NAMES,
            fix="name every folder, or give one line a folder in the folders' sorted order",
        )
    return folders


def _index(root: Path, split: str, folders: list[str], classes: int, cache: Path) -> list[Member]:
    files = sorted(p for p in (root / split).rglob("*") if p.suffix.lower() in {".tar", *SUFFIXES} and p.is_file())
    tars = [p for p in files if p.suffix == ".tar" and p.parent == root / split]
    signature = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in tars or files]
    key = hash_json([INDEX_VERSION, str(root.resolve()), split, folders, classes, signature])
    kept = cache / "datasets" / f"{key[:40]}.json"
    if kept.exists():
        return [Member(**row) for row in read_json(kept)]
    members: list[Member] = []
    skipped: dict[str, int] = {}
    source = _walk_tars(root, _complete(root / split, tars)) if tars else _walk_folders(root, split, files, folders)
    with progress(f"indexing {root.name}/{split}", unit="images") as bar:
        for member, problem in source:
            if problem is None and not 0 <= member.label < classes:
                problem = f"class {member.label} of {classes}"
            if problem is None:
                members.append(member)
            else:
                skipped[problem] = skipped.get(problem, 0) + 1
            bar.advance()
    for problem, count in sorted(skipped.items()):
        log.warning("%s/%s: %d skipped (%s)", root.name, split, count, problem)
    write_json(kept, [asdict(member) for member in members])
    return members


def _complete(folder: Path, tars: list[Path]) -> list[Path]:
    """Tars in numerical order; shards that nshards.txt promises and that are not there are logged by name."""
    promised = _lines(folder / "nshards.txt")
    if promised and promised[0].isdigit():
        missing = [n for n in range(int(promised[0])) if not (folder / f"{n}.tar").exists()]
        if missing:
            log.warning("%s: tars that nshards.txt names are not there: %s", folder, ", ".join(map(str, missing)))
    return sorted(tars, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.stem)])


def _walk_tars(root: Path, tars: list[Path]) -> Iterator[tuple[Member, str | None]]:
    for path in tars:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar:
                    if info.isfile():
                        _collect(samples, tar, info)
        except (tarfile.TarError, OSError, EOFError) as error:
            log.warning("%s ends early (%s): what came before is used", path, error)
        for sample in samples.values():
            if "sha256" not in sample:
                continue  # a label, or something else, without an image
            label, problem = _label(sample.get("cls"))
            relative = str(path.relative_to(root))
            yield Member(relative, sample["offset"], sample["size"], sample["sha256"], label), problem


def _collect(samples: dict[str, dict[str, Any]], tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    folder, _, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    wanted = f".{extension.lower()}"
    if wanted != ".cls" and wanted not in SUFFIXES:
        return
    file = tar.extractfile(info)
    if file is None:
        return
    data = file.read()
    if len(data) < info.size:
        raise tarfile.ReadError(f"{info.name} is cut")
    sample = samples.setdefault(f"{folder}/{stem}", {})
    if wanted == ".cls":
        sample["cls"] = data
    else:
        sample.update(offset=info.offset_data, size=info.size, sha256=hashlib.sha256(data).hexdigest())


def _label(text: bytes | None) -> tuple[int, str | None]:
    if text is None:
        return -1, "no .cls"
    try:
        return int(text.decode("ascii").strip()), None
    except (UnicodeDecodeError, ValueError):
        return -1, "the .cls is no number"


def _walk_folders(root: Path, split: str, files: list[Path], folders: list[str]) -> Iterator[tuple[Member, str | None]]:
    number = {name: k for k, name in enumerate(folders)}
    for path in files:
        parts = path.relative_to(root / split).parts
        label = number.get(parts[0], -1) if len(parts) > 1 else -1
        problem = None if label >= 0 else "not in a class folder"
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        yield Member(str(path.relative_to(root)), 0, len(data), digest, label), problem
