"""`train.zero_shot`: an entry of `evaluate.suite` that is measured while a run trains."""

from __future__ import annotations

import difflib
from typing import Any

from pipeline.config import Config
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace

KEY = "train.zero_shot"


def zero_shot_entry(config: Config) -> tuple[Any, Any] | None:
    """The entry and its opened data; None where none is asked for.

    Raises:
        PipeError: the suite has no such entry, or its images are not there.
    """
    name = config.train.zero_shot
    if name is None:
        return None
    from pipeline.evaluation.datasets import Absent
    from pipeline.evaluation.embeddings import usable_cores
    from pipeline.evaluation.registry import open_entry
    from stages.evaluate import suite

    entries = {entry.name: entry for entry in suite(config.evaluate.suite) if entry.kind == "zero_shot"}
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(entries) or 'none'}"
        raise PipeError(f"suite {config.evaluate.suite} has no zero-shot entry {name!r}", where=KEY, fix=fix)
    if config.evaluate.datasets is None:
        raise PipeError("evaluate.datasets is not set", where=KEY, fix="set it to where the test sets lie")
    cache = Workspace(config.workspace).embeddings
    try:
        return entries[name], open_entry(entries[name], config.evaluate.datasets, cache, usable_cores())
    except Absent as problem:
        fix = f"to obtain it: {entries[name].obtain or 'see the suite'}; or set {KEY}=null"
        raise PipeError(f"{name} is not there: {problem}", where=config.evaluate.datasets, fix=fix) from problem


def zero_shot_of(benchmark: tuple[Any, Any] | None, session: Any, config: Config) -> Any:
    """What `validate` measures beside retrieval: `pipeline.training.zero_shot.ZeroShot`, or None."""
    if benchmark is None:
        return None
    from pipeline.training.zero_shot import ZeroShot

    entry, data = benchmark
    dataset = session.datasets["val"]
    return ZeroShot(
        name=entry.name,
        split=data.splits[entry.split],
        class_names=data.class_names,
        templates=data.templates,
        preprocess=dataset.preprocess,
        tokenizer=dataset.tokenizer,
        batch_size=config.evaluate.batch_size,
        workers=max(1, session.workers),
    )
