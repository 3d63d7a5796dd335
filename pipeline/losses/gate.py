"""Losses of the conflict-aware gate, and how far an injection moves the contrastive loss.

A side's output is v = (z + γ Δ⊥) / √(1 + γ² ‖Δ⊥‖²), Δ⊥ the part of g ⊙ Δ tangent to the sphere at z. To first order
in γ the batch's InfoNCE L changes by Σ_i ⟨∇_{z_i} L, γ Δ⊥_i⟩, image and text side added. With p_ij the softmax over
texts of row i and q_ij the softmax over images of column j,

    ∇_{z_i} L = (s / 2N) · [ Σ_j (p_ij + q_ij) t_j − 2 t_i ]
    ∇_{t_j} L = (s / 2N) · [ Σ_i (p_ij + q_ij) z_i − 2 z_j ]

The L1 penalty on g is the paper's (arXiv 2605.06592); that it counts in proportion to |γ|, and the conflict loss, are
our reading. γ starts at 0, where neither InfoNCE nor the conflict reaches the gate: a bare L1 would be its only
gradient, and Adam, which divides a gradient by its size, closes the gate at full speed whatever the penalty's weight
(seen: from 0.5 to 0.00 in 100 steps, docs/journal.md). Times |γ| all three vanish together and keep their proportions.

Legend: B own pairs, N gathered pairs, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import gather_with_grad
from pipeline.losses.contrastive import info_nce
from pipeline.losses.pairs import Pairs

EPS = 1e-12


def gate_l1(gates: Sequence[Tensor], gammas: Sequence[Tensor]) -> Tensor:
    """What the open gates cost each pair: |γ| · mean g, averaged over the sides, γ detached.

    Args:
        gates: g (B, D) in (0, 1), one for each side. gammas: γ (), one for each side.

    Returns:
        (B,).
    """
    return torch.stack([gamma.detach().abs() * g.mean(1) for g, gamma in zip(gates, gammas, strict=True)]).mean(0)


@torch.no_grad()
def info_nce_gradients(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """∇_z L (B, D) and ∇_t L (B, D) of the mean InfoNCE over all N pairs, for own rows, in closed form."""
    s, z, t, z_all, t_all = pairs.scale, pairs.image_rows, pairs.text_rows, pairs.image_all, pairs.text_all
    of_images = s * z @ t_all.T  # (B, N): own images over all texts
    of_texts = s * t @ z_all.T  # (B, N): own texts over all images
    own = torch.stack([of_images.logsumexp(1), of_texts.logsumexp(1)], 1)
    # (N, 2): every image's and every text's log-denominator; `Pairs.alone` has them all, whoever else there is
    of_all = own if len(pairs.sizes) == 1 else gather_with_grad(own, pairs.sizes)
    toward_texts = (of_images - own[:, :1]).exp() + (of_images - of_all[:, 1]).exp()
    toward_images = (of_texts - own[:, 1:]).exp() + (of_texts - of_all[:, 0]).exp()
    factor = s / (2 * len(z_all))
    return factor * (toward_texts @ t_all - 2 * t), factor * (toward_images @ z_all - 2 * z)


def conflict(
    base: Tensor, gradient: Tensor, delta: Tensor, gamma: Tensor, gate: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What a side's injection adds to the contrastive loss, to first order and per unit of its gradient: (B,).

        relu( γ ⟨ĝ_i, g(z_i, Δ_i) ⊙ Δ_i⟩ ),      ĝ_i the unit tangent part of ∇_{z_i} L, so this is γ ⟨ĝ_i, Δ⊥_i⟩

    z, Δ, γ and ĝ are detached and the gate runs once more on them: only the gate learns from it. A cosine in place of
    the product could not close the gate, since it ignores length.

    Args:
        base: z (B, D). gradient: ∇_z L (B, D). delta: Δ (B, D). gamma: ().
        gate: g of detached (z, Δ), (B, D) each.
    """
    z, delta, gradient = base.detach(), delta.detach(), gradient.detach()
    tangent = gradient - (gradient * z).sum(1, keepdim=True) * z
    direction = tangent / tangent.norm(dim=1, keepdim=True).clamp_min(EPS)
    return (gamma.detach() * (direction * gate(z, delta) * delta).sum(1)).relu()


@dataclass(frozen=True)
class Drift:
    """First-order drift of N pairs, both sides added.

    Attributes:
        slope: Σ ⟨∇L, Δ⊥⟩, the derivative of L as γ leaves 0 on both sides together.
        finite_difference: (L(ε) − L(0)) / ε at γ = ε on both sides.
        change: L at the trained γ, less L at 0.
        remainder: what of `change` the first order γ_image · slope_image + γ_text · slope_text leaves.
    """

    slope: float
    finite_difference: float
    change: float
    remainder: float


@torch.no_grad()
def drift(
    images: Tensor,
    texts: Tensor,
    image_tangent: Tensor,
    text_tangent: Tensor,
    image_gamma: float,
    text_gamma: float,
    scale: float,
    *,
    step: float = 1e-5,
) -> Drift:
    """How the injection moves the contrastive loss, in float64, in one process.

    Args:
        images, texts: z, t (N, D), unit-norm.
        image_tangent, text_tangent: Δ⊥ (N, D); zeros for a side without injection.
        image_gamma, text_gamma: the trained γ.
        scale: s.
        step: ε.
    """
    z, t, a, b = (x.double() for x in (images, texts, image_tangent, text_tangent))
    s = torch.tensor(scale, dtype=torch.float64, device=z.device)

    def loss(image_gamma: float, text_gamma: float) -> float:
        return float(info_nce(Pairs.alone(injected(z, a, image_gamma), injected(t, b, text_gamma), s)).mean())

    of_images, of_texts = info_nce_gradients(Pairs.alone(z, t, s))
    image_slope, text_slope = float((of_images * a).sum()), float((of_texts * b).sum())
    at_zero = loss(0.0, 0.0)
    change = loss(image_gamma, text_gamma) - at_zero
    return Drift(
        slope=image_slope + text_slope,
        finite_difference=(loss(step, step) - at_zero) / step,
        change=change,
        remainder=change - (image_gamma * image_slope + text_gamma * text_slope),
    )


def injected(base: Tensor, tangent: Tensor, gamma: float | Tensor) -> Tensor:
    """v = (z + γ Δ⊥) / √(1 + γ² ‖Δ⊥‖²): base z (N, D), tangent Δ⊥ (N, D) → (N, D)."""
    return (base + gamma * tangent) / torch.sqrt(1 + gamma**2 * (tangent**2).sum(1, keepdim=True))
