"""The learning rate as a function of the step, and the parameter groups it applies to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

SLOW_SCALARS_LR_SCALE = (
    10.0  # gamma, beta and the residuals: Adam moves a scalar by about lr a step, wherever it must go
)


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to 0 (Loshchilov & Hutter, arXiv 1608.03983; CLIP, arXiv 2103.00020).

        lr(k) = peak · (k + 1) / W                                 k < W
        lr(k) = peak · ½ (1 + cos(π (k − W) / (T − W)))            k ≥ W

    Args:
        step: k, counted from 0; the rate of the update that leads to step k + 1.
        total_steps: T.
        warmup_steps: W; shortened to a tenth of T where the run is too short for it.
    """
    warmup = min(warmup_steps, total_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total_steps - warmup, 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, student_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Three groups for AdamW: decayed matrices, undecayed vectors, and γ, β and log ρ² at ten times the rate.

    No decay on β, γ, logit_scale, norms and biases: everything with fewer than two dimensions (our reading).
    With a `student_scale` other than 1, the student's matrices and vectors, and those of the heads that only its losses
    have, are two groups of their own at that multiple of the rate: it begins from nothing beside a trunk that may not.
    Each group carries `lr_scale` and the `names` of its parameters, in order.
    """
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "names": [], "weight_decay": weight_decay, "lr_scale": 1.0},
        "no_decay": {"params": [], "names": [], "weight_decay": 0.0, "lr_scale": 1.0},
        "slow_scalars": {"params": [], "names": [], "weight_decay": 0.0, "lr_scale": SLOW_SCALARS_LR_SCALE},
    }
    if student_scale != 1.0:
        groups |= {f"student_{kind}": {**groups[kind], "params": [], "names": []} for kind in ("decay", "no_decay")}
        for kind in ("student_decay", "student_no_decay"):
            groups[kind]["lr_scale"] = student_scale
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        kind = "slow_scalars" if is_gamma_or_beta(name) else "decay" if parameter.ndim >= 2 else "no_decay"
        kind = f"student_{kind}" if f"student_{kind}" in groups and is_students(name) else kind
        groups[kind]["params"].append(parameter)
        groups[kind]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def is_students(name: str) -> bool:
    """Whether a parameter of the objective is the student's, or that of a head of KD or CRD."""
    return name.startswith(("model.student.", "heads."))


def is_gamma_or_beta(name: str) -> bool:
    """Whether a parameter is the injection's γ, a transition's β or a residual's log ρ² (not a layer scale's gamma)."""
    parts = name.split(".")
    if parts[-1] == "gamma":
        return "fusion" in parts
    return ("transitions" in parts and parts[-1] == "betas") or "residuals" in parts
