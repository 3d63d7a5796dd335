"""Zero-shot accuracy of the model in training, on one entry of a suite: a curve to look at.

Nothing is chosen by it: R* and everything else is selected on validation rows. The processes share the images and the
prompts; the figure is that of one process.

Legend: W processes, n images, C classes, P templates, D joint width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.console import log
from pipeline.distributed import gather_with_grad, rank, world_size
from pipeline.evaluation.datasets import LabelledImages, StoredImages
from pipeline.evaluation.embeddings import loaded_batches
from pipeline.evaluation.zero_shot import class_weights, prompts, rank_of_label


@dataclass
class ZeroShot:
    """What to measure on.

    Args:
        name: the entry's, for the figure: zero_shot/NAME/top1.
        split: its images and their class numbers.
        class_names, templates: see `evaluation.zero_shot`.
        preprocess: PIL image → (3, H, W). tokenizer: texts → (m, L) int64. Both the model's own.
        batch_size: images, or prompts, at once. workers: threads that decode.
    """

    name: str
    split: LabelledImages
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    batch_size: int
    workers: int
    told: bool = False

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """{zero_shot/NAME/top1: share of the images that could be read}; every process calls it and gets the same."""
        was_training = model.training
        model.eval()
        try:
            weights = self._weights(model, device)
            hits, read = self._hits(model, device, weights)
        finally:
            model.train(was_training)
        counted = gather_with_grad(torch.tensor([[hits, read]], dtype=torch.int64, device=device)).sum(0).tolist()
        missing = len(self.split.images) - counted[1]
        if missing and not self.told and rank() == 0:
            log.warning("zero-shot %s: %d images cannot be read and are left out", self.name, missing)
        self.told = True
        return {f"zero_shot/{self.name}/top1": counted[0] / counted[1]} if counted[1] else {}

    def _weights(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """(C, D): every process embeds the prompts of its classes."""
        own = [str(name) for name in np.array_split(np.array(self.class_names, object), world_size())[rank()]]
        texts = prompts(own, self.templates)
        parts = []
        for first in range(0, len(texts), self.batch_size) or (0,):
            tokens = self.tokenizer(texts[first : first + self.batch_size] or [""])
            parts.append(model.encode_text(tokens.to(device)).float()[: len(texts)])  # type: ignore[operator]
        everyones = gather_with_grad(torch.cat(parts)).cpu().numpy()
        return class_weights(everyones, len(self.class_names))

    def _hits(self, model: nn.Module, device: torch.device, weights: np.ndarray) -> tuple[int, int]:
        """How many of this process's images are classed rightly, and how many could be read."""
        mine = np.arange(rank(), len(self.split.images), world_size())
        images = StoredImages(self.split.images.root, tuple(self.split.images.members[index] for index in mine))
        labels, hits, read = self.split.labels[mine], 0, 0
        for indices, pixels in loaded_batches(images, self.preprocess, self.batch_size, self.workers):
            there = [(index, image) for index, image in zip(indices, pixels, strict=True) if image is not None]
            if not there:
                continue
            batch = torch.stack([image for _, image in there]).to(device)
            found = model.encode_image(batch).float().cpu().numpy()  # type: ignore[operator]
            ranks = rank_of_label(found, weights, labels[[index for index, _ in there]])
            hits, read = hits + int((ranks == 1).sum()), read + len(there)
        return hits, read
