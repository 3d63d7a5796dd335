"""The Triton kernels: their numbers under the interpreter on a CPU, that they compile for GPUs, and who chooses them.

What no test here sees is a GPU running them: `head_kernel` compares them there, before it trusts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipeError
from pipeline.losses import head_kernel as choosing
from pipeline.losses import ranking

triton = pytest.importorskip("triton", reason="Triton is made for Linux and Windows alone")

SCRIPT = Path(__file__).parent / "triton_interpreted.py"
TYPES = {"ranks": "*i32", "T": "i32", "N": "i32", "D": "i32", "lists": "i32"}
TILE = {"BT": 32, "BN": 64, "BD": 64, "SHARES": 16}  # as `with_transitions` has them for d = 64


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def test_the_kernels_give_the_likelihood_and_every_gradient(interpreted: dict[str, dict[str, float]]) -> None:
    seen = {name: off for name, off in interpreted.items() if name.startswith("kernel")}
    assert len(seen) == 7 * 6
    for name, off in seen.items():
        assert max(off.values()) < 5e-6, (name, off)


def test_the_whole_loss_is_the_same_with_either_code(interpreted: dict[str, dict[str, float]]) -> None:
    seen = {name: off for name, off in interpreted.items() if name.startswith("loss")}
    assert {"loss of order 2: v", "loss of order 4: text.betas", "loss of order 3: s"} <= seen.keys()
    for name, off in seen.items():
        assert off["chunked"] < 2e-5, (name, off)


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("name", ["_log_sums", "_mean_keys", "_of_candidates"])
def test_a_kernel_compiles_without_atomics_and_fits_a_gpu(name: str, capability: int) -> None:
    """Triton brings its own assembler: no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.losses import ranking_triton

    kernel = getattr(ranking_triton, name)
    signature = {arg: "constexpr" if arg in TILE else TYPES.get(arg, "*fp32") for arg in kernel.arg_names}
    constants = {(place,): TILE[arg] for place, arg in enumerate(kernel.arg_names) if arg in TILE}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": ranking_triton.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= 64 << 10  # what a program may have on a T4, the smallest
    assert compiled.asm["cubin"]
    assert not [line for line in compiled.asm["ptx"].splitlines() if line.strip().startswith(("atom", "red."))]


def test_a_width_that_no_gpu_has_room_for_takes_the_chunked_code() -> None:
    from pipeline.losses import ranking_triton

    try:
        with pytest.raises(PipeError, match="up to 256 wide, not 257"):
            choosing.head_kernel("triton", torch.device("cpu"), torch.float32, ranking_triton.WIDEST + 1)
    finally:
        choosing._reason_against.cache_clear()


def test_each_width_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(choosing, "_tried", lambda device, width: tried.append(width))
    choosing._reason_against.cache_clear()
    try:
        for width in (16, 64, 16):
            choosing.head_kernel("triton", torch.device("cpu"), torch.float32, width)
    finally:
        choosing._reason_against.cache_clear()
    assert tried == [16, 64]


def test_a_cpu_takes_the_chunked_code_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    assert choosing.head_kernel("auto", torch.device("cpu"), torch.float32, 64) is ranking.with_transitions
    assert choosing.head_kernel("chunked", torch.device("cuda"), torch.float32, 64) is ranking.with_transitions
    assert not caplog.records


def test_a_gpu_takes_the_kernels_once_they_have_given_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.losses import ranking_triton

    monkeypatch.setattr(choosing, "_reason_against", lambda device, width: None)
    chosen = choosing.head_kernel("auto", torch.device("cuda"), torch.float32, 64)
    assert chosen is ranking_triton.with_transitions
    assert choosing.head_kernel("auto", torch.device("cuda"), torch.float64, 64) is ranking.with_transitions


@pytest.mark.parametrize("failure", ["missing", "broken", "wrong"])
def test_kernels_that_cannot_be_trusted_are_left_alone_and_the_log_says_so(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.losses import ranking_triton

    def kernel(*given: torch.Tensor, gradient: bool) -> ranking.Ranked:
        if failure == "broken":
            raise RuntimeError("no kernel image\nfor this device")
        found = ranking.with_transitions(*given, gradient=gradient, cells=1 << 20)
        assert found.keys is not None
        found.keys *= 1.001
        return found

    monkeypatch.setattr(ranking_triton, "with_transitions", kernel)
    if failure == "missing":
        monkeypatch.setitem(sys.modules, "pipeline.losses.ranking_triton", None)
        monkeypatch.delattr("pipeline.losses.ranking_triton")
    said: list[str] = []
    monkeypatch.setattr(choosing.log, "warning", lambda text, *values: said.append(text % values))
    choosing._reason_against.cache_clear()
    expected = {"missing": "not installed", "broken": "no kernel image for this device", "wrong": "its keys are off by"}
    try:
        with pytest.raises(PipeError, match=expected[failure]):
            choosing.head_kernel("triton", torch.device("cpu"), torch.float32, 64)
        with pytest.raises(PipeError, match=r"loss\.head: chunked"):
            choosing.head_kernel("triton", torch.device("cpu"), torch.float32, 64)
    finally:
        choosing._reason_against.cache_clear()
    assert len(said) == 1
    assert expected[failure] in said[0]
