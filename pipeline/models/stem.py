"""Pixels to tokens by strided convolutions, in place of a vision transformer's single linear map of a patch.

Early convolutions make small transformers learn faster and more steadily (Xiao et al., arXiv 2106.14881): edges and
textures need not be put together from raw patches by attention. The widths are our choice. The norms are batch norms,
as in a ResNet trunk and with the same consequence: several processes, or parts of a batch, have their own statistics.
Group norms, which would not, learned much more slowly (seen on the demo's scenes: 0.94 of the baseline for the image's
vector after 100 steps, where batch norms had 0.44).

Legend: B images, H, W their sides, V the transformer's width, p its patch.
"""

from __future__ import annotations

import math

from torch import nn

from pipeline.errors import PipeError


def conv_stem(patch: int, width: int) -> nn.Sequential:
    """(B, 3, H, W) → (B, V, H / p, W / p): log2 p convolutions of 3 × 3 and stride 2, then one of 1 × 1.

    Args:
        patch: p, a power of 2, at least 2.
        width: V, that of the last two convolutions; each before them is half as wide as the next.

    Raises:
        PipeError: p is no power of 2.
    """
    stages = round(math.log2(patch))
    if stages < 1 or 2**stages != patch:
        near = 2 ** max(stages, 1)
        raise PipeError(
            f"strided convolutions make no patch of {patch}", where="model.student.stem", fix=f"use a patch of {near}"
        )
    layers: list[nn.Module] = []
    wide = 3
    for stage in range(stages):
        out = max(width >> (stages - 1 - stage), 8)
        layers += [nn.Conv2d(wide, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        wide = out
    return nn.Sequential(*layers, nn.Conv2d(wide, width, 1))
