"""A model with everything the objective reads, small enough to differentiate in float64 and to run in two processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.measured import Measured
from pipeline.losses.objective import Objective
from pipeline.losses.targets import TargetInfo
from pipeline.losses.weights import LossWeights

PIXELS, VOCABULARY, WIDTH, TOKENS, TEACHER, POOLED = 12, 11, 6, 4, 5, 7


class TinyModel(nn.Module):
    """Linear maps in the places of trunk, student and gates; γ is not 0, so that every path carries gradient."""

    def __init__(self, *, student: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = SimpleNamespace(embed_dim=WIDTH, pooled_width=POOLED, pooled=self._pooled)
        self.has_student = student
        self.image, self.text = nn.Linear(PIXELS, WIDTH), nn.EmbeddingBag(VOCABULARY, WIDTH)
        self.pool = nn.Linear(PIXELS, POOLED)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.student_widths = {"image": WIDTH, "text": WIDTH}
        if student:
            self.tokens = nn.Linear(PIXELS, TOKENS * 3)
            self.image_head, self.text_head = nn.Linear(WIDTH, TEACHER), nn.Linear(WIDTH, TEACHER)
            self.delta = nn.ModuleDict({"image": nn.Linear(WIDTH, WIDTH), "text": nn.Linear(WIDTH, WIDTH)})
            self.gates = nn.ModuleDict({"image": nn.Linear(2 * WIDTH, WIDTH), "text": nn.Linear(2 * WIDTH, WIDTH)})
            self.gamma = nn.ParameterDict({"image": torch.tensor(0.3), "text": torch.tensor(-0.2)})
        self.double()

    def gate_on(self, side: str, base: Tensor, delta: Tensor) -> Tensor:
        return self.gates[side](torch.cat([base, delta], 1)).sigmoid()

    def _side(self, name: str, base: Tensor) -> tuple[Tensor, SimpleNamespace]:
        delta = self.delta[name](base)
        gate = self.gate_on(name, base, delta)
        pushed = gate * delta
        tangent = pushed - (pushed * base).sum(1, keepdim=True) * base
        gamma = self.gamma[name]
        out = (base + gamma * tangent) / torch.sqrt(1 + gamma**2 * tangent.square().sum(1, keepdim=True))
        return out, SimpleNamespace(gate=gate, delta=delta, gamma=gamma, tangent=tangent)

    def _pooled(self, images: Tensor) -> Tensor:
        return self.pool(images.flatten(1).to(self.pool.weight.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        text = F.normalize(self.text(tokens), dim=1)
        return self._side("text", text)[0] if self.has_student else text

    def text_nodes(self, tokens: Tensor) -> dict[str, Tensor]:
        text = F.normalize(self.text(tokens), dim=1)
        return {"trunk": text, "gated": self._side("text", text)[0]} if self.has_student else {"trunk": text}

    def forward(self, images: Tensor, tokens: Tensor) -> SimpleNamespace:
        flat = images.flatten(1).to(self.image.weight.dtype)
        image, text = self.image(flat) + 0.0 * self.pool(flat).sum(), self.text(tokens)
        z, t = F.normalize(image, dim=1), F.normalize(text, dim=1)
        out = SimpleNamespace(z=z, t=t, v=z, w=t, logit_scale=self.log_scale.exp(), image=None, text=None)
        out.student_tokens = out.image_global = out.text_global = out.text_pooled = None
        out.student_features = out.image_pooled = None
        if self.has_student:
            out.v, out.image = self._side("image", z)
            out.w, out.text = self._side("text", t)
            out.student_tokens = {"fine": self.tokens(flat).unflatten(1, (TOKENS, 3))}
            out.image_global, out.text_global, out.text_pooled = self.image_head(image), self.text_head(text), text
            out.student_features = {"fine": image.unsqueeze(1) * torch.arange(1, TOKENS + 1).unsqueeze(1)}
            out.image_pooled = image
        return out


def batch(n: int, *, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """images (n, 3, 2, 2), tokens (n, 3), and stored targets of one int8 scale."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 2, 2, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (n, 3), generator=generator)
    fine = torch.randint(-127, 128, (n, TOKENS, 3), generator=generator, dtype=torch.int8)
    return images, tokens, {"fine": fine, "global": torch.randn(n, TEACHER, generator=generator).half()}


def extras(n: int, *, seed: int = 1) -> dict[str, Tensor]:
    """second_tokens (n, 3) and augmented (n, 2, 3, 2, 2), what ALIP and SLIP take besides."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "second_tokens": torch.randint(0, VOCABULARY, (n, 3), generator=generator),
        "augmented": torch.randn(n, 2, 3, 2, 2, generator=generator),
    }


def measured(**more: Any) -> Measured:
    """What KD and CRD need to know of the targets."""
    means = torch.linspace(-1, 1, TOKENS * 3).reshape(TOKENS, 3)
    mean = torch.linspace(1, 0, TEACHER)
    return Measured(mean, mean, {"fine": means}, {"fine": 0.4}, **more)


def info(told: Measured | None = None) -> TargetInfo:
    steps = torch.tensor([0.01, 0.02, 0.03])
    return TargetInfo(
        ("fine",), {"fine": steps}, {"gram": {"fine": 0.2}, "rkd": {"fine": 0.1, "global": 0.3}, "global": 0.5}, told
    )


def objective(order: int, *, student: bool = True, depth: int = 3, **weights: Any) -> Objective:
    """An objective in float64 whose βs are not 0; `measured` of the targets is known where a weight asks for it."""
    asks = weights.get("kd") or weights.get("crd")
    told = weights.pop("measured", measured() if asks else None)
    found = Objective(
        TinyModel(student=student),  # type: ignore[arg-type]
        order=order,
        transition_depth=depth,
        transition_dim=4,
        weights=LossWeights(**weights),  # type: ignore[arg-type]
        targets=info(told) if student else None,
    ).double()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith("betas"):
                parameter.copy_(torch.linspace(0.5, -0.4, len(parameter)))
    return found
