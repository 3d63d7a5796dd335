"""Running a suite: every entry, every run, one place where provenance is stamped and gaps are listed.

Evaluators see features and labels only; what a run is, what is missing, and who is compared with whom is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.evaluation import drift, nodes, probe, retrieval, zero_shot
from pipeline.evaluation.datasets import Absent, Classification, LabelledImages
from pipeline.evaluation.embeddings import Embedder
from pipeline.evaluation.paired import difference
from pipeline.evaluation.records import (
    CHANCE,
    REFERENCE,
    VERSUS,
    Measurement,
    Provenance,
    Record,
    headline_node,
    stamp,
)
from pipeline.evaluation.registry import Entry, Retrieval, open_entry
from pipeline.evaluation.registry import subset as pairs_of

COMPARED = ("retrieval/", "zero_shot/", "probe/")
ALL_PAIRS_UP_TO = 6  # runs; more are compared with the first only

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """Who is evaluated: embeddings and identity. `probes_only`: no texts (the teacher)."""

    embedder: Embedder
    provenance: Provenance
    probes_only: bool = False


@dataclass
class Results:
    """Records of everything that could be measured, and one line for everything that could not."""

    records: list[Record] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    def gap(self, line: str) -> None:
        log.warning("not measured: %s", line)
        self.gaps.append(line)


def run_suite(
    entries: Sequence[Entry], root: Path, subjects: Sequence[Subject], *, cache: Path, workers: int, code_version: str
) -> Results:
    """Evaluate all subjects on all entries under `root`. A dataset that is absent or unusable becomes a gap."""
    results = Results()
    for entry in entries:
        try:
            data = open_entry(entry, root, cache, workers)
        except (Absent, PipeError) as problem:
            obtain = f". To obtain it: {entry.obtain}" if entry.obtain else ""
            results.gap(f"{entry.name} ({entry.kind}): {problem}{obtain}")
            continue
        run_entry(results, entry, data, subjects, code_version=code_version)
    return results


def run_entry(
    results: Results, entry: Entry, data: Retrieval | Classification, subjects: Sequence[Subject], *, code_version: str
) -> None:
    """All subjects on one opened benchmark, with chance and the paired differences between runs, into `results`."""
    digest = data.digest
    measured: dict[str, list[Measurement]] = {}
    chance: list[Measurement] = []

    def keep(found: Sequence[Measurement], provenance: Provenance) -> None:
        results.records += stamp(
            found, provenance, benchmark=entry.name, dataset_sha256=digest, code_version=code_version
        )

    for subject in subjects:
        run = subject.provenance.run
        if subject.probes_only and (entry.kind != "probe" or any(gap.startswith(f"{run}:") for gap in results.gaps)):
            continue
        try:
            found, chance = _measure(entry, data, subject.embedder)
        except PipeError as problem:
            if not subject.probes_only:
                raise
            results.gap(f"{run}: {problem}")  # a reference that is not there does not stop the runs
            continue
        keep(found, subject.provenance)
        if not subject.probes_only:
            measured[run] = found
    for run, other in opponents(list(measured)):
        provenance = next(s.provenance for s in subjects if s.provenance.run == run)
        keep(versus(measured[run], measured[other], other), provenance)
    keep(chance, Provenance(CHANCE, REFERENCE))


def _measure(
    entry: Entry, data: Retrieval | Classification, embedder: Embedder
) -> tuple[list[Measurement], list[Measurement]]:
    """One model's measurements on one benchmark, and chance on the same items."""
    if isinstance(data, Retrieval):
        return on_retrieval(embedder, data, entry.name)
    if entry.kind == "zero_shot":
        return on_zero_shot(embedder, data, entry.split, entry.name)
    if entry.domains:
        return on_domains(embedder, data, entry.name)
    return on_probe(embedder, data, entry.train, entry.split, entry.name)


def on_retrieval(embedder: Embedder, data: Retrieval, name: str) -> tuple[list[Measurement], list[Measurement]]:
    """Retrieval and the gap at every node, the gate and the drift where the model has them: from one pass."""
    image_nodes, keep = embedder.images(data.images, f"{name}/{data.split}")
    text_nodes = embedder.texts(data.texts, f"{name}/{data.split}")
    pair_image, pair_text, used = pairs_of(data, keep)
    both = {node: (image_nodes[node][keep], text_nodes[node][used]) for node in image_nodes if node in text_nodes}
    found = retrieval.evaluate(both, pair_image, pair_text, split=data.split)
    _, first = np.unique(pair_image, return_index=True)  # each image with its first caption
    matched = {node: (images, texts[pair_text[first]]) for node, (images, texts) in both.items()}
    found += nodes.evaluate(matched, split=data.split)
    if "gated" in both:
        rows = np.flatnonzero(keep)
        found += drift.evaluate(embedder, data, rows, used[pair_text[first]], f"{name}/{data.split}")
    return found, retrieval.chance(int(keep.sum()), len(used), pair_image, split=data.split)


def on_zero_shot(
    embedder: Embedder, data: Classification, split: str, name: str
) -> tuple[list[Measurement], list[Measurement]]:
    """Zero-shot at every node that both sides have."""
    features, labels = _labelled(embedder, data.splits[split], f"{name}/{split}")
    texts = embedder.texts(zero_shot.prompts(data.class_names, data.templates), name)
    classes = len(data.class_names)
    both = {node: (features[node], texts[node]) for node in features if node in texts}
    found = zero_shot.evaluate(both, labels, classes, split=split)
    return found, zero_shot.chance(labels, classes, split=split)


def on_probe(
    embedder: Embedder, data: Classification, train: str, test: str, name: str
) -> tuple[list[Measurement], list[Measurement]]:
    """Fit on one split, test on another, at every node."""
    classes = len(data.class_names)
    predicted = _predict(embedder, data, [train], test, name)
    _, labels = _labelled(embedder, data.splits[test], f"{name}/{test}")
    return probe.evaluate(predicted, labels, split=test), probe.chance(labels, classes, split=test)


def on_domains(embedder: Embedder, data: Classification, name: str) -> tuple[list[Measurement], list[Measurement]]:
    """Leave one domain out: fit on all others, test on it, each in turn; and the average."""
    classes = len(data.class_names)
    found: list[Measurement] = []
    chance: list[Measurement] = []
    every: dict[str, list[Ints]] = {}
    truth: list[Ints] = []
    for domain, test in data.splits.items():
        others = [other for other in data.splits if other != domain]
        predicted = _predict(embedder, data, others, domain, name)
        _, labels = _labelled(embedder, test, f"{name}/{domain}")
        found += probe.evaluate(predicted, labels, split=domain)
        chance += probe.chance(labels, classes, split=domain)
        truth.append(labels)
        for node, classes_of_node in predicted.items():
            every.setdefault(node, []).append(classes_of_node)
    found += probe.evaluate_mean(every, truth)
    return found, [*chance, *probe.chance(np.concatenate(truth), classes, split="mean")]


def _labelled(embedder: Embedder, split: LabelledImages, what: str) -> tuple[dict[str, Floats], Ints]:
    features, ok = embedder.images(split.images, what)
    return {node: vectors[ok] for node, vectors in features.items()}, split.labels[ok]


def _predict(embedder: Embedder, data: Classification, train: Sequence[str], test: str, name: str) -> dict[str, Ints]:
    """Classes of split `test`, predicted by every node's probe of splits `train`; kept like embeddings."""
    classes = len(data.class_names)

    def fit() -> dict[str, Ints]:
        parts = [_labelled(embedder, data.splits[split], f"{name}/{split}") for split in train]
        labels = np.concatenate([part_labels for _, part_labels in parts])
        tested, _ = _labelled(embedder, data.splits[test], f"{name}/{test}")
        found = {}
        for node, vectors in tested.items():
            features = np.concatenate([part[node] for part, _ in parts])
            outcome = probe.probe(features, labels, vectors, classes)
            log.info("probe of %s at %s on %s/%s: C = %.3g", embedder.name, node, name, test, outcome.c)
            found[node] = outcome.predicted
        return found

    key = [*(data.splits[split].digest for split in train), data.splits[test].digest, str(classes)]
    return embedder.cached("probes", key, fit)


def opponents(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Which run is compared with which: later ones with earlier ones, or with the first where there are many."""
    if len(runs) <= ALL_PAIRS_UP_TO:
        return [(later, earlier) for earlier, later in combinations(runs, 2)]
    return [(run, runs[0]) for run in runs[1:]]


def versus(a: Sequence[Measurement], b: Sequence[Measurement], other: str) -> list[Measurement]:
    """Paired differences a − b of the two runs' outputs, wherever both were measured on the same units."""
    theirs = _outputs(b)
    found = []
    for (metric, split), mine in _outputs(a).items():
        match = theirs.get((metric, split))
        if match is None or match.n != mine.n or mine.statistic is None or match.statistic is None:
            continue
        value, low, high = difference(mine.statistic, match.statistic, mine.n)
        found.append(Measurement(f"{metric}{VERSUS}{other}", mine.node, split, value, low, high, mine.n))
    return found


def _outputs(measurements: Sequence[Measurement]) -> dict[tuple[str, str], Measurement]:
    node = headline_node(m.node for m in measurements)
    return {(m.metric, m.split): m for m in measurements if m.node == node and m.metric.startswith(COMPARED)}
