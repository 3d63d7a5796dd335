"""`pipe export`: a finished run → a folder for others: weights, config, model card; to the hub, if asked.

1. which model   2. what its run recorded, and what the report says of this checkpoint   3. write, load once to see that
it loads, rename into place   4. push
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import read_yaml
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import code_version, sha256_file, write_bytes, write_json
from stages.which_model import Found, find_model

if TYPE_CHECKING:
    from pipeline.config import Config

DISTILS = ("gram", "rkd", "global", "kd", "crd")  # terms of the loss that read the teacher's features
RECIPE = ("batch_size", "epochs", "lr", "weight_decay", "warmup_steps", "grad_clip")


def run(
    config: Config | None,
    name: str,
    *,
    out: Path | None = None,
    trunk: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
    hub: str | None = None,
    as_json: bool = False,
) -> None:
    """Export the model `name` (a run, or a path).

    Raises:
        PipeError: no such run, not finished, something lies at `out`, or the hub does not take it.
    """
    if hub is not None:
        from pipeline.hub import check_repository

        check_repository(hub)  # before minutes of work, not after
    found = find_model(name, config)
    folder = out if out is not None else default_folder(found, trunk)
    about = write_trunk(found, folder, dtype, overwrite) if trunk else write_model(found, folder, dtype, overwrite)
    log.info("exported %s to %s", found.name, folder)
    if hub is not None:
        from pipeline.hub import push_folder

        log.info("pushed to %s", push_folder(folder, hub))
    if as_json:
        print(json.dumps({"folder": str(folder), **about}, indent=1, sort_keys=True))


def default_folder(found: Found, trunk: bool) -> Path:
    """workspace/exports/RUN of a run's name, ./NAME-export of a path; `-trunk` behind for a trunk."""
    name = found.name + ("-trunk" if trunk else "")
    return Path(f"{name}-export") if found.workspace is None else found.workspace.root / "exports" / name


def write_model(found: Found, folder: Path, dtype: str, overwrite: bool) -> dict[str, Any]:
    """The whole model as a folder; returns its weights' facts."""
    from pipeline.models import export
    from pipeline.models.dinorankclip import load
    from pipeline.report.card import model_card

    digest = original(found)
    with export.new_folder(folder, overwrite=overwrite) as new:
        weights = new / found.folder.weights.name
        stored = export.export_weights(found.folder.weights, weights, dtype)  # type: ignore[arg-type]
        model, _, _ = load(new)
        sha256 = sha256_file(weights)
        about = {"file": weights.name, "dtype": dtype, "sha256": sha256, "run_sha256": digest}
        config = describe(found, stored, model, about)
        write_json(new / export.CONFIG, config)
        if found.record:
            write_json(new / export.RECORD, without_paths(found.record) | {"checkpoint_sha256": sha256})
        card = model_card(config, *results(found, digest))
        write_bytes(new / export.CARD, card.encode())
    return about


def write_trunk(found: Found, folder: Path, dtype: str, overwrite: bool) -> dict[str, Any]:
    """The trunk alone as an open_clip checkpoint; returns its weights' facts."""
    from pipeline.models import export
    from pipeline.models.dinorankclip import load
    from pipeline.models.export_trunk import export_trunk
    from pipeline.models.serialise import read_model
    from pipeline.report.card import trunk_card

    digest = original(found)
    model, preprocess, _ = load(found.folder.path)
    with export.new_folder(folder, overwrite=overwrite) as new:
        weights = export_trunk(model, preprocess, new, dtype)  # type: ignore[arg-type]
        about = {"file": weights.name, "dtype": dtype, "sha256": sha256_file(weights), "run_sha256": digest}
        config = describe(found, read_model(found.folder.weights), model, about)
        write_bytes(new / export.CARD, trunk_card(config, *results(found, digest)).encode())
    return about


def original(found: Found) -> str:
    """SHA-256 of the run's weights, which must be those that it wrote."""
    digest = sha256_file(found.folder.weights)
    if found.record.get("checkpoint_sha256") not in (None, digest):
        raise PipeError(
            "model.safetensors is not the one this run wrote", where=found.folder.path, fix="train the run again"
        )
    return digest


def describe(found: Found, stored: Any, model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """config.json: the run's facts where they are known."""
    from pipeline.models.export import CONFIG, model_config

    before = found.folder.path / CONFIG
    known = read_yaml(found.folder.config) if found.folder.config.exists() else {}
    if not known and before.exists():  # an export of an export: what the first one knew
        earlier = json.loads(before.read_text(encoding="utf-8"))
        training, teacher = earlier.get("training") or {}, earlier.get("teacher")
    else:
        training, teacher = recipe(known, found.record), taught_by(known, found.record)
    return model_config(
        stored,
        {**without_paths(found.record), "name": found.name},
        weights=weights,
        model=model,
        teacher=teacher,
        training=training,
        exported_by=code_version(),
    )


def without_paths(value: Any) -> Any:
    """A record with the last part alone of every absolute path in it: the rest is about a machine."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def recipe(known: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What of a run's configuration a card shows; no paths."""
    train, data = known.get("train") or {}, known.get("data") or {}
    if not known:
        return {}
    augmentation = "none: one view of each image"
    if (known.get("loss") or {}).get("simclr"):
        augmentation = "two augmented views of each image for SimCLR, none for the contrastive loss"
    elif data.get("roi") or (known.get("teacher") or {}).get("views"):
        augmentation = "crops (see the run's configuration)"
    init = record.get("init") or {}
    origin = f"trained weights: {Path(init['path']).name}, SHA-256 {init['sha256']}" if init else "random weights"
    return {key: train.get(key) for key in RECIPE} | {
        "augmentation": augmentation,
        "started_from": origin,
        "trunk_frozen": bool((known.get("model") or {}).get("freeze_trunk")),
    }


def taught_by(known: dict[str, Any], record: dict[str, Any]) -> dict[str, Any] | None:
    """The teacher of a run with a student; None for a run without."""
    if record.get("cache") is None:
        return None
    teacher, loss = known.get("teacher") or {}, known.get("loss") or {}
    name = teacher.get("name")
    if isinstance(name, str) and name.startswith("hf:") and Path(name.removeprefix("hf:")).is_absolute():
        name = f"hf:{Path(name).name}"  # of a folder its last part: the rest is about a machine
    return {
        "name": name,
        "image_size": teacher.get("image_size"),
        "scales": teacher.get("scales"),
        "cache": record["cache"],
        "distils": any(loss.get(term) for term in DISTILS) if loss else None,
        "permuted": bool((known.get("data") or {}).get("permute_targets")),
    }


def results(found: Found, digest: str) -> tuple[list[Any], bool]:
    """Records of this checkpoint in the workspace's report, and whether there are only others of its name."""
    from pipeline.evaluation.records import read_records
    from pipeline.report.card import own_results

    folder = found.folder.path
    report = found.workspace.report if found.workspace is not None else folder.parent.parent / "report"
    path = report / "records.json"
    return own_results(read_records(path), found.name, digest) if path.exists() else ([], False)
