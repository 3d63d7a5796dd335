"""What does the ranking loss of one batch cost, forward and backward, in time and memory?

Four families of lists (image → text, text → image, image → image, text → text) over a batch of N pairs of random unit
embeddings, on one thread, with every position of equal weight and each item in its own in-modal list, so that all
implementations of an order compute the same number (but for the published ε; checked before timing, order 3 where the
naive form fits):

    published   ListMLE as RankCLIP uses it (arXiv 2404.09387): sort by the reference, running sums of exp in float32,
                log(sum + 1e-10), through autograd
    order 1     ours: the same likelihood, fused
    order 3     ours, with transitions on the first 32 positions (d = 64)
    naive       order 3 with its B × T × N scores held whole, through autograd; only where those are few

Times are medians over interleaved rounds. With one thread the CPU time is what the work costs; the wall time contains
what the machine did besides. Memory is the growth of the peak resident set of a process of its own, from after the
inputs exist to the end of the backward: the gradients of the inputs (8 kB a pair at D = 1,024) are in it. Where the
system can forget the earlier peak (Linux), what making the inputs took for a moment does not hide any of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Timing, interleave, load, machine, markdown, parser, report
from torch import Tensor, nn

from pipeline.losses.lists import ListSettings, list_loss
from pipeline.losses.pairs import Pairs
from pipeline.losses.plackett_luce import plackett_luce_nll, worst_first
from pipeline.losses.transitions import Transitions, transition_scores

ORDER, DEPTH, DIM = 3, 32, 64
SCALE = 1 / 0.07  # where CLIP starts; at 100 the published form loses what lies 23 nats below the best
EPSILON = 1e-10
NAIVE_CELLS = 1 << 25  # B × T × N scores of one family; N = 1,024 at depth 32
REFERENCE = "published"
WARM_PAIRS = 64
STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Inputs:
    """images, texts: (N, D) unit rows with gradient. heads: candidate modality → its transitions, βs not 0."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    heads: dict[str, Transitions]


def make_inputs(pairs: int, width: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(pairs, width, generator=generator)
    images, texts = (F.normalize(shared + torch.randn(pairs, width, generator=generator), dim=1) for _ in range(2))
    torch.manual_seed(seed)
    heads = {name: Transitions(width, ORDER, DIM) for name in ("image", "text")}
    for head in heads.values():
        nn.init.constant_(head.betas, 0.2)
    return Inputs(images.requires_grad_(), texts.requires_grad_(), torch.tensor(SCALE, requires_grad=True), heads)


# --- implementations: each gives Σ over the four families of the mean over lists and positions ------------------------


def published(inputs: Inputs, epsilon: float = EPSILON) -> Tensor:
    s, v, w = inputs.scale, inputs.images, inputs.texts
    cross, images, texts = s * v @ w.T, s * v @ v.T, s * w @ w.T
    lists = [(cross, cross.T), (cross.T, cross), (images, texts), (texts, images)]
    return torch.stack([published_list_mle(x, reference.detach(), epsilon) for x, reference in lists]).sum() / len(v)


def published_list_mle(predicted: Tensor, reference: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Σ over positions of log(Σ_{j ∉ π_<k} exp(u_j) + ε) − u_{π_k}, mean over lists; ties fall at random.

    predicted, reference: (B, N). Written from its definition.
    """
    shuffle = torch.randperm(predicted.shape[1])
    order = reference[:, shuffle].sort(dim=1, descending=True).indices
    u = predicted[:, shuffle].gather(1, order)
    u = u - u.max(dim=1, keepdim=True).values
    left = u.exp().flip(1).cumsum(1).flip(1)
    return ((left + epsilon).log() - u).sum(1).mean()


def order_1(inputs: Inputs) -> Tensor:
    return _ours(inputs, order=1)


def order_3(inputs: Inputs) -> Tensor:
    return _ours(inputs, order=ORDER)


def _ours(inputs: Inputs, order: int) -> Tensor:
    v, w = inputs.images, inputs.texts
    settings = ListSettings(transition_depth=DEPTH, positions="uniform", include_self=True)
    tables = None if order == 1 else {"image": inputs.heads["image"](v), "text": inputs.heads["text"](w)}
    return list_loss(Pairs.alone(v, w, inputs.scale), settings, {"cross": 1.0, "in_modal": 1.0}, tables).loss


def naive(inputs: Inputs) -> Tensor:
    s, v, w = inputs.scale, inputs.images, inputs.texts
    cross, images, texts = v @ w.T, v @ v.T, w @ w.T
    tables = {"image": inputs.heads["image"](v), "text": inputs.heads["text"](w)}
    lists = [
        (cross, cross.T, "text"),
        (cross.T, cross, "image"),
        (images, texts, "image"),
        (texts, images, "text"),
    ]
    total = s.new_zeros(())
    for x, reference, candidates in lists:
        ranking = worst_first(reference.detach()).flip(1)
        head = transition_scores(tables[candidates], ranking[:, :DEPTH], s)  # (B, T, N)
        total = total + plackett_luce_nll(s * x, ranking, head).mean() / len(v)
    return total


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "published": published,
    "order 1": order_1,
    "order 3": order_3,
    "naive": naive,
}
SAME_VALUE = (("published", "order 1"), ("naive", "order 3"))


def implementations(pairs: int) -> list[str]:
    """Those that a batch of this size is small enough for."""
    return [name for name in IMPLEMENTATIONS if name != "naive" or pairs * min(DEPTH, pairs) * pairs <= NAIVE_CELLS]


def step(name: str, inputs: Inputs, **options: float) -> float:
    """Forward and backward; the loss. options: further arguments of the implementation."""
    parameters = [p for head in inputs.heads.values() for p in head.parameters()]
    for x in (inputs.images, inputs.texts, inputs.scale, *parameters):
        x.grad = None
    loss = IMPLEMENTATIONS[name](inputs, **options)
    loss.backward()
    return loss.item()


def check_agreement(names: list[str], inputs: Inputs, tolerance: float = 1e-4) -> None:
    """Raise where two implementations of one order differ in value, or in the gradient of the images, by more.

    The ε of the published form is left out here: it is the one difference that is meant.
    """
    for pair in SAME_VALUE:
        if not set(pair) <= set(names):
            continue
        results = []
        for name in pair:
            value = step(name, inputs, **({"epsilon": 0.0} if name == "published" else {}))
            assert inputs.images.grad is not None
            results.append((value, inputs.images.grad.clone()))
        (value, gradient), (other_value, other_gradient) = results
        off = max(abs(other_value / value - 1), ((other_gradient - gradient).norm() / gradient.norm()).item())
        if not off <= tolerance:
            raise ValueError(f"{pair[0]} and {pair[1]} differ by {off:.1e} at N = {len(inputs.images)}")


# --- measuring --------------------------------------------------------------------------------------------------------


def peak_mebibytes(name: str, pairs: int, width: int) -> float:
    """How far one forward and backward raises this process's peak resident memory; call it in a fresh process."""
    torch.set_num_threads(1)
    step(name, make_inputs(WARM_PAIRS, width))  # what libraries allocate once does not count
    inputs = make_inputs(pairs, width)
    with suppress(OSError):
        CLEAR_PEAK.write_text("5")  # from here on the peak is that of now
    before = _peak_bytes()
    step(name, inputs)
    return (_peak_bytes() - before) / 2**20


def _peak_bytes() -> int:
    if STATUS.is_file():
        found = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_peaks(sizes: list[int], width: int) -> dict[tuple[int, str], float]:
    """MiB by size and implementation, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # clean processes that need not import torch again
    context.set_forkserver_preload(["torch", "pipeline.losses.lists"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = {(n, name): pool.submit(peak_mebibytes, name, n, width) for n in sizes for name in implementations(n)}
        return {key: future.result() for key, future in waiting.items()}


def measure_times(pairs: int, width: int, rounds: int) -> dict[str, Timing]:
    names, inputs = implementations(pairs), make_inputs(pairs, width)
    check_agreement(names, inputs)
    return interleave({name: partial(_round, name, inputs) for name in names}, rounds)


def _round(name: str, inputs: Inputs, _: int) -> float:
    return step(name, inputs)


def tabulate(times: dict[int, dict[str, Timing]], peaks: dict[tuple[int, str], float]) -> tuple[str, dict[str, float]]:
    """The table, and its figures by name."""
    cells: list[list[str]] = []
    figures: dict[str, float] = {}
    for pairs, timings in times.items():
        for name, timing in timings.items():
            ratio = timing.ratio(timings[REFERENCE], "cpu")
            wall, cpu, peak = timing.median(), timing.median("cpu"), peaks[pairs, name]
            key = f"{pairs}/{name.replace(' ', '_')}"
            figures |= {
                f"{key}/wall_seconds": wall,
                f"{key}/cpu_seconds": cpu,
                f"{key}/ratio_of_cpu_time_to_published": ratio,
                f"{key}/peak_mebibytes": peak,
            }
            shown = (f"{pairs:,}", f"{wall:.3g}", f"{cpu:.3g}", f"{ratio:.2f}", f"{peak:,.0f}", str(len(timing.wall)))
            cells.append([name, *shown])
    columns = ["implementation", "N", "wall s", "CPU s", "CPU / published", "peak MiB", "rounds"]
    return markdown(columns, cells), figures


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--large", action="store_true", help="N = 4,096 too (minutes, about 2 GiB)")
    command.add_argument("--width", type=int, default=1024, help="D of the embeddings (1,024, as RN50 has it)")
    command.add_argument("--rounds", type=int, help="timed rounds (5; quick 2)")
    arguments = command.parse_args()
    if arguments.width < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        command.error("--width and --rounds take whole numbers from 1")
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    load_before = load()
    torch.set_num_threads(1)
    sizes = [48] if arguments.quick else [256, 1024, *([4096] if arguments.large else [])]
    width = min(arguments.width, 64) if arguments.quick else arguments.width
    peaks = measure_peaks(sizes, width)
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    times = {n: measure_times(n, width, rounds) for n in sizes}
    table, figures = tabulate(times, peaks)
    figures |= {"width": width, "transition_depth": DEPTH, "transition_dim": DIM}
    report(arguments, machine(("torch",)), load_before, table, figures)


if __name__ == "__main__":
    main()
