"""Where the time of a training step goes: a stopwatch that hands each moment to exactly one part.

The run is the command's own (`pipeline.training.loop`); its functions are wrapped from outside while it is watched, so
that nothing is measured which training does not do. A part that calls another stops while that one runs, so the parts
add up to the whole. On a GPU every change of part waits for the device.

The backward pass has no functions of its own to wrap. Autograd runs its nodes in the reverse order of the forward pass,
and the node behind a part's output tells when that part's turn comes; what precedes the first of them are the losses.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch

LOOP = "the loop itself"
PARTS = (
    "waiting for data",
    "to the device",
    "trunk, forward",
    "student, forward",
    "fusion, forward",
    "contrastive",
    "lists",
    "distillation",
    "gate",
    "losses, backward",
    "trunk, backward",
    "student, backward",
    "fusion, backward",
    "clipping",
    "optimiser",
    "logging",
    LOOP,
)


class Stopwatch:
    """Seconds by part, exclusive: whoever was called last is charged.

    Attributes:
        seconds: part → its time so far; their sum is the time watched.
        cpu: the same of the time that this process's threads had on a processor.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.cpu = device, defaultdict[str, float](float), defaultdict[str, float](float)
        self._stack: list[str] = []
        self._since = self._cpu_since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `name`, but for the parts within it."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, cpu_now = time.perf_counter(), time.process_time()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
            self.cpu[self._stack[-1]] += cpu_now - self._cpu_since
        self._since, self._cpu_since = now, cpu_now

    def turn_to(self, name: str) -> None:
        """Charge the rest of the part at hand to `name`."""
        self._charge()
        self._stack[-1] = name

    def wrapped(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        """`work`, charged to `name`; for a name that ends in `forward`, its backward pass to that of `backward`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                result = work(*arguments, **named)
            if name.endswith("forward"):
                later = name.removesuffix("forward") + "backward"
                for node in {x.grad_fn for x in _tensors(result) if x.grad_fn is not None}:
                    node.register_prehook(lambda _: self.turn_to(later))
            return result

        return timed


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    """Those in a tensor, a sequence, a mapping or a dataclass."""
    if isinstance(found, torch.Tensor):
        yield found
    elif is_dataclass(found):
        yield from _tensors([getattr(found, of.name) for of in fields(found)])
    elif isinstance(found, dict | list | tuple):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _tensors(part)


@contextmanager
def watching(watch: Stopwatch, training: Any) -> Iterator[None]:
    """Wrap the parts of a run in progress (`pipeline.training.loop.Training`), and put everything back."""
    from pipeline.losses import objective as objective_module
    from pipeline.training.data import Batch

    objective, accelerator = training.bare, training.accelerator
    model = objective.model
    targets = [(Batch, "to", "to the device")]
    targets += [(model.trunk, name, "trunk, forward") for name in ("encode_image", "encode_text", "text_features")]
    for branch in model.student.values():
        names = ("forward", "distilled", "predict_global")
        targets += [(branch, name, "student, forward") for name in names if hasattr(branch, name)]
    targets += [(side, "forward", "fusion, forward") for side in model.fusion.values()]
    targets += [(objective, f"_{name}", name) for name in ("contrastive", "lists", "distillation")]
    targets += [(objective_module, "add_gate", "gate"), (objective_module, "order_agreement", "logging")]
    targets += [(accelerator, "backward", "losses, backward"), (accelerator, "clip_grad_norm_", "clipping")]
    targets += [(training.optimizer, name, "optimiser") for name in ("step", "zero_grad")]
    targets += [(training, name, "logging") for name in ("_after_step", "_part_gradients", "_term_gradients")]
    with ExitStack() as undo:
        for owner, name, part in targets:
            undo.enter_context(_replaced(owner, name, watch.wrapped(getattr(owner, name), part)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while; an instance that had it from its class gets that back."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def watched(watch: Stopwatch, stream: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the time until each comes is charged to waiting."""
    while True:
        with watch.part("waiting for data"):
            batch = next(stream, None)
        if batch is None:
            return
        yield batch
