"""The baselines' losses as their publications and public code define them, written anew in float64.

Nothing here is shared with the code under test. v, w: unit image and text rows (N, D); s: the temperature's inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor) -> Tensor:
    """(N,) −log softmax at the diagonal."""
    return logits.exp().sum(1).log() - logits.diagonal()


def clip(v: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Radford et al., arXiv 2103.00020."""
    logits = s * v @ w.T
    return (cross_entropy(logits).mean() + cross_entropy(logits.T).mean()) / 2


def cyclip(v: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Goel et al., arXiv 2205.14459; its README's weights."""
    n = len(v)
    in_modal = (s * v @ v.T - s * w @ w.T).square().mean() / (s * s) * n
    cross = (s * v @ w.T - s * w @ v.T).square().mean() / (s * s) * n
    return clip(v, w, s) + 0.25 * in_modal + 0.25 * cross


def list_mle(predicted: Tensor, true: Tensor) -> Tensor:
    """The list-wise likelihood of RankCLIP's code: a sum over positions, a mean over rows; no ties here."""
    order = true.argsort(dim=1, descending=True)
    u = predicted.gather(1, order)
    left = torch.stack([(u[:, k:].exp().sum(1) + 1e-10).log() for k in range(u.shape[1])], 1)
    return (left - u).sum(1).mean()


def rankclip(v: Tensor, w: Tensor, s: Tensor, *, epoch: int, epochs: int) -> Tensor:
    """Zhang et al., arXiv 2404.09387, and its code's weights: epochs count from 1."""
    n = len(v)
    images, texts, logits = s * v @ v.T, s * w @ w.T, s * v @ w.T
    cross = (list_mle(logits, logits.T.detach()) + list_mle(logits.T, logits.detach())) / 32
    in_modal = (list_mle(images, texts.detach()) + list_mle(texts, images.detach())) / 32
    weight = min(max(3 * (epoch - 1) / (epochs - 1), 0), 2)
    return clip(v, w, s) + weight * (cross + in_modal) / n


def alip(v: Tensor, w: Tensor, c: Tensor, s: Tensor, means: dict[str, float]) -> Tensor:
    """Yang et al., arXiv 2308.08428; `means` are its three running means, moved here as its code moves them."""
    pairs = {"text_caption": (w, c), "image_text": (v, w), "image_caption": (v, c)}
    raw = {}
    for name, (a, b) in pairs.items():
        similarity = (a * b).sum(1).detach()
        means[name] = float(similarity.mean()) * 0.01 + means[name] * 0.99
        raw[name] = (similarity - means[name]).exp() ** 2
    low = raw["text_caption"] < 1
    sample = torch.where(low, raw["text_caption"], 1.0)
    total = torch.zeros((), dtype=v.dtype)
    for name, other in (("image_text", w), ("image_caption", c)):
        logits = s * v @ other.T
        each = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
        total = total + (each * sample * torch.where(low, raw[name], 1.0)).mean()
    return total


def slip(v: Tensor, w: Tensor, s: Tensor, first: Tensor, second: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Mu et al., arXiv 2112.12750: CLIP plus SimCLR (arXiv 2002.05709) of two views' projections (N, E)."""
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (first, second))
    both, n = torch.cat([a, b]), len(a)
    logits = (both @ both.T / temperature).exp()
    total = torch.zeros((), dtype=v.dtype)
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        total = total + (logits[i].sum() - logits[i, i]).log() - logits[i, partner].log()
    return clip(v, w, s) + total / (2 * n)
