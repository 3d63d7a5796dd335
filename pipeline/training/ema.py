"""An exponential moving average of the weights, which validates and is what a run leaves behind.

    w̄ ← d_n w̄ + (1 − d_n) w,     d_n = min(d, (1 + n) / (10 + n))         n updates done before, w̄ = w at the start

The warm-up of the decay is that of TensorFlow's ExponentialMovingAverage (its `num_updates`): after N updates the first
weights, which are random, count N! 9! / (N + 9)! ≈ 9! / N⁹, where a constant d would leave them d^N (37 % after 10,000
steps at 0.9999), and short runs would be judged by them.

torch's AveragedModel has no such warm-up; with `use_buffers` it averages every buffer, of which attention masks hold
−∞ (−∞ − −∞ is no number), and without it copies the running statistics of batch norms, which belong to the last weights
and not to their average. Here the floating-point buffers that the state dict holds are averaged as the weights are,
counters are copied, and constants are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pipeline.distributed import copy_from_first
from pipeline.losses.plackett_luce import at_least_float32

UPDATES = "updates"


class MovingAverage:
    """The average of a module's weights and running statistics, in float32 or better.

    Args:
        module: copied as it is now; nothing refers to it afterwards.
        decay: d in (0, 1).

    Attributes:
        module: the copy, in evaluation mode and without gradients. updates: n.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.module._apply(lambda x: at_least_float32(x) if x.is_floating_point() else x)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the weights that a step has just made into the average; `module` is of the kind that was copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, now = [], []
        for average, value in zip(self._tensors(self.module), self._tensors(module), strict=True):
            if average.is_floating_point():
                averages.append(average)
                now.append(value.to(average.dtype))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, now, 1 - decay)
        self.updates += 1

    def share(self) -> None:
        """Let every process have the first one's running statistics, as DDP does before a forward."""
        kept = self.module.state_dict().keys()
        for name, buffer in self.module.named_buffers():
            if name in kept:
                copy_from_first(buffer)

    def _tensors(self, module: nn.Module) -> Iterator[Tensor]:
        """Parameters, and the buffers that a state dict holds; each once, whatever shares it."""
        kept = self.module.state_dict().keys()
        yield from (parameter.detach() for parameter in module.parameters())
        yield from (buffer for name, buffer in module.named_buffers() if name in kept)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, by name; the counter among them."""
        return {**self.module.state_dict(), UPDATES: torch.tensor(self.updates)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, to the bit.

        Raises:
            KeyError, RuntimeError: the tensors are another module's.
        """
        weights = dict(tensors)
        self.updates = int(weights.pop(UPDATES))
        self.module.load_state_dict(weights, strict=True)
