"""What a report knows of a run besides its records, and which runs are seeds of one another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.evaluation.records import REFERENCE, Record
from pipeline.run_folder import RunFolder, read_json
from pipeline.training.tracking import read_metrics


@dataclass(frozen=True)
class Run:
    """A run folder, read: its record, the lines of metrics.jsonl, and its configuration as text ("" where absent)."""

    name: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    config: str

    @classmethod
    def read(cls, folder: RunFolder) -> Run:
        record = read_json(folder.record) if folder.record.exists() else {}
        config = folder.config.read_text(encoding="utf-8", errors="replace") if folder.config.exists() else ""
        return cls(folder.name, record, read_metrics(folder.metrics), config)

    def recipe(self) -> str:
        """A digest of the configuration without its seed: equal for runs that differ in nothing else."""
        try:
            loaded = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return self.name
        if not isinstance(loaded, dict):
            return ""
        if isinstance(loaded.get("train"), dict):
            loaded["train"].pop("seed", None)
        return hashlib.sha256(json.dumps(loaded, sort_keys=True, default=str).encode()).hexdigest()

    def last(self, prefix: str) -> dict[str, float]:
        """The final figures under `prefix` (train/, val/), keys without it; nulls are left out."""
        for line in reversed(self.metrics):
            found = {key[len(prefix) :]: value for key, value in line.items() if key.startswith(prefix)}
            if found:
                return {key: float(value) for key, value in found.items() if value is not None}
        return {}


@dataclass(frozen=True)
class Group:
    """One row of a table: a single run, or several seeds of one recipe. `index`: its colour; references have -1."""

    label: str
    runs: tuple[str, ...]
    method: str
    order: int | None
    fusion: str | None
    index: int = -1

    @property
    def reference(self) -> bool:
        return self.method == REFERENCE


@dataclass
class _Recipe:
    identity: tuple[Any, ...]
    seeds: dict[Any, list[str]] = field(default_factory=dict)


def group_runs(records: Iterable[Record], runs: Sequence[Run] = ()) -> list[Group]:
    """Rows in reading order: chance, plain trunks by order, each fusion's runs by order, the teacher.

    Runs are pooled where method, order, fusion, samples, cache and (where `runs` holds it) the configuration agree and
    their seeds all differ; two runs of one seed are never averaged, they stay rows of their own.
    """
    known = {run.name: run for run in runs}
    identities = {r.run: (r.method, r.order, r.fusion, r.samples_seen, r.cache, r.seed) for r in records}
    for run in runs:
        keys = ("order", "fusion", "samples_seen", "cache", "seed")
        identities.setdefault(run.name, (run.record.get("method", "unknown"), *(run.record.get(k) for k in keys)))
    recipes: dict[str, _Recipe] = {}
    for name in sorted(identities):
        *identity, seed = identities[name]
        identity.append(known[name].recipe() if name in known else "")
        key = name if identity[0] == REFERENCE else repr(identity)
        recipes.setdefault(key, _Recipe(tuple(identity))).seeds.setdefault(seed, []).append(name)
    rows: list[Group] = []
    for recipe in recipes.values():
        method, order, fusion = recipe.identity[:3]
        members = [names for _, names in sorted(recipe.seeds.items(), key=lambda item: repr(item[0]))]
        if len(members) > 1 and all(len(names) == 1 for names in members):
            pooled = tuple(names[0] for names in members)
            rows.append(Group(f"{_called(method, order, fusion)} ({len(pooled)} seeds)", pooled, method, order, fusion))
        else:
            rows += [Group(name, (name,), method, order, fusion) for names in members for name in names]
    return _numbered(_told_apart(sorted(rows, key=_reading_order)))


def _called(method: str, order: int | None, fusion: str | None) -> str:
    plain = fusion in (None, "none") and method != "dinorankclip"
    return method if plain else f"{method}-r{order}-{fusion}"


def _reading_order(group: Group) -> tuple[Any, ...]:
    place = 0 if not group.reference else (-1 if group.label == "chance" else 1)
    order = -1 if group.order is None else group.order
    return (place, group.fusion not in (None, "none"), group.fusion or "", order, group.method, group.label)


def _told_apart(groups: list[Group]) -> list[Group]:
    """Pooled recipes that would share a label get their first run's name behind it."""
    labels = [group.label for group in groups]
    return [
        g if labels.count(g.label) == 1 else Group(f"{g.label}, {g.runs[0]} …", g.runs, g.method, g.order, g.fusion)
        for g in groups
    ]


def _numbered(groups: list[Group]) -> list[Group]:
    own = [group for group in groups if not group.reference]
    return [g if g.reference else Group(g.label, g.runs, g.method, g.order, g.fusion, own.index(g)) for g in groups]
