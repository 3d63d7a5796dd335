"""The objective and a small retrieval on validation rows, without touching the training state.

Retrieval is `evaluation.retrieval`'s: unique images, unique captions, every caption of an image (one hit is enough),
ties against the model. It sees all rows that can be read; the objective sees batches of one size, since losses over
fewer candidates cannot be averaged with the others.

Legend: W processes, B this process's rows of a batch, N unique images, T unique captions, P (image, caption) pairs,
D joint width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed import all_gather_sizes, gather_with_grad
from pipeline.evaluation import retrieval
from pipeline.evaluation.paired import point
from pipeline.training.data import Batch
from pipeline.training.sampler import Step


def validation_steps(rows: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
    """Process `rank`'s share of each validation batch. The batches are the same for any number of processes, each of
    which takes part in all, with one row more or less than the others."""
    for number, first in enumerate(range(0, len(rows), batch_size)):
        own = np.array_split(rows[first : first + batch_size], world_size)[rank]
        yield Step(number, 0, own, validates=True)


def even_batches(rows: int, batch_size: int) -> int:
    """How many of the batches have one size: all but a last uneven one, and a set smaller than one batch is one."""
    return max(rows // batch_size, min(rows, 1))


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


@torch.no_grad()
def validate(
    objective: nn.Module,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    captions: Captions,
    even: int,
    note: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, float]:
    """Means of the objective's logs over the batches, and retrieval among all rows that all processes read.

    Args:
        objective: the (wrapped) training objective.
        model: the dual encoder in it; encode_image, encode_text.
        captions: of all validation rows, of every process.
        even: how many batches the objective sees; see `even_batches`.
        note: told of every batch, some of whose rows may not have been readable.
    """
    was_training = objective.training
    objective.eval()
    sums: dict[str, list[float]] = defaultdict(list)
    found = _Embedded(model, captions, device)
    try:
        for batch in batches:
            note(batch)
            if not any(all_gather_sizes(len(batch.rows), device)):
                continue  # no process could read any of its images
            batch = batch.to(device)
            if batch.step < even:
                _, logs = objective(**batch.inputs, progress=1.0)
                for key, value in logs.items():
                    sums[key].append(float(value))
            found.add(batch)
    finally:
        objective.train(was_training)
    return {key: float(np.mean(values)) for key, values in sums.items()} | found.recall()


class _Embedded:
    """Embeddings of this process's rows and of their captions."""

    def __init__(self, model: nn.Module, captions: Captions, device: torch.device) -> None:
        self.model, self.captions, self.device = model, captions, device
        self.images: list[Tensor] = []  # (B, D)
        self.image_numbers: list[int] = []
        self.texts: list[Tensor] = []
        self.text_numbers: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.known: set[str] = set()

    def add(self, batch: Batch) -> None:
        """Embed a batch's images and those of their captions that have not been."""
        rows = batch.rows.tolist()
        numbers = [self.captions.image_numbers[row] for row in rows]
        self.images.append(self.model.encode_image(batch.images).float())  # type: ignore[operator]
        self.image_numbers += numbers
        new: dict[str, None] = {}
        for row, number in zip(rows, numbers, strict=True):
            for text in self.captions.of_row[row]:
                self.pairs.append((number, self.captions.text_numbers[text]))
                new.setdefault(text)
        texts = [text for text in new if text not in self.known]
        self.known.update(texts)
        self.text_numbers += [self.captions.text_numbers[text] for text in texts]
        at_once = max(len(rows), 1)  # what the objective has just had in memory
        for first in range(0, len(texts), at_once) if texts else (0,):
            tokens = self.captions.tokenizer(texts[first : first + at_once]) if texts else batch.tokens[:0]
            self.texts.append(self.model.encode_text(tokens.to(self.device)).float())  # type: ignore[operator]

    def recall(self) -> dict[str, float]:
        """Of all processes' rows; {} where there are none. Every process calls it, and gets the same."""
        if not self.images:  # then no process has any
            return {}
        images, image_numbers = self._of_all(self.images, self.image_numbers)
        texts, text_numbers = self._of_all(self.texts, self.text_numbers)
        pairs = torch.tensor(self.pairs, dtype=torch.int64, device=self.device).reshape(-1, 2)
        return recall(images, image_numbers, texts, text_numbers, gather_with_grad(pairs).cpu().numpy())

    def _of_all(self, parts: list[Tensor], numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        vectors = gather_with_grad(torch.cat(parts))
        of = gather_with_grad(torch.tensor(numbers, dtype=torch.int64, device=self.device))
        return vectors.cpu().numpy(), of.cpu().numpy()


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
