"""First-order drift and the gate, measured on a benchmark's pairs.

The injection moves z to v(γ) = (z + γ Δ⊥) / √(1 + γ² ‖Δ⊥‖²), Δ⊥ = Δ' − ⟨Δ', z⟩ z, Δ' = g ⊙ Δ, the text side alike, and
with it the contrastive loss L of the N pairs. To first order in (γ_image, γ_text)

    L(γ) − L(0) ≈ γ_image Σ_i ⟨∂L/∂z_i, Δ⊥_i⟩ + γ_text Σ_j ⟨∂L/∂t_j, Δ⊥_j⟩,     as dv/dγ = Δ⊥ at γ = 0

`slope` is the sum of both sums, `finite_difference` the same at a small step (they agree, or the formula is not what
the model does), `change` = L(γ) − L(0) at the trained γ, `remainder` = what the first order misses of it. "Preserves
the alignment up to first order" is these numbers. Losses with the gate at 0, learned and at 1 stand beside them.
Everything in float64. Legend: N pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import progress
from pipeline.evaluation.embeddings import Arrays, Embedder, hash_json, loaded_batches
from pipeline.evaluation.nodes import subset
from pipeline.evaluation.paired import mean_of, measure
from pipeline.evaluation.records import Measurement
from pipeline.evaluation.registry import ManifestImages, Retrieval
from pipeline.losses.contrastive import info_nce
from pipeline.losses.gate import drift as first_order_drift
from pipeline.losses.gate import injected
from pipeline.losses.pairs import Pairs

MAX_PAIRS = 256  # of a second pass over the images: a training batch's worth, and 256 · D gate values
STEP = 1e-5
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Side:
    """One modality: trunk vectors `base` (N, D), `gate` (N, D), injection `delta` (N, D), and the trained `gamma`.

    `injects` is False where the model has no injection on this side: its delta is 0.
    """

    base: Tensor
    gate: Tensor
    delta: Tensor
    gamma: float
    injects: bool = True

    def tangent(self, *, opened: bool = False) -> Tensor:
        """Δ⊥ (N, D); `opened`: with g ≡ 1."""
        pushed = self.delta if opened else self.gate * self.delta
        return pushed - (pushed * self.base).sum(dim=1, keepdim=True) * self.base

    def moved(self, *, opened: bool = False) -> Tensor:
        """v (N, D) at the trained γ."""
        return injected(self.base, self.tangent(opened=opened), self.gamma)


def drift(image: Side, text: Side, scale: float) -> dict[str, float]:
    """The numbers of this module's docstring for N pairs; float64 sides; `scale` = s."""

    def loss(images: Tensor, texts: Tensor) -> float:
        return float(info_nce(Pairs.alone(images, texts, torch.tensor(scale, dtype=torch.float64))).mean())

    tangents = (image.tangent(), text.tangent())
    found = first_order_drift(image.base, text.base, *tangents, image.gamma, text.gamma, scale, step=STEP)
    return {
        "slope": found.slope,
        "finite_difference": found.finite_difference,
        "step": STEP,
        "first_order": found.change - found.remainder,
        "change": found.change,
        "remainder": found.remainder,
        "gamma_image": image.gamma,
        "gamma_text": text.gamma,
        "loss_trunk": loss(image.base, text.base),
        "loss_gated": loss(image.moved(), text.moved()),
        "loss_fused": loss(image.moved(opened=True), text.moved(opened=True)),
    }


def evaluate(
    embedder: Embedder, data: Retrieval, images: NDArray[np.int64], texts: NDArray[np.int64], what: str
) -> list[Measurement]:
    """Drift and gate of one model on pairs (image images[k], text texts[k]) of a retrieval benchmark."""
    rows = subset(len(images), MAX_PAIRS)
    images, texts = images[rows], texts[rows]
    key = [data.digest, hash_json([images.tolist(), texts.tolist()])]
    kept = embedder.cached("drift", key, lambda: _measure(embedder, data, images, texts, what))
    n = len(images)
    found = []
    for name, values in sorted(kept.items()):
        if values.shape == (n,) and name.endswith("_mean"):
            found += measure({name: mean_of(values)}, n, node="gated", split=data.split)
        else:
            found.append(Measurement(name, "gated", data.split, float(values[0]), None, None, n))
    return found


def _measure(
    embedder: Embedder, data: Retrieval, images: NDArray[np.int64], texts: NDArray[np.int64], what: str
) -> Arrays:
    chosen = ManifestImages(data.images.reader, data.images.rows[images], hash_json(images.tolist()))
    image, text, scale = sides(embedder, chosen, [data.texts[k] for k in texts], what)
    arrays: Arrays = {f"drift/{k}": np.array([v]) for k, v in drift(image, text, scale).items()}
    for name, side in (("image", image), ("text", text)):
        if side.injects:
            gate = side.gate.numpy()
            arrays[f"gate/{name}_mean"] = gate.mean(axis=1)
            for q in QUANTILES:
                arrays[f"gate/{name}_q{round(100 * q):02d}"] = np.array([np.quantile(gate, q)])
    return arrays


def sides(embedder: Embedder, images: ManifestImages, texts: Sequence[str], what: str) -> tuple[Side, Side, float]:
    """Both sides of all pairs and s, from the model's own forward pass on (image k, text k)."""
    encoder = embedder.encoder
    assert encoder.tokenizer is not None
    collected: dict[str, list[tuple[Tensor, ...]]] = {"image": [], "text": []}
    gamma = {"image": 0.0, "text": 0.0}
    injects = {"image": False, "text": False}
    scale = 1.0
    batches = loaded_batches(images, encoder.preprocess, embedder.batch_size, embedder.workers)
    with progress(f"gate and drift of {what} with {embedder.name}", total=len(images), unit="pairs") as bar:
        for indices, pixels in batches:
            batch = torch.stack([p for p in pixels if p is not None]).to(embedder.device)
            tokens = encoder.tokenizer([texts[k] for k in indices]).to(embedder.device)
            with torch.inference_mode():
                forward = encoder.model(batch, tokens)
            scale = float(forward.logit_scale.detach())
            for name, base in (("image", forward.z), ("text", forward.t)):
                side = getattr(forward, name)
                parts = (base, torch.zeros_like(base), torch.zeros_like(base))
                if side is not None:
                    parts, gamma[name], injects[name] = (base, side.gate, side.delta), float(side.gamma.detach()), True
                collected[name].append(tuple(part.double().cpu() for part in parts))
            bar.advance(len(indices))
    both = []
    for name, batches_of_parts in collected.items():
        base, gate, delta = (torch.cat(parts) for parts in zip(*batches_of_parts, strict=True))
        both.append(Side(F.normalize(base, dim=1), gate, delta, gamma[name], injects[name]))
    return both[0], both[1], scale
