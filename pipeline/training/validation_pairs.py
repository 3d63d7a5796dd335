"""What the model makes of validation rows and of all their captions: retrieval, and how the injection moves the loss.

Retrieval is `evaluation.retrieval`'s: unique images, unique captions, every caption of an image (one hit is enough),
ties against the model. Where something is injected, the trunk's own (γ = 0) stands beside the output's, under names
with `_trunk`, and the first-order drift of the contrastive loss over all rows and the captions their batches carried
(losses.gate).

Legend: B this process's rows of a batch, n all processes' rows, m their captions, p (image, caption) pairs, D joint
width; v, w, z, t, γ, Δ⊥ as in models.dinorankclip and models.fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed import gather_with_grad
from pipeline.evaluation import retrieval
from pipeline.evaluation.paired import point
from pipeline.losses.chunks import in_chunks
from pipeline.losses.gate import drift
from pipeline.losses.plackett_luce import at_least_float32
from pipeline.training.data import Batch

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import Forward


@dataclass(frozen=True)
class Captions:
    """Every caption of the validation rows, and which of them belong together.

    Args:
        image_numbers: row → a number that rows of one image share.
        of_row: row → its captions.
        text_numbers: caption → its number.
        tokenizer: captions → (n, L) int64.
    """

    image_numbers: dict[int, int]
    of_row: dict[int, list[str]]
    text_numbers: dict[str, int]
    tokenizer: Callable[[list[str]], Tensor]

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        hashes: Sequence[str],
        captions: Callable[[int], list[str]],
        tokenizer: Callable[[list[str]], Tensor],
    ) -> Captions:
        """From the rows, the SHA-256 of their images beside them, and what gives a row's captions."""
        of_row = {row: captions(row) for row in rows.tolist()}
        numbers: dict[str, int] = {}
        for texts in of_row.values():
            for text in texts:
                numbers.setdefault(text, len(numbers))
        return cls(number_images(rows, hashes), of_row, numbers, tokenizer)


def number_images(rows: np.ndarray, hashes: Sequence[str]) -> dict[int, int]:
    """row → a number that rows of one image share; hashes: their images' SHA-256, beside `rows`."""
    numbers: dict[str, int] = {}
    return {int(row): numbers.setdefault(of, len(numbers)) for row, of in zip(rows, hashes, strict=True)}


class Embedded:
    """Embeddings of this process's rows and of their captions.

    Args:
        model: images, tokens → `Forward`; text_nodes.
        at_once: rows that the model encodes at once; None: all that `add` is given.
    """

    def __init__(self, model: nn.Module, captions: Captions, device: torch.device, at_once: int | None = None) -> None:
        self.model, self.captions, self.device, self.at_once = model, captions, device, at_once
        self.out: Forward | None = None  # of any batch, for γ and s, which all share
        self.images: list[Tensor] = []  # (B, 1 or 2, D): v, and z where something is injected
        self.image_numbers: list[int] = []
        self.texts: list[Tensor] = []  # the same of captions
        self.text_numbers: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.known: set[str] = set()
        self.moved: list[Tensor] = []  # (B, 4, D): z, t and Δ⊥ of both sides

    def add(self, batch: Batch) -> None:
        """Embed a batch's images and those of their captions that have not been."""
        out: Forward = in_chunks(self.model, (batch.images, batch.tokens), self.at_once, inside=self.model)
        self.out = out
        injects = out.image is not None or out.text is not None
        self.images.append(_stacked([out.v, out.z] if injects else [out.v]))
        if injects:
            sides = ((out.image, out.z), (out.text, out.t))
            tangents = [torch.zeros_like(base) if side is None else side.tangent for side, base in sides]
            self.moved.append(_stacked([out.z, out.t, *tangents]))
        self._add_captions(batch, injects)

    def _add_captions(self, batch: Batch, injects: bool) -> None:
        rows = batch.rows.tolist()
        numbers = [self.captions.image_numbers[row] for row in rows]
        self.image_numbers += numbers
        new: dict[str, None] = {}
        for row, number in zip(rows, numbers, strict=True):
            for text in self.captions.of_row[row]:
                self.pairs.append((number, self.captions.text_numbers[text]))
                new.setdefault(text)
        texts = [text for text in new if text not in self.known]
        self.known.update(texts)
        self.text_numbers += [self.captions.text_numbers[text] for text in texts]
        at_once = max(min(len(rows), self.at_once or len(rows)), 1)  # what the model has just had in memory
        for first in range(0, len(texts), at_once) if texts else (0,):
            tokens = self.captions.tokenizer(texts[first : first + at_once]) if texts else batch.tokens[:0]
            nodes = self.model.text_nodes(tokens.to(self.device))  # type: ignore[operator]
            output = nodes.get("gated", nodes["trunk"])
            self.texts.append(_stacked([output, nodes["trunk"]] if injects else [output]))

    def recall(self) -> dict[str, float]:
        """Of all processes' rows; {} where there are none. Every process calls it, and gets the same."""
        if not self.images:  # then no process has any
            return {}
        images, image_numbers = self._of_all(self.images, self.image_numbers)
        texts, text_numbers = self._of_all(self.texts, self.text_numbers)
        pairs = torch.tensor(self.pairs, dtype=torch.int64, device=self.device).reshape(-1, 2)
        everyone = gather_with_grad(pairs).cpu().numpy()
        found: dict[str, float] = {}
        for number, name in enumerate(("", "_trunk")[: images.shape[1]]):
            of_node = recall(images[:, number], image_numbers, texts[:, number], text_numbers, everyone)
            found |= {f"{key}{name}": value for key, value in of_node.items()}
        return found

    def drift(self) -> dict[str, float]:
        """First-order drift over all processes' rows; {} without an injection. Every process calls it."""
        if self.out is None or not self.moved:
            return {}
        z, t, of_image, of_text = gather_with_grad(torch.cat(self.moved)).unbind(1)
        gammas = [0.0 if side is None else float(side.gamma) for side in (self.out.image, self.out.text)]
        found = drift(z, t, of_image, of_text, gammas[0], gammas[1], float(self.out.logit_scale))
        return {f"drift/{key}": value for key, value in asdict(found).items()}

    def _of_all(self, parts: list[Tensor], numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        vectors = gather_with_grad(torch.cat(parts))
        of = gather_with_grad(torch.tensor(numbers, dtype=torch.int64, device=self.device))
        return vectors.cpu().numpy(), of.cpu().numpy()


def _stacked(vectors: Sequence[Tensor]) -> Tensor:
    """(B, D) each → (B, k, D), float32 or better."""
    return torch.stack([at_least_float32(x) for x in vectors], 1)


def recall(
    images: np.ndarray, image_numbers: np.ndarray, texts: np.ndarray, text_numbers: np.ndarray, pairs: np.ndarray
) -> dict[str, float]:
    """Recall at 1, 5, 10 and the median rank, both directions, of embeddings with repetitions.

    Args:
        images, texts: (n, D), (m, D) float32, unit-norm. image_numbers, text_numbers: (n,), (m,) what each of them is
            of; of several of one number the first counts.
        pairs: (p, 2) int64, (image number, text number), with repetitions too.
    """
    known_images, first_image = np.unique(image_numbers, return_index=True)
    known_texts, first_text = np.unique(text_numbers, return_index=True)
    if not len(known_images) or not len(known_texts):
        return {}
    pairs = np.unique(pairs, axis=0)
    of_image, of_text = np.searchsorted(known_images, pairs[:, 0]), np.searchsorted(known_texts, pairs[:, 1])
    ranks = retrieval.rank(images[first_image], texts[first_text], of_image, of_text)
    values = {
        name: point(statistic, len(known_images)) for name, statistic in retrieval.statistics(ranks, of_image).items()
    }
    found = {f"{way}_r{k}": values[f"retrieval/{way}_recall@{k}"] for way in ("i2t", "t2i") for k in retrieval.TOP}
    return found | {f"{way}_median_rank": values[f"retrieval/{way}_median_rank"] for way in ("i2t", "t2i")}
