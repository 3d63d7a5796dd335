"""The baselines' losses and SLIP's batch norm in 1, 2 and 4 gloo processes: equal values and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.distributed import mean_over_ranks
from pipeline.losses.contrastive import AdaptiveWeights, alip, cyclic, simclr
from pipeline.losses.pairs import Pairs
from pipeline.models.simclr import BatchNormAcross, SimCLRHead

PIXELS, WIDTH, TOTAL = 7, 5, 12
SPLITS = [(6, 6), (9, 3), (3, 3, 3, 3), (1, 6, 3, 2), (5, 0, 6, 1)]
LOSSES = ("cyclic", "alip", "simclr", "slip")
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


class Baselines(nn.Module):
    """Linear maps to embeddings, and each baseline's loss on them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(PIXELS, WIDTH), nn.Linear(PIXELS, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.head = SimCLRHead(WIDTH, hidden=6, out=4)
        self.adaptive = AdaptiveWeights()
        self.double()
        self.adaptive.text_caption.fill_(0.3)  # so that some samples lie above it

    def forward(self, loss: str, batch: Tensor) -> Tensor:
        images, texts, captions, second = batch.unbind(1)
        if loss in ("simclr", "slip"):
            first, second = self.image(images), self.image(second)
            if loss == "slip":
                first, second = self.head(first), self.head(second)
                pairs = Pairs.gathered(images, images, self.log_scale)
                return pairs.mean(simclr(first, second, sizes=pairs.sizes, first_row=pairs.first))
            return Pairs.gathered(first, first, self.log_scale).mean(simclr(first, second, temperature=0.2))
        v, w, c = (
            nn.functional.normalize(x, dim=1) for x in (self.image(images), self.text(texts), self.text(captions))
        )
        pairs = Pairs.gathered(v, w, self.log_scale.exp())
        if loss == "cyclic":
            in_modal, cross_modal = cyclic(pairs)
            return pairs.mean(0.25 * in_modal + 0.5 * cross_modal)
        with_captions = Pairs.gathered(v, c, self.log_scale.exp(), pairs.sizes)
        return pairs.mean(alip(pairs, with_captions, self.adaptive(pairs, c, update=True)))


def batches(steps: int = 3) -> Tensor:
    """(steps, TOTAL, 4, PIXELS): images, texts, captions and second views that share a part."""
    generator = torch.Generator().manual_seed(4)
    shared = torch.randn(steps, TOTAL, 1, PIXELS, generator=generator, dtype=torch.float64)
    return shared + torch.randn(steps, TOTAL, 4, PIXELS, generator=generator, dtype=torch.float64)


def run_losses(rows: slice) -> dict[str, Any]:
    """Every loss on this process's rows: mean value, gradients averaged as DDP does, and buffers, over three steps."""
    found: dict[str, Any] = {}
    for loss in LOSSES:
        model = Baselines()
        values = []
        for batch in batches():
            value = model(loss, batch[rows])
            value.backward()  # gradients add up over the steps
            values.append(mean_over_ranks(value))
        gradients = {name: mean_over_ranks(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        buffers = {name: x.clone() for name, x in model.named_buffers()}
        found[loss] = {"values": torch.stack(values), "gradients": gradients, "buffers": buffers}
    return found


def run_norm(rows: slice) -> dict[str, Any]:
    """One layer of batch norm: values and gradients of the own rows, running statistics."""
    norm = BatchNormAcross(PIXELS).double()
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.5, 0.5, PIXELS))
        norm.bias.add_(torch.linspace(1, -1, PIXELS))
    outputs, gradients = [], []
    for batch in batches():
        x = batch[rows, 0].clone().requires_grad_()
        y = norm(x)
        (y * batch[rows, 1]).sum().backward()
        outputs.append(y.detach())
        gradients.append(x.grad)
    of_parameters = {name: p.grad for name, p in norm.named_parameters()}
    return {
        "outputs": torch.stack(outputs),
        "gradients": torch.stack(gradients),
        "of_parameters": of_parameters,
        "buffers": {name: x.clone() for name, x in norm.named_buffers()},
    }


def as_one_of(number: int, world: int) -> dict[str, Any]:
    """This process's part; see gloo_processes."""
    found = {}
    for split in (split for split in SPLITS if len(split) == world):
        own = slice(sum(split[:number]), sum(split[: number + 1]))
        found[str(split)] = {"losses": run_losses(own), "norm": run_norm(own)}
    return found


@pytest.fixture(scope="module")
def processes(gloo: Any) -> dict[str, list[dict[str, Any]]]:
    """What every process found, by split."""
    found = gloo["test_baselines_distributed"]
    return {str(split): [part[str(split)] for part in found[len(split)]] for split in SPLITS}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_losses(slice(None))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_gradients_and_buffers_are_those_of_one_process(
    loss: str, split: tuple[int, ...], processes: dict[str, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    whole = alone[loss]
    moved = {name for name, gradient in whole["gradients"].items() if gradient.abs().max() > 1e-6}
    before_a_norm = {"image.bias", "head.layer1.bias", "head.layer2.bias"} if loss == "slip" else set()
    assert moved == whole["gradients"].keys() - before_a_norm  # a norm takes out what a bias adds
    for part in (p["losses"][loss] for p in processes[str(split)]):
        torch.testing.assert_close(part["values"], whole["values"], **CLOSE)
        assert part["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in part["gradients"].items():
            torch.testing.assert_close(gradient, whole["gradients"][name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        for name, value in part["buffers"].items():
            torch.testing.assert_close(value, whole["buffers"][name], **CLOSE)


def test_buffers_are_the_same_on_every_process_to_the_bit(processes: dict[str, list[dict[str, Any]]]) -> None:
    for split, parts in processes.items():
        for loss in ("alip", "slip"):
            first, *others = (part["losses"][loss]["buffers"] for part in parts)
            for other in others:
                assert all(torch.equal(other[name], value) for name, value in first.items()), (split, loss)


def test_the_means_of_alip_moved_and_some_samples_lie_above_them(alone: dict[str, Any]) -> None:
    assert 0 < abs(alone["alip"]["buffers"]["adaptive.image_text"].item() - 1) < 0.05
    model, batch = Baselines(), batches()[0]
    v, w, c = (
        nn.functional.normalize(encode(x), dim=1)
        for encode, x in zip((model.image, model.text, model.text), batch.unbind(1), strict=False)
    )
    weights = model.adaptive(Pairs.alone(v, w, model.log_scale), c, update=True)
    assert 0 < (weights.sample == 1).sum() < TOTAL


@pytest.mark.parametrize("split", SPLITS)
def test_the_batch_norm_is_torchs_on_the_concatenated_batch(
    split: tuple[int, ...], processes: dict[str, list[dict[str, Any]]]
) -> None:
    norm = nn.BatchNorm1d(PIXELS).double()
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.5, 0.5, PIXELS))
        norm.bias.add_(torch.linspace(1, -1, PIXELS))
    parts = [part["norm"] for part in processes[str(split)]]
    for step, batch in enumerate(batches()):
        x = batch[:, 0].clone().requires_grad_()
        y = norm(x)
        (y * batch[:, 1]).sum().backward()
        torch.testing.assert_close(torch.cat([part["outputs"][step] for part in parts]), y.detach(), **CLOSE)
        torch.testing.assert_close(torch.cat([part["gradients"][step] for part in parts]), x.grad, **CLOSE)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(sum(part["of_parameters"][name] for part in parts), parameter.grad, **CLOSE)
    for part in parts:
        for name, value in norm.named_buffers():
            torch.testing.assert_close(part["buffers"][name], value, **CLOSE)
