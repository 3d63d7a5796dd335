"""A group's cosines and the way of their gradients: the same whether whole or in chunks."""

from __future__ import annotations

import pytest
import torch
from loss_inputs import unit_pairs

from pipeline.losses import products
from pipeline.losses.products import GROUPS, Chunked, WholeCross, WholeInModal, fits_whole


@pytest.mark.parametrize("n", [1, 3, 7, 10])
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_whole_and_chunked_agree_with_autograd(group: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 3)
    pairs = unit_pairs(n, 5)
    leaves = {name: rows.clone().requires_grad_() for name, rows in zip(("image", "text"), pairs, strict=True)}
    rows = {name: leaf.detach() for name, leaf in leaves.items()}
    generator = torch.Generator().manual_seed(n)
    upstream = {family: torch.randn(n, n, generator=generator, dtype=torch.float64) for family in GROUPS[group]}
    expected = sum((upstream[a, b] * (leaves[a] @ leaves[b].T)).sum() for a, b in GROUPS[group])
    wanted = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True))

    def run(made: object, chunks: int) -> None:
        for start in range(0, n, chunks):
            chunk = slice(start, min(start + chunks, n))
            for (a, b), x in made.cosines(chunk).items():
                torch.testing.assert_close(x, rows[a][chunk] @ rows[b].T)
                assert x.is_contiguous()
            made.add(chunk, {family: g[chunk] for family, g in upstream.items()})
        made.finish()

    for chunks in (1, 2, n):
        whole = {name: torch.zeros_like(x) for name, x in rows.items()}
        run((WholeCross if group == "cross" else WholeInModal)(rows, whole), chunks)
        own, candidates = ({name: torch.zeros_like(x) for name, x in rows.items()} for _ in range(2))
        run(Chunked(group, rows, rows, own, candidates), chunks)
        for name, gradient in wanted.items():
            torch.testing.assert_close(whole[name], gradient)
            torch.testing.assert_close(own[name] + candidates[name], gradient)


def test_a_modalitys_own_cosines_are_symmetric_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK", 16)
    v = unit_pairs(40, 24, dtype=torch.float32)[0]
    x = WholeInModal({"image": v}, None).x["image"]
    assert all(
        torch.equal(x[a : a + 16, b : b + 16], x[b : b + 16, a : a + 16].T) for a, b in ((0, 16), (0, 32), (16, 32))
    )
    torch.testing.assert_close(x, v @ v.T)


def test_nothing_is_held_whole_by_one_of_several_processes_or_beyond_its_bytes() -> None:
    rows = torch.empty(5792, 1)
    assert fits_whole(rows, 1)
    assert not fits_whole(rows, 2)
    assert not fits_whole(torch.empty(5793, 1), 1)
    assert not fits_whole(rows.double(), 1)
