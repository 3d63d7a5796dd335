"""Do the two modalities order things alike? What the ranking loss is for, as a number to watch.

Legend: b rows, M candidates, N gathered pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses.pairs import Pairs

ROWS, CANDIDATES = 16, 512


@torch.no_grad()
def kendall_tau(x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Kendall's τ-a of each row's two orders, a tie counting 0, averaged over rows.

        τ = Σ_{j<k} sign(x_j − x_k) sign(y_j − y_k) / (M (M − 1) / 2)

    Args:
        x, y: (b, M) values to order by; without rows τ is 0. valid: (b, M) bool, candidates to count; None for all.

    Memory b·M·M.
    """
    agree = (x[:, :, None] - x[:, None, :]).sign() * (y[:, :, None] - y[:, None, :]).sign()  # (b, M, M)
    if valid is None:
        valid = torch.ones_like(x, dtype=torch.bool)
    count = valid.sum(1).to(x.dtype)
    agree = agree * (valid[:, :, None] & valid[:, None, :])
    return (agree.sum((1, 2)) / (count * (count - 1)).clamp_min(1)).sum() / max(1, len(x))


@torch.no_grad()
def order_agreement(pairs: Pairs) -> dict[str, Tensor]:
    """τ between image→text and text→image similarities ("cross"), and between image-image and text-text ("in_modal").

    Taken over at most 16 of the own rows and 512 of the candidates, evenly spaced; a row's own item is left out of the
    in-modal one. "kendall_tau" is the mean of both. Each is W B / N times the mean over own rows (once it, for a single
    process), so that its average over processes weighs all rows alike.
    """
    share = pairs.share * len(pairs.image_rows)
    rows = _spread(len(pairs.image_rows), ROWS, pairs.image_rows.device)
    some = _spread(len(pairs.image_all), CANDIDATES, pairs.image_rows.device)
    v, w = pairs.image_rows[rows].detach(), pairs.text_rows[rows].detach()
    v_all, w_all = pairs.image_all[some].detach(), pairs.text_all[some].detach()
    cross = share * kendall_tau(v @ w_all.T, w @ v_all.T)
    in_modal = share * kendall_tau(v @ v_all.T, w @ w_all.T, (rows + pairs.first)[:, None] != some)
    return {
        "kendall_tau": (cross + in_modal) / 2,
        "kendall_tau/cross": cross,
        "kendall_tau/in_modal": in_modal,
    }


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of the indices 0 … count − 1, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long().to(device)
