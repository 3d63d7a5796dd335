"""Distillation from cached teacher features: patch affinities, relational distances and the image's one vector.

Every function returns one value per own row whose mean over all N rows is the loss. Similarities are in float32 or
better, inputs are never written to, and the teacher takes no gradient. What each loss scores for a predictor that
ignores the image is in the cache; the objective divides by it.

    Gram        X̂ X̂ᵀ of a scale's unit tokens against the teacher's (Gram anchoring: DINOv3, arXiv 2508.10104)
    relational  distances between images, in units of their mean (Park et al., arXiv 1904.05068)
    global      cosine to the teacher's `global`
    KD          cosine of every token to the teacher's (option)
    CRD         each image's student vector told by its teacher's (option; Tian et al., arXiv 1910.10699)

Legend: B own rows, N all rows, T tokens, E student width, C teacher width, d width of CRD's embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import gather_with_grad
from pipeline.losses.plackett_luce import at_least_float32

EPS = 1e-6


def gram(tokens: Tensor) -> Tensor:
    """Cosine affinities S = X̂ X̂ᵀ of each image's tokens: (B, T, E) → (B, T, T)."""
    unit = F.normalize(at_least_float32(tokens), dim=-1, eps=EPS)
    return unit @ unit.transpose(1, 2)


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the T × T entries of (S_student − S_teacher)²: (B, T, E), (B, T, C) → (B,)."""
    return (gram(student) - gram(teacher.detach())).square().mean((1, 2))


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    residual: Tensor | None = None,
    first: int = 0,
    sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """Relational distances of own rows to all rows:

        (1 / (N − 1)) Σ_{j≠i} h( d_ij / d̄ − d*_ij / d̄* ),     d_ij = ‖p_i − p_j‖, d̄ its mean over all N (N − 1) pairs

    h(x) = x²/2 below |x| = 1 and |x| − ½ beyond; d* is the teacher's. The means are taken over every process's pairs,
    and the student's carries gradient.

    With a residual ρ² (our reading) the student's distance is that of points which carry, besides p, a coordinate of
    their own for what the student does not see, as long as ρ²/2 mean squared distances:

        d_ij² = ‖p_i − p_j‖² / m² + ρ²,     m² the mean of ‖p_i − p_j‖² over all pairs

    Unseen differences make all distances more alike. Without that coordinate a student that knows little must claim
    large contrasts, and scores many times the loss of "all distances equal" (ρ² → ∞); with it the loss can say how much
    of the relations is known.

    Args:
        student: p (B, E). teacher: p* (B, C).
        residual: ρ² ≥ 0, (), with gradient; None for plain distances.
        first: the number of the first own row among the N; sizes: every process's B (asked for when None).

    Returns:
        (B,); zeros where N = 1.
    """
    ours = _relative_distances(at_least_float32(student), first, sizes, residual)
    with torch.no_grad():
        theirs = _relative_distances(teacher.to(ours.dtype), first, sizes)
    total = F.smooth_l1_loss(ours, theirs, reduction="none").sum(1)  # own entries are 0 in both
    return total / max(ours.shape[1] - 1, 1)


def global_loss(predicted: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos(predicted, global): (B, C) each → (B,)."""
    return 1 - F.cosine_similarity(at_least_float32(predicted), at_least_float32(teacher.detach()), dim=1, eps=EPS)


def kd_loss(predicted: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the tokens of 1 − cos(predicted, teacher): (B, T, C) each → (B,)."""
    cosine = F.cosine_similarity(at_least_float32(predicted), at_least_float32(teacher.detach()), dim=2, eps=EPS)
    return (1 - cosine).mean(1)


def crd_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, first: int = 0, sizes: tuple[int, ...] | None = None
) -> Tensor:
    """Each own image's student vector told among everyone's by its teacher's, and the other way round:

        ½ [ −log softmax_j(⟨a_i, b_j⟩ / τ)_i − log softmax_j(⟨b_i, a_j⟩ / τ)_i ]      a: student, b: teacher

    Contrastive representation distillation (Tian et al., arXiv 1910.10699) has the same critic, ⟨a, b⟩ / τ of learned
    linear embeddings, and both directions. It differs in where negatives come from and how they are counted. There: K
    (16,384) vectors out of a memory bank with one row for every training image, updated by a moving average, and a
    binary noise-contrastive loss (is this pair from the joint distribution?) whose partition sum is estimated once.
    Here: the N − 1 other images of the batch of all processes and the softmax over them (InfoNCE), which needs no
    state of the data set's size and no constant. Its bound on the mutual information is at most log N: that, the
    loss of a predictor that ignores the image, is its unit.

    Args:
        student, teacher: a, b (B, d), unit-norm, both with gradient.
        temperature: τ.
        first: the number of the first own row among the N; sizes: every process's B (asked for when None).

    Returns:
        (B,); zeros where N = 1.
    """
    a, b = at_least_float32(student), at_least_float32(teacher)
    a_all, b_all = gather_with_grad(torch.stack([a, b], 1), sizes).unbind(1)  # one exchange
    own = torch.arange(first, first + len(a), device=a.device)
    of_student = F.cross_entropy(a @ b_all.T / temperature, own, reduction="none")
    return (of_student + F.cross_entropy(b @ a_all.T / temperature, own, reduction="none")) / 2


def _relative_distances(
    rows: Tensor, first: int, sizes: tuple[int, ...] | None, residual: Tensor | None = None
) -> Tensor:
    """d_ij / d̄ (B, N), 0 at i = j. rows: (B, E)."""
    everyone = gather_with_grad(rows, sizes)  # (N, E)
    count = len(everyone)
    # Distances do not depend on the origin; near the rows' mean, ‖a‖² + ‖b‖² − 2⟨a, b⟩ loses fewest digits.
    centre = everyone.detach().mean(0)
    a, b = rows - centre, everyone - centre
    squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    own = torch.arange(len(rows), device=rows.device)
    itself = torch.zeros_like(squared, dtype=torch.bool)
    itself[own, own + first] = True
    pairs = max(count * (count - 1), 1)

    def mean_of(values: Tensor) -> Tensor:
        return gather_with_grad(values.sum().reshape(1), None if sizes is None else (1,) * len(sizes)).sum() / pairs

    squared = squared.masked_fill(itself, 0.0).clamp_min(0.0)
    if residual is not None:
        squared = squared / mean_of(squared).clamp_min(EPS**2) + residual
    distances = squared.clamp_min(EPS**2).sqrt().masked_fill(itself, 0.0)  # the clamp keeps √'s gradient finite
    return distances / mean_of(distances).clamp_min(EPS)
