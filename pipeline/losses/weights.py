"""The weight of every term of the objective, and how the ranking terms' weights rise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.losses.head_kernel import Head
from pipeline.losses.plackett_luce import Positions


@dataclass(frozen=True)
class LossWeights:
    """The λ of every term and the shape of the lists; one field per key of the config's `loss`.

    Attributes:
        contrastive: "clip" (InfoNCE), or "alip", which weighs pairs and needs a second caption of each image.
        cyclic_in_modal, cyclic_cross: of CyCLIP's two terms.
        simclr: of SLIP's term, which needs two augmented views of each image; simclr_temperature, simclr_hidden,
            simclr_dim: its temperature and the widths of its head.
        cross, in_modal: what the ranking terms rise to over `ramp`, a share of training.
        gram, rkd, global_: of distillation; kd, crd: its options, crd_temperature and crd_dim those of CRD.
        gate_l1, conflict: of the gate.
    """

    contrastive: Literal["clip", "alip"] = "clip"
    cyclic_in_modal: float = 0.0
    cyclic_cross: float = 0.0
    simclr: float = 0.0
    simclr_temperature: float = 0.1
    simclr_hidden: int = 4096
    simclr_dim: int = 256
    cross: float = 1.0
    in_modal: float = 1.0
    ramp: float = 0.667
    ramp_shape: Literal["cosine", "linear"] = "cosine"
    positions: Positions = "head_tail"
    head_share: float = 0.5
    list_depth: int | None = None
    include_self: bool = False
    head: Head = "auto"
    gram: float = 1.0
    rkd: float = 1.0
    global_: float = 1.0
    kd: float = 0.0
    crd: float = 0.0
    crd_temperature: float = 0.07
    crd_dim: int = 128
    gate_l1: float = 0.01
    conflict: float = 1.0

    def ranking(self, progress: float) -> dict[str, float]:
        """w_c and w_i at `progress` in [0, 1] of training, by group of lists; a group whose λ is 0 is left out."""
        reached = ramp(progress, self.ramp, self.ramp_shape)
        return {group: reached * final for group in ("cross", "in_modal") if (final := getattr(self, group)) > 0}

    @property
    def distils(self) -> bool:
        return any((self.gram, self.rkd, self.global_, self.kd, self.crd))


def ramp(progress: float, share: float, shape: Literal["cosine", "linear"]) -> float:
    """From 0 to 1 over the first `share` η of training, progress t in [0, 1]:

    cosine ½ (1 − cos(π min(t/η, 1))),  linear min(t/η, 1);  1 throughout where η = 0.
    """
    done = min(progress / share, 1.0) if share > 0 else 1.0
    return done if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
