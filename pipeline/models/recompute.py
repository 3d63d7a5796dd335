"""Forward passes whose activations are not kept: the backward pass runs them a second time.

torch.utils.checkpoint (Chen et al., arXiv 1604.06174) in its non-reentrant form: the graph is the ordinary one, so that
a parameter's gradient arrives once, however often the parameter was used (DDP reduces it once), the random state and
autocast of the first pass come back in the second, and a gradient of less than the whole graph may be asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *inputs: Any, inside: nn.Module | None) -> Any:
    """function(*inputs), with gradients, without keeping its activations.

    Args:
        function: a function of its inputs and of `inside`'s parameters, without collective communication.
        inside: what it runs, whose batch norms take a batch's statistics into their running ones once; None: it has
            none (torch.compile knows this form alone).
    """
    if inside is None:
        return checkpoint(function, *inputs, use_reentrant=False)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), SecondPass(inside)))


class SecondPass:
    """A context in which batch norms normalise by the batch, as the first pass did, and remember and count nothing.

    It may be entered again and again, since several gradients may be taken from one graph.
    """

    def __init__(self, module: nn.Module) -> None:
        training = (m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats)
        self.norms = list(training)
        self._before: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, tracked) in zip(self.norms, self._before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
