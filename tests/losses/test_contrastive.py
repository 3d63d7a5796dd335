from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_inputs import unit_pairs
from scipy.special import logsumexp

from pipeline.losses.contrastive import info_nce
from pipeline.losses.pairs import Pairs


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_info_nce_is_the_mean_of_both_cross_entropies(scale: float) -> None:
    v, w = unit_pairs(7)
    found = info_nce(Pairs.alone(v, w, torch.tensor(scale, dtype=torch.float64)))
    logits = scale * v.numpy() @ w.numpy().T
    own = np.diag(logits)
    expected = 0.5 * (logsumexp(logits, axis=1) - own) + 0.5 * (logsumexp(logits, axis=0) - own)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_own_rows_of_a_larger_batch_find_their_partner() -> None:
    v, w = unit_pairs(9)
    s = torch.tensor(5.0, dtype=torch.float64)
    whole = info_nce(Pairs.alone(v, w, s))
    part = info_nce(Pairs(v[4:7], w[4:7], v, w, s, first=4, share=2 / 9, sizes=(4, 3, 2)))
    torch.testing.assert_close(part, whole[4:7])
