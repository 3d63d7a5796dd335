"""`pipe evaluate`: every run on every benchmark → records, tables, the report.

1. which runs (all finished ones, or those named)   2. which benchmarks (the suite under evaluate.datasets; without
one, the manifest's validation rows)   3. measure   4. write workspace/report and print the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config, read_yaml, shipped
from pipeline.console import log
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError
from pipeline.evaluation.embeddings import usable_cores
from pipeline.evaluation.records import to_json
from pipeline.evaluation.registry import Entry, parse_suite, retrieval_of
from pipeline.evaluation.subjects import run_subject, teacher_subject
from pipeline.evaluation.suite import Results, Subject, run_entry, run_suite
from pipeline.report.page import write_report
from pipeline.report.tables import tables
from pipeline.run_folder import RunFolder, Workspace, code_version, read_json
from stages.which_model import choose_runs

VALIDATION = "validation"


def run(
    config: Config, runs: list[str], as_json: bool, *, title: str = "Evaluation", notes: Sequence[str] = ()
) -> None:
    """Evaluate `runs` (empty: all finished ones) and write the report.

    Args:
        as_json: print the records instead of the tables.
        title, notes: the page's heading and the paragraphs under it.
    """
    workspace = Workspace(config.workspace)
    chosen = choose_runs(workspace, runs)
    workers = usable_cores() if config.data.workers == "auto" else config.data.workers
    batch_size = config.evaluate.batch_size
    subjects = [
        run_subject(folder, store=workspace.embeddings, batch_size=batch_size, workers=workers) for folder in chosen
    ]
    if config.evaluate.datasets is None:
        refuse_trained_rows(workspace, chosen)
        results = on_validation_rows(workspace, subjects)
    else:
        entries = suite(config.evaluate.suite)
        if any(entry.kind == "probe" for entry in entries):
            subjects.append(reference(config, workspace, workers))
        results = run_suite(
            entries,
            existing(config.evaluate.datasets),
            subjects,
            cache=workspace.embeddings,
            workers=workers,
            code_version=code_version(),
        )
    if not results.records:
        raise PipeError(
            f"none of the suite's {len(results.gaps)} benchmarks is there",
            where=config.evaluate.datasets,
            fix="see the lines above for how to obtain them, or set evaluate.datasets=null for the validation rows",
        )
    page = write_report(results.records, chosen, workspace.report, title=title, notes=list(notes), gaps=results.gaps)
    print_results(results, as_json)
    log.info("report: %s", page)


def refuse_trained_rows(workspace: Workspace, runs: Sequence[RunFolder]) -> None:
    """Validation rows of now must not be rows that a run was trained on; a manifest that has only grown is fine."""
    if not workspace.manifest.exists():
        return
    manifest = read_manifest(workspace.manifest)
    for folder in runs:
        data = read_json(folder.record).get("data") or {}
        rows = data.get("rows", -1)
        if not 0 <= rows <= len(manifest) or manifest.fingerprint(rows) != data["manifest_fingerprint"]:
            log.warning("run %s was trained on another manifest: it may have seen these validation images", folder.name)
        elif manifest.split_sha256(rows) != data["split_sha256"]:
            raise PipeError(
                f"run {folder.name} was trained on rows that are validation rows now: the manifest is split otherwise",
                where=workspace.manifest,
                fix="index again with the data.val_fraction of then, or set evaluate.datasets",
            )


def on_validation_rows(workspace: Workspace, subjects: Sequence[Subject]) -> Results:
    """Retrieval and nodes on the manifest's held-out rows."""
    if not workspace.manifest.exists():
        raise PipeError("no manifest", where=workspace.manifest, fix="pipe index, or set evaluate.datasets")
    log.info("evaluate.datasets is not set: retrieval on the manifest's validation rows")
    data = retrieval_of(read_manifest(workspace.manifest), "val", "val")
    entry = Entry(name=VALIDATION, kind="retrieval", path=workspace.manifest.name, split="val")
    results = Results()
    run_entry(results, entry, data, subjects, code_version=code_version())
    return results


def suite(name: str) -> list[Entry]:
    """A shipped suite by name, or a YAML file of the user's own."""
    if name.endswith((".yaml", ".yml")):
        return parse_suite(read_yaml(Path(name)), name)
    return parse_suite(shipped("suites", name), f"suite {name}")


def existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise PipeError(
            "evaluate.datasets is no folder", where=folder, fix="set it to where the test sets lie, or null"
        )
    return folder


def reference(config: Config, workspace: Workspace, workers: int) -> Subject:
    """The configured teacher, for the probes' reference row."""
    from pipeline.cache.layout import ScaleSpec

    teacher = config.teacher
    arguments = {
        "name": teacher.name,
        "model_args": teacher.model_args,
        "checkpoint": teacher.checkpoint,
        "random_weights": teacher.random_weights,
        "image_size": teacher.image_size,
        "scales": [ScaleSpec(scale.name, scale.layer, scale.grid) for scale in teacher.scales],
        "mean": teacher.mean,
        "std": teacher.std,
        "seed": teacher.seed,
    }
    return teacher_subject(
        arguments,
        view=config.data.view,
        store=workspace.embeddings,
        batch_size=config.evaluate.batch_size,
        workers=workers,
    )


def print_results(results: Results, as_json: bool) -> None:
    """Tables, or the records, to stdout."""
    if as_json:
        sys.stdout.write(to_json(results.records))
        return
    for table in tables(results.records):
        print(f"\n## {table.title}\n\n{table.to_markdown()}")
