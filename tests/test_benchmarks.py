"""The benchmarks run, say what they promise to say, and compare implementations of one and the same thing."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("cache_read", {"memmap/ratio_of_rate_to_memmap", "memmap/ratio_of_cpu_time_to_memmap"}),
        ("cache_cold", {"sequential/ratio_of_rate_to_sequential"}),
        ("extract", {"bare_forward/ratio_of_rate_to_bare_forward", "bare_forward/ratio_of_cpu_time_to_bare_forward"}),
        ("cache_write", {"flat_files/ratio_of_rate_to_flat_files", "CacheWriter/ratio_of_rate_to_ours"}),
        ("loss", {"48/published/ratio_of_cpu_time_to_published"}),
        ("scale", {f"small/ratio_of_{kind}_rate_to_small" for kind in ("record", "captions", "cache", "memmap")}),
        ("cache_fidelity", set()),
        ("roi", set()),
        ("decode", {"500_x_375/Pillow/ratio_of_rate_to_Pillow"}),
        ("train_step", {"d_the_step/ratio_of_step"}),
        ("train_memory", {"whole/ratio_of_cpu_time_to_whole"}),
        ("distillation", {"none/ratio_of_time_to_none", "none/ratio_of_cpu_time_to_none"}),
    ],
)
def test_quick_run_prints_one_table_and_writes_the_documented_json(tmp_path: Path, name: str, ratios: set[str]) -> None:
    file = tmp_path / "figures.json"
    script = str(FOLDER / f"{name}.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, "--quick", "--json", str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("| --") for line in done.stdout.splitlines()) == 1
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "date", "command", "figures"}
    datetime.date.fromisoformat(found["date"])
    assert found["command"] == f"python benchmarks/{name}.py --quick"
    assert found["machine"] in done.stdout
    assert all(isinstance(value, float) for value in found["figures"].values())
    assert all(found["figures"][ratio] == 1 for ratio in ratios)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")}  # PyTorch's own
    assert left == {"figures.json"}  # its stores are gone


@pytest.mark.parametrize("benchmark", ["cache_read"], indirect=True)
def test_readers_that_are_compared_give_the_same_values(benchmark: ModuleType) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "flat"
        cache = benchmark.build_store(Path(folder) / "teacher.zarr", flat, 40)
        found = benchmark.readers(cache, flat)
        rows = np.array([39, 0, 7, 7])
        assert len(found) == 7
        found |= benchmark.compressed_readers(cache, Path(folder))
        assert {"read_raw, blosc", "read_raw, zstd"} < set(found)
        benchmark.check_agreement(found, rows)
        wrong = found | {"read_raw": lambda rows: found["read_raw"](rows[::-1])}
        with pytest.raises(ValueError, match=r"read_raw and np\.memmap differ in fine"):
            benchmark.check_agreement(wrong, rows)


@pytest.mark.parametrize("benchmark", ["cache_write"], indirect=True)
def test_writers_that_are_compared_write_the_same_rows_in_the_same_layout(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    rows = benchmark.random_rows(np.random.default_rng(0), 5)
    found = benchmark.writers(tmp_path, rows, 2)
    for write in found.values():
        write(0)
    assert {"flat files", "CacheWriter", "tensorstore", "zarr-python"} <= set(found)
    benchmark.check_agreement(tmp_path, rows)
    found["tensorstore"](1)
    (tmp_path / "tensorstore/mid/c/1/0/0").replace(tmp_path / "tensorstore/mid/c/0/0/0")
    benchmark.check_agreement(tmp_path, rows)  # the same values
    wanted = rows | {"mid": rows["mid"].copy()}
    rows["mid"][3, 0, 0] ^= 1
    found["tensorstore"](0)
    with pytest.raises(ValueError, match="tensorstore and CacheWriter differ in mid, row 3"):
        benchmark.check_agreement(tmp_path, wanted)


@pytest.mark.parametrize("benchmark", ["loss"], indirect=True)
def test_losses_that_are_compared_give_the_same_value_and_gradient(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = benchmark.make_inputs(40, 16)
    names = benchmark.implementations(40)
    benchmark.check_agreement(names, inputs)
    # The transitions are there: the orders differ.
    assert abs(benchmark.step("order 3", inputs) / benchmark.step("order 1", inputs) - 1) > 1e-3
    monkeypatch.setitem(benchmark.IMPLEMENTATIONS, "naive", lambda x: 1.01 * benchmark.naive(x))
    with pytest.raises(ValueError, match="naive and order 3 differ"):
        benchmark.check_agreement(names, inputs)


@pytest.mark.parametrize("benchmark", ["loss"], indirect=True)
def test_published_list_mle_is_its_definition(benchmark: ModuleType) -> None:
    rng = np.random.default_rng(0)
    predicted, reference = rng.normal(size=(2, 3, 5))
    total = 0.0
    for u, r in zip(predicted, reference, strict=True):
        ranked = u[np.argsort(-r)] - u.max()
        total += sum(np.log(np.exp(ranked[k:]).sum() + 1e-10) - ranked[k] for k in range(5)) / 3
    torch = benchmark.torch
    given = benchmark.published_list_mle(torch.tensor(predicted), torch.tensor(reference))
    assert given.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("benchmark", ["common"], indirect=True)
def test_interleaved_rounds_take_turns_and_ratios_pair_them(benchmark: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    tasks = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    timings = benchmark.interleave(tasks, 3, at_most={"c": 1})
    assert calls[:3] == [("a", 0), ("b", 0), ("c", 0)]
    assert calls[3:] == [("b", 1), ("c", 1), ("a", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert [sorted(timings[name].wall) for name in "abc"] == [[1, 2, 3], [1, 2, 3], [1]]
    ours, theirs = benchmark.Timing(wall={1: 2.0, 2: 90.0, 3: 6.0}), benchmark.Timing(wall={1: 1.0, 2: 30.0})
    assert ours.ratio(theirs) == 2.5  # rounds 1 and 2; a slow round slows both
    assert ours.median() == 6.0


def test_every_benchmark_is_run_above() -> None:
    """One that nobody runs is found broken by whoever needs its figures."""
    helpers = {"common", "stores", "teacher_features", "step_parts", "step_runs", "open_clip_trainer"}
    (runs,) = test_quick_run_prints_one_table_and_writes_the_documented_json.pytestmark
    assert {path.stem for path in FOLDER.glob("*.py")} == helpers | {case[0] for case in runs.args[1]}


@pytest.mark.parametrize("benchmark", ["common"], indirect=True)
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(benchmark: ModuleType) -> None:
    """By counting: lognormal values, whose mean is not their median."""
    rng = np.random.default_rng(0)
    for n in (6, 12, 15):
        drawn = rng.lognormal(size=(4000, n))
        found = np.array([benchmark.median_interval(values.tolist()) for values in drawn])
        held = ((found[:, 0] <= 1) & (found[:, 1] >= 1)).mean()
        assert held >= 0.94, n
        narrower = np.sort(drawn, axis=1)[:, [k := int((drawn < found[:, :1]).sum(1)[0]) + 1, n - 1 - k]]
        assert ((narrower[:, 0] <= 1) & (narrower[:, 1] >= 1)).mean() < 0.95, n  # and no wider than it must be
    assert benchmark.median_interval([1.0] * 5) == (-np.inf, np.inf)


@pytest.mark.parametrize("benchmark", ["step_parts"], indirect=True)
def test_a_stopwatch_charges_every_moment_to_the_innermost_part(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        return now

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(benchmark.time, "perf_counter", clock)
    watch = benchmark.Stopwatch(benchmark.torch.device("cpu"))
    inner = watch.wrapped(spend, "inner")
    spend(100)  # nobody watches
    with watch.part("outer"):
        spend(1)
        inner(2)
        spend(4)
        list(benchmark.watched(watch, iter(["a", "b"])))
        with pytest.raises(IndexError):
            watch.wrapped([].pop, "failing")()
        spend(16)
    assert dict(watch.seconds) == {"outer": 21, "inner": 2, "waiting for data": 0, "failing": 0}


@pytest.mark.parametrize("benchmark", ["step_parts"], indirect=True)
def test_the_backward_pass_is_charged_to_the_part_whose_forward_pass_it_undoes(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = benchmark.torch
    now = 0.0
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)

    class Slow(torch.autograd.Function):
        """The identity; its backward pass takes some seconds."""

        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal now
            now += ctx.seconds
            return gradient, None

    watch = benchmark.Stopwatch(torch.device("cpu"))
    first = watch.wrapped(lambda x: {"a": Slow.apply(Slow.apply(x, 1), 2)}, "trunk, forward")
    second = watch.wrapped(lambda x: (Slow.apply(x, 4), None), "student, forward")
    x = torch.ones(2, requires_grad=True)
    middle = first(x)["a"]
    loss = Slow.apply(second(middle)[0] + middle, 8).sum()
    watch.wrapped(loss.backward, "losses, backward")()
    seconds = {name: value for name, value in watch.seconds.items() if value}
    assert seconds == {"losses, backward": 8, "student, backward": 4, "trunk, backward": 3}
