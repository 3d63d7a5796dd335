"""torch.compile of the model's towers, in place: no name in the state dict changes.

Each tower is compiled for the shapes of a whole batch. Batches that miss images, and validation, run what fits of that
and the rest as it is written: compiling RN50 takes minutes, and a tower that cannot be compiled for some shape is no
reason to end a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.errors import PipeError
from pipeline.losses.chunks import has_batch_norm

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import DinoRankCLIP

Backend = str | Callable[..., Any]
BACKEND: Backend = "inductor"


class Towers:
    """Compiled modules while they train, none where nothing is compiled. A context, behind which they are as ever."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.modules = list(modules)

    def expect(self, *, whole: bool) -> None:
        """Say whether the next batch has the usual shapes, for which it may be worth compiling."""
        if self.modules:
            torch.compiler.set_stance("default" if whole else "eager_on_recompile")

    def __enter__(self) -> Towers:
        return self

    def __exit__(self, *error: object) -> None:
        if self.modules:
            torch.compiler.set_stance("default")
        for module in self.modules:
            module._compiled_call_impl = None


def compile_towers(model: DinoRankCLIP, device: torch.device) -> Towers:
    """Trunk, student and fusion, each by itself, at their first use.

    Raises:
        PipeError: nothing can be compiled here, or not this model.
    """
    _try(device)
    clip: Any = model.trunk.clip
    text = getattr(clip, "text", clip)
    towers = Towers([clip.visual, text.transformer, *model.student.values(), *model.fusion.values()])
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()) and has_batch_norm(clip.visual):
        raise PipeError(
            "a trunk with batch norms cannot be compiled where its blocks run twice",
            where="train.compile, train.grad_checkpointing",
            fix="leave one of them out; train.micro_batch_size saves memory too",
        )
    torch._dynamo.config.suppress_errors = True  # run as written, with a warning
    torch._dynamo.config.optimize_ddp = False  # it cuts one large graph at DDP's buckets; these are several
    for module in towers.modules:
        module.compile(backend=BACKEND, dynamic=False)
    return towers


def _try(device: torch.device) -> None:
    """Compile a line: it takes a compiler of C++ (CPU) or Triton (GPU), which not every machine has."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:150]
        fix = "install a C++ compiler (g++), or leave train.compile out"
        raise PipeError(f"torch.compile does not work here ({reason})", where="train.compile", fix=fix) from error
