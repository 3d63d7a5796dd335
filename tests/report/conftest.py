"""A small report's ingredients: records of two runs and the references, and two run folders that training left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.records import Record
from pipeline.run_folder import RunFolder, write_json

MakeRecord = Callable[..., Record]

RUNS: dict[str, dict[str, Any]] = {
    "clip": {"method": "clip", "order": 0, "fusion": "none", "cache": None},
    "dino": {"method": "dinorankclip", "order": 3, "fusion": "full", "cache": "ab" * 32},
}
REFERENCE = {"method": "reference", "order": None, "fusion": None, "seed": None, "samples_seen": None}


def make_record(
    run: str, metric: str, value: float, low: float | None = None, high: float | None = None, **other: Any
) -> Record:
    about: dict[str, Any] = {"benchmark": "flickr8k", "split": "test", "node": "trunk", "n": 100, "seed": 0}
    about |= {"samples_seen": 640, "cache": None, "checkpoint_sha256": "c" * 64, "dataset_sha256": "d" * 64}
    about |= {"method": run, "order": 0, "fusion": "none", "code_version": "0.1.0"}
    about |= RUNS.get(run, {})
    about |= REFERENCE if run in ("chance", "teacher") else {}
    return Record(run=run, metric=metric, value=value, low=low, high=high, **{**about, **other})


@pytest.fixture(scope="session")
def record() -> MakeRecord:
    return make_record


@pytest.fixture(scope="session")
def records() -> list[Record]:
    found = []
    for run, nodes, level in (("clip", ["trunk"], 0.10), ("dino", ["trunk", "student", "fused", "gated"], 0.14)):
        for step, node in enumerate(nodes):
            at = {"node": node}
            for way in ("i2t", "t2i"):
                for k in (1, 5, 10):
                    value = level + 0.01 * step + 0.05 * k
                    found.append(
                        make_record(run, f"retrieval/{way}_recall@{k}", value, value - 0.03, value + 0.04, **at)
                    )
                found.append(
                    make_record(run, f"retrieval/{way}_median_rank", 9.5 - step, 8.0 - step, 11.0 - step, **at)
                )
            found.append(
                make_record(run, "retrieval/mean_recall@1", level + 0.01 * step, level - 0.02, level + 0.06, **at)
            )
            for name in ("gap", "centroid_cosine", "relative_gap", "alignment", "separability"):
                found.append(
                    make_record(run, f"nodes/{name}", 0.8 - 0.1 * step, 0.7 - 0.1 * step, 0.9 - 0.1 * step, **at)
                )
            found.append(
                make_record(run, "zero_shot/top1", level, level - 0.02, level + 0.02, benchmark="shapes", **at)
            )
            for domain in ("photo", "sketch", "mean"):
                place = {"benchmark": "pacs", "split": domain}
                found.append(make_record(run, "probe/top1", level + 0.3, level + 0.25, level + 0.35, **at, **place))
    found += [make_record("dino", f"drift/{name}", -0.25, node="gated") for name in ("slope", "change", "remainder")]
    found += [make_record("dino", f"gate/image_{name}", 0.4, node="gated") for name in ("mean", "q05", "q95")]
    found += [make_record("chance", f"retrieval/{way}_recall@1", 0.01, node="none") for way in ("i2t", "t2i")]
    found += [make_record("teacher", "probe/top1", 0.9, 0.88, 0.92, benchmark="pacs", split="mean", node="global")]
    difference = {"retrieval/mean_recall@1": (0.03, 0.01, 0.05), "retrieval/i2t_recall@1": (0.02, -0.01, 0.05)}
    found += [make_record("dino", f"{m}:vs:clip", *values, node="gated") for m, values in difference.items()]
    return found


def make_folder(root: Path, name: str, about: dict[str, Any], *, seed: int = 0, level: float = 0.8) -> RunFolder:
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True)
    injects = about["fusion"] != "none"
    write_json(
        folder.record,
        about
        | {"name": name, "seed": seed, "steps": 10, "samples_seen": 640, "seconds": 12.5, "samples_per_second": 51.2}
        | {"parameters": {"trunk": 1000, "fusion_image": 200}, "transition_parameters": 24 if injects else 0}
        | {"peak_memory_bytes": 3 << 28, "flops_per_sample": 1.5e9, "checkpoint_sha256": "c" * 64},
    )
    folder.config.write_text(
        f"train: {{method: {about['method']}, seed: {seed}}}\nmodel: {{fusion: {about['fusion']}}}\n"
    )
    lines: list[dict[str, Any]] = []
    for step in range(1, 11):
        line = {"step": step, "samples": 64 * step, "time": step, "train/loss": 5 - step / 10, "train/info_nce": 4.0}
        if injects:
            line |= {"train/gram/fine": 1.2 - step / 20, "train/gamma/image": step / 50, "train/beta/image/2": 0.01}
        lines.append(line)
    last: dict[str, Any] = {"step": 10, "samples": 640, "val/info_nce": 4.4, "val/i2t_r1": 0.1, "val/t2i_r1": 0.2}
    lines.append(last | ({"val/gram/fine": level, "val/global/text": None} if injects else {}))
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., RunFolder]:
    """folder(name, run's facts, seed=…, level=the last Gram ratio) → a run folder as training leaves it."""

    def make(name: str, about: dict[str, Any] | None = None, **other: Any) -> RunFolder:
        return make_folder(tmp_path / "runs", name, about or RUNS.get(name, RUNS["clip"]), **other)

    return make


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    return [make_folder(root, name, about) for name, about in RUNS.items()]
