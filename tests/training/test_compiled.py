"""train.compile with back ends of our own: in place, equal, for whole batches, and never the end of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PipeError
from pipeline.models.checkpointing import checkpoint_blocks
from pipeline.training import compiled
from pipeline.training.compiled import Towers, compile_towers

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from tiny_models import batch, build

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every graph that has been compiled, by a back end that runs it as it is."""
    seen: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        seen.append(next(x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dtype != torch.float64))
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=False, optimize_ddp=True):  # and back to what they were
        yield seen
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def step(model: Any, rows: int) -> torch.Tensor:
    """Outputs and gradients."""
    images, tokens = batch(model, rows)
    model.zero_grad()
    out = model(images, tokens)
    (out.v * out.w.cos()).sum().backward()
    return torch.cat([out.v.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def test_towers_are_compiled_in_place_for_whole_batches_alone(graphs: list[int]) -> None:
    plain, model = build("vit", student=False).train(), build("vit", student=False).train()
    with compile_towers(model, CPU) as towers:
        graphs.clear()
        assert model.state_dict().keys() == plain.state_dict().keys()
        towers.expect(whole=True)
        assert torch.equal(step(model, 4), step(plain, 4))
        first = len(graphs)
        assert first == 2  # image and text
        towers.expect(whole=False)
        assert torch.equal(step(model, 3), step(plain, 3))
        with torch.no_grad():
            assert torch.equal(model.eval().encode_image(batch(model)[0]), plain.eval().encode_image(batch(plain)[0]))
        towers.expect(whole=True)
        step(model.train(), 4)
        assert len(graphs) == first
    assert model.trunk.clip.visual._compiled_call_impl is None


def test_a_tower_that_cannot_be_compiled_runs_as_it_is_written(graphs: list[int], monkeypatch: Any) -> None:
    plain, model = build("vit", student=False).train(), build("vit", student=False).train()
    tries: list[int] = []

    def fails(graph: Any, inputs: list[Any]) -> Any:
        tries.append(1)
        if len(tries) > 1:
            raise RuntimeError("no such instruction")
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", fails)
    with compile_towers(model, CPU):
        assert torch.equal(step(model, 2), step(plain, 2))
    assert len(tries) > 2  # the line that is tried first, and both towers


def test_without_a_compiler_one_line_says_so(graphs: list[int], monkeypatch: Any) -> None:
    def fails(graph: Any, inputs: list[Any]) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    with pytest.raises(
        PipeError, match=r"torch\.compile does not work here .*No working C\+\+ compiler.*g\+\+"
    ) as found:
        compile_towers(build("vit", student=False), CPU)
    assert "\n" not in str(found.value)


def test_batch_norms_in_blocks_that_run_twice_are_refused(graphs: list[int]) -> None:
    model = build("resnet", student=False).train()
    checkpoint_blocks(model)
    with pytest.raises(PipeError, match="leave one of them out"):
        compile_towers(model, CPU)


def test_nothing_is_touched_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: pytest.fail("a setting of the whole process"))
    with Towers() as none:
        none.expect(whole=True)
