"""Run with TRITON_INTERPRET=1, which must be set before Triton is imported: prints how far the kernels are from others.

python triton_interpreted.py → {"kernel ...": {...}, "loss ...": {...}} as JSON, relative to the largest value
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from loss_inputs import heads, unit_pairs  # noqa: E402

from pipeline.losses import ranking, ranking_triton  # noqa: E402
from pipeline.losses.lists import ListSettings, list_loss  # noqa: E402
from pipeline.losses.pairs import Pairs  # noqa: E402
from pipeline.losses.plackett_luce import plackett_luce_nll  # noqa: E402

# lists, candidates, positions, width, spread of u: within a tile, beyond it, whole lists, not a multiple of anything;
# blocks of which nothing is left while others have some; and u as s = 100 gives, where exp(u) is beyond float32
SHAPES = [(3, 70, 32, 16, 5), (2, 130, 5, 8, 5), (4, 40, 40, 64, 5), (1, 200, 33, 3, 5), (18, 65, 7, 20, 5)]
SHAPES += [(2, 130, 129, 8, 5), (3, 70, 8, 16, 60)]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def inputs(lists: int, candidates: int, positions: int, width: int, spread: float) -> tuple[Tensor, ...]:
    """In float64; candidate 7 is left out of every list, as a row leaves itself out."""
    generator = torch.Generator().manual_seed(candidates)
    u = spread * torch.randn(lists, candidates, generator=generator, dtype=torch.float64)
    u[:, 7] = -torch.inf
    orders = [torch.randperm(candidates, generator=generator) for _ in range(lists)]
    listed = torch.stack([order[order != 7][:positions] for order in orders])
    q = torch.randn(lists, listed.shape[1], width, generator=generator, dtype=torch.float64)
    keys = torch.nn.functional.normalize(
        torch.randn(candidates, width, generator=generator, dtype=torch.float64), dim=1
    )
    weights = torch.rand(listed.shape[1], generator=generator, dtype=torch.float64)
    return u, q, keys, listed, torch.tensor(14.0, dtype=torch.float64), weights


def by_autograd(u: Tensor, q: Tensor, keys: Tensor, listed: Tensor, s: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Gradients of the plain likelihood, position by position, in float64."""
    u, q, keys, s = (x.clone().requires_grad_() for x in (u, q, keys, s))
    total = u.new_zeros(())
    nll = []
    for k in range(listed.shape[1]):
        upto = [plackett_luce_nll(u, listed[:, :n], s * q[:, :n] @ keys.T) if n else 0.0 for n in (k, k + 1)]
        nll.append((upto[1] - upto[0]).sum())
        total = total + weights[k] * nll[-1]
    total.backward()
    return {
        "nll": torch.stack(nll).detach(),
        "utilities": u.grad,
        "queries": q.grad,
        "keys": keys.grad,
        "scale": s.grad,
    }  # type: ignore[dict-item]


def kernels() -> dict[str, dict[str, float]]:
    found = {}
    for shape in SHAPES:
        exact = inputs(*shape)
        single = tuple(x.float() if x.is_floating_point() and x is not exact[5] else x for x in exact)
        ours = ranking_triton.with_transitions(*single, gradient=True)
        chunked = ranking.with_transitions(*single, gradient=True, cells=1 << 14)
        expected = by_autograd(*exact)
        for name in expected:
            found[f"kernel {shape}: {name}"] = {
                "plain": off(getattr(ours, name), expected[name]),
                "chunked": off(getattr(ours, name), getattr(chunked, name)),
            }
        alone = ranking_triton.with_transitions(*single, gradient=False)
        assert alone.utilities is None
        found[f"kernel {shape}: nll without gradient"] = {"chunked": off(alone.nll, chunked.nll)}
    return found


def losses() -> dict[str, dict[str, float]]:
    """The whole loss, orders 2 to 4, through every gradient."""
    found = {}
    for order in (2, 3, 4):
        results = {}
        for head in ("triton", "chunked"):
            v, w = unit_pairs(24, 9, seed=order, dtype=torch.float32).clone().requires_grad_().unbind(0)
            v, w = v.detach().requires_grad_(), w.detach().requires_grad_()
            s = torch.tensor(14.0, requires_grad=True)
            maps = {name: of.float() for name, of in heads(order, 9, dim=6).items()}
            tables = {"image": maps["image"](v), "text": maps["text"](w)}
            settings = ListSettings(transition_depth=8, head=head)  # type: ignore[arg-type]
            loss = list_loss(Pairs.alone(v, w, s), settings, {"cross": 0.7, "in_modal": 1.3}, tables).loss
            loss.backward()
            parameters = {f"{name}.{key}": p for name, of in maps.items() for key, p in of.named_parameters()}
            results[head] = {"loss": loss.detach()} | {
                key: x.grad for key, x in ({"v": v, "w": w, "s": s} | parameters).items()
            }
        found |= {
            f"loss of order {order}: {key}": {"chunked": off(results["triton"][key], value)}
            for key, value in results["chunked"].items()
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kernels() | losses()))
