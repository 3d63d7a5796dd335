"""Every picture of a source through one model, once: decoded by threads, encoded in batches, written as they come.

What is in memory at a time are two batches of pixels and one row group, whatever the number of images. A picture that
cannot be read or decoded is listed and skipped.
Legend: B images of a batch, S image size, D width of the node.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.pictures import Picture
from pipeline.data.samples import SampleError, decode_image
from pipeline.errors import PipeError
from pipeline.evaluation.embedding_files import Rows, Writer
from pipeline.evaluation.embeddings import Encoder
from pipeline.evaluation.model_nodes import image_nodes, text_nodes
from pipeline.evaluation.records import headline_node

Floats = NDArray[np.float32]
Seen = tuple[Picture, Tensor | str]  # pixels (3, S, S), or why there are none


@dataclass(frozen=True)
class NodeEncoder:
    """A model and one of its nodes. `width`: D; `has_text`: whether texts have this node, too."""

    encoder: Encoder
    node: str
    width: int
    has_text: bool
    device: torch.device

    @classmethod
    def of(cls, encoder: Encoder, node: str | None, device: torch.device) -> NodeEncoder:
        """The node asked for, or the model's output (`gated`; `trunk` of a model without an injection).

        Raises:
            PipeError: the model has no such node.
        """
        encoder.model.eval().to(device)
        size = encoder.model.trunk.image_size
        with torch.inference_mode():
            images = image_nodes(encoder.model, torch.zeros(1, 3, size, size, device=device))
            texts = text_nodes(encoder.model, _tokens(encoder, [""], device))
        chosen = node or headline_node(images)
        if chosen not in images:
            raise PipeError(f"this model has no node {chosen!r}", where="--node", fix=f"it has {', '.join(images)}")
        return cls(encoder, chosen, images[chosen].shape[1], chosen in texts, device)

    def images(self, pixels: Sequence[Tensor]) -> Floats:
        """(B, D) unit vectors of B images (3, S, S)."""
        with torch.inference_mode():
            return self._checked(image_nodes(self.encoder.model, torch.stack(list(pixels)).to(self.device)))

    def texts(self, texts: Sequence[str], batch_size: int) -> Floats:
        """(n, D) unit vectors of n texts."""
        if not self.has_text:
            raise PipeError(f"texts have no node {self.node!r} in this model", where="--node", fix="choose another")
        found = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(texts), batch_size):
            tokens = _tokens(self.encoder, texts[start : start + batch_size], self.device)
            with torch.inference_mode():
                found.append(self._checked(text_nodes(self.encoder.model, tokens)))
        return np.concatenate(found)

    def _checked(self, nodes: dict[str, Tensor]) -> Floats:
        vectors: Floats = nodes[self.node].float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise PipeError(f"node {self.node} gives vectors that are not finite", fix="look at the model's weights")
        return vectors


def _tokens(encoder: Encoder, texts: Sequence[str], device: torch.device) -> Tensor:
    if encoder.tokenizer is None:
        raise PipeError("this model reads no texts")
    return encoder.tokenizer(list(texts)).to(device)


def embed(
    encoder: NodeEncoder,
    pictures: Iterable[Picture],
    writer: Writer,
    *,
    captions: bool = False,
    batch_size: int = 256,
    workers: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
) -> None:
    """Embed `pictures`, in their order, into `writer`.

    Args:
        captions: embed the pictures' captions beside them.
        workers: threads that decode.
        on_batch: called with the number of pictures that were looked at.

    Raises:
        PipeError: vectors that are not finite, or captions at a node that texts lack.
    """
    preprocess = encoder.encoder.preprocess

    def look(picture: Picture) -> Tensor | str:
        try:
            return preprocess(decode_image(picture.read()))
        except SampleError as error:
            return str(error)

    with closing(_looked_at(pictures, look, batch_size, workers)) as batches:
        for batch in batches:
            good: list[tuple[Picture, Tensor]] = []
            for picture, seen in batch:
                if isinstance(seen, str):
                    writer.skipped.add(picture.source, picture.key, seen)
                else:
                    good.append((picture, seen))
            if good:
                rows = Rows([(p.source, p.key) for p, _ in good], encoder.images([pixels for _, pixels in good]))
                if captions:
                    rows.captions = [picture.captions for picture, _ in good]
                    rows.text_vectors = encoder.texts(list(itertools.chain(*rows.captions)), batch_size)
                writer.add(rows)
            on_batch(len(batch))


def _looked_at(
    pictures: Iterable[Picture], look: Callable[[Picture], Tensor | str], batch_size: int, workers: int
) -> Generator[list[Seen], None, None]:
    """Batches in order; while one is with the caller, the next is being decoded."""
    pool = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="decode")
    waiting: deque[list[tuple[Picture, Future[Tensor | str]]]] = deque()
    try:
        for batch in _batches(pictures, batch_size):
            waiting.append([(picture, pool.submit(look, picture)) for picture in batch])
            if len(waiting) == 2:
                yield [(picture, future.result()) for picture, future in waiting.popleft()]
        while waiting:
            yield [(picture, future.result()) for picture, future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    iterator = iter(pictures)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
