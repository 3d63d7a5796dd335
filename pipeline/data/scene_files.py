"""Generated scenes on disk: image-text tars as img2dataset writes them, and labelled sets as CLIP_benchmark reads them.

    OUT/00000.tar ...       KEY.png, KEY.txt (the first caption), KEY.json (`captions`: all, `labels`: ground truth)
    OUT/SPLIT/0.tar ...     KEY.png, KEY.cls (a class number); OUT/SPLIT/nshards.txt, OUT/classnames.txt and
                            OUT/zeroshot_classification_templates.txt

Every file appears whole or not at all, and has the same bytes each time (with the same Pillow: its PNG encoder).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

from pipeline.console import progress
from pipeline.data.scene_captions import captions
from pipeline.data.scenes import COLOURS, SHAPES, TEXTURES, Style, draw, make_scene
from pipeline.run_folder import write_bytes

# attribute of the dominant object → its classes, and prompts in words that captions use too
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES}
PROMPTS = {
    "shape": ("a {c}", "one {c}", "a large {c}", "a picture of a {c}"),
    "colour": ("something {c}", "one {c} shape", "one large {c} thing", "we see one {c} object"),
    "texture": ("a {c} shape", "a large {c} thing", "one {c} object", "a picture of a {c} shape"),
}

Members = list[tuple[str, bytes]]


def write_scenes(
    out: Path, n: int, seed: int, *, style: Style = "plain", size: int = 64, tar_size: int = 500, workers: int = 1
) -> list[Path]:
    """Write scenes 0 … n - 1 of series `seed` as img2dataset tars, `tar_size` a tar.

    Args:
        size: pixels a side.
        workers: processes that draw.

    Returns:
        the tars, in order.
    """
    jobs = [(out / f"{k:05d}.tar", range(a, min(a + tar_size, n))) for k, a in enumerate(range(0, n, tar_size))]
    sample = partial(_pair, seed=seed, style=style, size=size)
    _write_tars(jobs, sample, f"drawing {out.name}", workers)
    return [path for path, _ in jobs]


def write_probe_set(
    out: Path,
    attribute: str,
    splits: dict[str, tuple[int, int, Style]],
    *,
    size: int = 64,
    tar_size: int = 500,
    workers: int = 1,
) -> None:
    """Write a classification benchmark: which `attribute` has the dominant (largest) object?

    Args:
        attribute: "shape", "colour" or "texture".
        splits: name → (number of images, seed of the series, style).

    Raises:
        ValueError: there is no such attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"no attribute {attribute!r}: one of {', '.join(ATTRIBUTES)}")
    for split, (n, seed, style) in splits.items():
        folder = out / split
        jobs = [(folder / f"{k}.tar", range(a, min(a + tar_size, n))) for k, a in enumerate(range(0, n, tar_size))]
        sample = partial(_labelled, attribute=attribute, seed=seed, style=style, size=size)
        _write_tars(jobs, sample, f"drawing {out.name}/{split}", workers)
        write_bytes(folder / "nshards.txt", f"{len(jobs)}\n".encode())
    write_bytes(out / "classnames.txt", ("\n".join(ATTRIBUTES[attribute]) + "\n").encode())
    write_bytes(out / "zeroshot_classification_templates.txt", ("\n".join(PROMPTS[attribute]) + "\n").encode())


def _pair(index: int, *, seed: int, style: Style, size: int) -> Members:
    scene = make_scene(seed, index)
    texts, key = captions(scene), f"{index:09d}"
    about = {
        "key": key,
        "status": "success",
        "caption": texts[0],
        "captions": texts,
        "width": size,
        "height": size,
        "style": style,
        "labels": scene.labels(),
    }
    return [
        (f"{key}.png", _png(seed, index, style, size)),
        (f"{key}.txt", texts[0].encode()),
        (f"{key}.json", json.dumps(about, sort_keys=True).encode()),
    ]


def _labelled(index: int, *, attribute: str, seed: int, style: Style, size: int) -> Members:
    scene = make_scene(seed, index)
    label = ATTRIBUTES[attribute].index(getattr(scene.dominant, attribute))
    return [(f"s{index:07d}.png", _png(seed, index, style, size)), (f"s{index:07d}.cls", str(label).encode())]


@lru_cache(maxsize=2048)  # small sets of the same scenes are written once for each attribute
def _png(seed: int, index: int, style: Style, size: int) -> bytes:
    stream = io.BytesIO()
    draw(make_scene(seed, index), size=size, style=style).save(stream, "PNG")
    return stream.getvalue()


def _write_tars(
    jobs: list[tuple[Path, range]], sample: Callable[[int], Members], description: str, workers: int
) -> None:
    with progress(description, total=sum(len(indices) for _, indices in jobs), unit="images") as bar:
        if workers <= 1 or len(jobs) == 1:
            for path, indices in jobs:
                bar.advance(_write_tar((path, indices), sample))
            return
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            for done in pool.map(partial(_write_tar, sample=sample), jobs):
                bar.advance(done)


def _write_tar(job: tuple[Path, range], sample: Callable[[int], Members]) -> int:
    path, indices = job
    write_bytes(path, tar_bytes(member for index in indices for member in sample(index)))
    return len(indices)


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content), the same bytes each time: no clock, no owner."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()
