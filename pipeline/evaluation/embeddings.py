"""Embeddings of a benchmark's images and texts at every node, streamed once and kept.

The store is keyed by (model, data, preprocessing): the same evaluation again reads the arrays and loads no model.
Files are safetensors under workspace/embeddings: nothing in them is executed, and they can be deleted at any time.
Legend: n images or texts, D the width of a node.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from pipeline.console import log, progress
from pipeline.data.samples import SampleError
from pipeline.errors import PipeError
from pipeline.evaluation.model_nodes import image_nodes, text_nodes
from pipeline.run_folder import write_bytes

VERSION = 1  # raise it when the same model and data would give other numbers
OK = "ok"  # (n,) bool beside the nodes: which images could be decoded

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]


class Images(Protocol):
    """A set of images in a fixed order; `digest` is the SHA-256 of what they are."""

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The decoded image; raises SampleError where it cannot be."""
        ...


@dataclass(frozen=True)
class Encoder:
    """A loaded model: what `load` of a run, or of the teacher, comes down to here.

    `preprocess` maps a PIL image to (3, H, W) float32; `tokenizer` maps strings to (n, L) int64 (None: no texts).
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor] | None


class Embedder:
    """One model's embeddings.

    Args:
        name: for messages.
        digest: SHA-256 of the weights and of all that decides the embeddings beside them.
        load: gives the model; called at most once, and only when something is not in the store.
        store: the folder of kept arrays.
        preprocess: a text that names the view and normalisation, part of the key.
    """

    def __init__(
        self,
        name: str,
        *,
        digest: str,
        load: Callable[[], Encoder],
        store: Path,
        preprocess: str = "",
        batch_size: int = 256,
        workers: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.digest, self.preprocess, self.store = name, digest, preprocess, store
        self.batch_size, self.workers = batch_size, workers if workers is not None else usable_cores()
        self.device = device or best_device()
        self._load = load
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """The model, in eval mode on the device; loaded on first use."""
        if self._encoder is None:
            loaded = self._load()
            loaded.model.eval()
            loaded.model.to(self.device)
            self._encoder = loaded
        return self._encoder

    def release(self) -> None:
        """Free the model; a later miss loads it again."""
        self._encoder = None

    def images(self, images: Images, what: str) -> tuple[dict[str, Floats], NDArray[np.bool_]]:
        """Node → (n, D) float32 unit vectors, and the mask (n,) of images that could be decoded (others: zeros)."""
        arrays = dict(self.cached("images", [images.digest], lambda: self._embed_images(images, what)))
        ok = arrays.pop(OK)
        broken = int((~ok).sum())
        if broken:
            log.warning("%s: %d of %d images cannot be decoded and are left out", what, broken, len(ok))
        if not ok.any():
            raise PipeError("not one image can be decoded", where=what, fix="check the files")
        return arrays, ok

    def texts(self, texts: Sequence[str], what: str) -> dict[str, Floats]:
        """Node → (n, D) float32 unit vectors."""
        return self.cached("texts", [hash_json(list(texts))], lambda: self._embed_texts(texts, what))

    def cached(self, kind: str, parts: Sequence[str], compute: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """The arrays of (kind, model, preprocessing, parts): from the store, or computed and stored."""
        key = hash_json([VERSION, kind, self.digest, self.preprocess, *parts])
        path = self.store / kind / f"{key[:40]}.safetensors"
        kept = _read(path)
        if kept is not None:
            return kept
        arrays = {name: np.ascontiguousarray(array) for name, array in compute().items()}
        write_bytes(path, save_arrays(arrays, {"model": self.name, "model_sha256": self.digest, "key": key}))
        return arrays

    def _embed_images(self, images: Images, what: str) -> Arrays:
        encoder = self.encoder
        filled: Arrays = {OK: np.zeros(len(images), dtype=bool)}
        with progress(f"embedding {what} with {self.name}", total=len(images), unit="images") as bar:
            for indices, pixels in loaded_batches(images, encoder.preprocess, self.batch_size, self.workers):
                good = [k for k, p in enumerate(pixels) if p is not None]
                rows = [indices[k] for k in good]
                if good:
                    batch = torch.stack([p for p in pixels if p is not None]).to(self.device)
                    with torch.inference_mode():
                        found = image_nodes(encoder.model, batch)
                    for node, vectors in found.items():
                        _place(filled, node, rows, vectors, len(images))
                    filled[OK][rows] = True
                bar.advance(len(indices))
        return filled

    def _embed_texts(self, texts: Sequence[str], what: str) -> Arrays:
        encoder = self.encoder
        if encoder.tokenizer is None:
            raise PipeError("this model reads no texts", where=self.name, fix="use it for probes only")
        filled: Arrays = {}
        with progress(f"embedding {what} texts with {self.name}", total=len(texts), unit="texts") as bar:
            for start in range(0, len(texts), self.batch_size):
                part = list(texts[start : start + self.batch_size])
                with torch.inference_mode():
                    found = text_nodes(encoder.model, encoder.tokenizer(part).to(self.device))
                for node, vectors in found.items():
                    _place(filled, node, range(start, start + len(part)), vectors, len(texts))
                bar.advance(len(part))
        return filled


def loaded_batches(
    images: Images, preprocess: Callable[[Image.Image], Tensor], batch_size: int, workers: int
) -> Iterator[tuple[list[int], list[Tensor | None]]]:
    """Batches in order, decoded by threads (JPEG decoding and resizing release the GIL): (indices, pixels or None).

    At most two batches are in memory, and their content does not depend on the number of threads.
    """

    def read(index: int) -> Tensor | None:
        try:
            return preprocess(images.load(index))
        except SampleError:
            return None

    total = len(images)
    starts = range(0, total, batch_size)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        waiting: deque[tuple[list[int], list[Future[Tensor | None]]]] = deque()
        for start in starts:
            indices = list(range(start, min(start + batch_size, total)))
            waiting.append((indices, [pool.submit(read, index) for index in indices]))
            if len(waiting) == 2:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        for ready, futures in waiting:
            yield ready, [future.result() for future in futures]


def hash_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_cores() -> int:
    """Cores this process may run on (fewer than the machine's in a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place(filled: Arrays, node: str, rows: Sequence[int], vectors: Tensor, total: int) -> None:
    values = vectors.float().cpu().numpy()
    if not np.isfinite(values).all():  # no comparison with NaN is true, so a rank would come out as the first
        raise PipeError(f"node {node} gives vectors that are not finite", fix="look for non-finite weights in this run")
    if node not in filled:
        filled[node] = np.zeros((total, values.shape[1]), dtype=np.float32)
    filled[node][np.asarray(rows)] = values


def _read(path: Path) -> Arrays | None:
    """Kept arrays; None where there are none, or where a damaged file must be made again."""
    try:
        return dict(load_arrays(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError) as error:
        log.warning("%s is damaged (%s) and is computed again", path, error)
        return None
