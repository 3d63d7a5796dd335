"""Where the cosines of a group of lists come from, and where their gradients go.

A group has two families. Their cosines are N × N in all, and each is the reference of the other:

    cross      X_ij = ⟨v_i, w_j⟩ and Xᵀ            in-modal   ⟨v_i, v_j⟩ and ⟨w_i, w_j⟩, each its own transpose

`Chunked` serves any process: b rows at a time, each product computed as it is needed and each gradient G folded in at
once: 6 products of b × N × D, of which 2 for the group's cosines and 4 for the gradients of both sides. `Whole` serves
a process that has all pairs to itself and room for N × N numbers: it uses what is written above. The cross families
share one matrix, its gradients add up to one H = G + G'ᵀ, and a symmetric matrix is folded in by one product,
(G + Gᵀ) V: 7 large products for both groups together instead of 12.

Legend: B own rows, N candidates, b rows of a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Family = tuple[str, str]  # (modality of the rows, modality of the candidates)
GROUPS: dict[str, tuple[Family, Family]] = {
    "cross": (("image", "text"), ("text", "image")),
    "in_modal": (("image", "image"), ("text", "text")),
}
OTHER = {"image": "text", "text": "image"}
WHOLE_BYTES = 1 << 28  # that `Whole` may hold in its two matrices
BLOCK = 1024  # rows of a square block


class Products(Protocol):
    """One group's."""

    def cosines(self, chunk: slice) -> dict[Family, Tensor]:
        """Family → (b, N), not to be written to."""

    def add(self, chunk: slice, gradients: Mapping[Family, Tensor]) -> None:
        """Take family → gradient for the cosines (b, N); after it the chunk's cosines may be gone."""

    def finish(self) -> None:
        """All chunks are done: gradients are where they belong."""


class Chunked:
    """Products of own rows with candidates, as they are needed.

    Args:
        rows: modality → (B, D). candidates: modality → (N, D).
        of_rows, of_candidates: modality → what their gradients are added to; None where none are wanted.
    """

    def __init__(
        self,
        group: str,
        rows: Mapping[str, Tensor],
        candidates: Mapping[str, Tensor],
        of_rows: Mapping[str, Tensor] | None,
        of_candidates: Mapping[str, Tensor] | None,
    ) -> None:
        self.families, self.rows, self.candidates = GROUPS[group], rows, candidates
        self.of_rows, self.of_candidates = of_rows, of_candidates

    def cosines(self, chunk: slice) -> dict[Family, Tensor]:
        return {(a, b): self.rows[a][chunk] @ self.candidates[b].T for a, b in self.families}

    def add(self, chunk: slice, gradients: Mapping[Family, Tensor]) -> None:
        assert self.of_rows is not None
        assert self.of_candidates is not None
        for (a, b), g in gradients.items():
            self.of_rows[a][chunk].addmm_(g, self.candidates[b])
            self.of_candidates[b].addmm_(g.T, self.rows[a][chunk])

    def finish(self) -> None:
        pass


class WholeCross:
    """X = V Wᵀ once for both directions.

    Args:
        rows: modality → (N, D), all pairs. of_rows: modality → what gradients are added to; None: none are wanted.
    """

    def __init__(self, rows: Mapping[str, Tensor], of_rows: Mapping[str, Tensor] | None) -> None:
        self.rows, self.of_rows = rows, of_rows
        self.x = rows["image"] @ rows["text"].T  # (N, N)
        self.h = None if of_rows is None else torch.zeros_like(self.x)  # G of image → text, plus the other's Gᵀ

    def cosines(self, chunk: slice) -> dict[Family, Tensor]:
        to_texts, to_images = GROUPS["cross"]
        return {to_texts: self.x[chunk], to_images: self.x[:, chunk].T.contiguous()}

    def add(self, chunk: slice, gradients: Mapping[Family, Tensor]) -> None:
        assert self.h is not None
        to_texts, to_images = GROUPS["cross"]
        self.h[chunk] += gradients[to_texts]
        self.h[:, chunk] += gradients[to_images].T

    def finish(self) -> None:
        if self.h is not None and self.of_rows is not None:
            self.of_rows["image"].addmm_(self.h, self.rows["text"])
            self.of_rows["text"].addmm_(self.h.T, self.rows["image"])


class WholeInModal:
    """V Vᵀ and W Wᵀ, whose rows make room for their own gradients.

    Args: as `WholeCross`.
    """

    def __init__(self, rows: Mapping[str, Tensor], of_rows: Mapping[str, Tensor] | None) -> None:
        self.rows, self.of_rows = rows, of_rows
        self.x = {modality: _gram(of_modality) for modality, of_modality in rows.items()}

    def cosines(self, chunk: slice) -> dict[Family, Tensor]:
        return {(modality, modality): x[chunk] for modality, x in self.x.items()}

    def add(self, chunk: slice, gradients: Mapping[Family, Tensor]) -> None:
        for (modality, _), g in gradients.items():
            self.x[modality][chunk] = g

    def finish(self) -> None:
        if self.of_rows is None:
            return
        for modality, g in self.x.items():
            self.of_rows[modality].addmm_(_plus_transpose(g), self.rows[modality])


def fits_whole(rows: Tensor, processes: int) -> bool:
    """Whether a process with these rows (B, D) may use `WholeCross` and `WholeInModal`."""
    return processes == 1 and 2 * len(rows) ** 2 * rows.element_size() <= WHOLE_BYTES


def _gram(v: Tensor) -> Tensor:
    """V Vᵀ (N, N), exactly symmetric: what lies below the diagonal's blocks is copied."""
    n = len(v)
    x = v.new_empty(n, n)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        torch.mm(v[start:end], v[start:].T, out=x[start:end, start:])
        x[end:, start:end] = x[start:end, end:].T
    return x


def _plus_transpose(g: Tensor) -> Tensor:
    """G + Gᵀ, written into G (N, N)."""
    n = len(g)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        for first in range(start, n, BLOCK):
            columns = slice(first, min(first + BLOCK, n))
            total = g[rows, columns] + g[columns, rows].T
            g[rows, columns] = total
            g[columns, rows] = total.T
    return g
