"""Who is evaluated: a run's folder, or the teacher as reference, each as an embedder with its identity.

Both load their weights only when an embedding is missing from the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError
from pipeline.evaluation.embeddings import Embedder, Encoder, hash_json
from pipeline.evaluation.records import REFERENCE, TEACHER, Provenance
from pipeline.evaluation.suite import Subject
from pipeline.models.dinorankclip import load
from pipeline.run_folder import RunFolder, read_json, sha256_file
from pipeline.teacher.huggingface_folder import asked_origin, is_huggingface
from pipeline.teacher.teacher import load_teacher


def run_subject(run: RunFolder, *, store: Path, batch_size: int, workers: int) -> Subject:
    """A finished run. Its key is the SHA-256 of model.safetensors, whose metadata hold view and normalisation too."""

    def load_run() -> Encoder:
        model, preprocess, tokenizer = load(run.path)
        return Encoder(model, preprocess, tokenizer)

    digest = sha256_file(run.weights)
    record = read_json(run.record)
    recorded = record.get("checkpoint_sha256")
    if recorded not in (None, digest):
        raise PipeError(
            "model.safetensors is not the one this run wrote", where=run.path, fix="train the run again or remove it"
        )
    provenance = Provenance.of_run(run.name, {**record, "checkpoint_sha256": digest})
    embedder = Embedder(run.name, digest=digest, load=load_run, store=store, batch_size=batch_size, workers=workers)
    return Subject(embedder, provenance)


class TeacherNode(nn.Module):
    """The teacher as a model with one node: its `global` vector."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def image_nodes(self, images: Tensor) -> dict[str, Tensor]:
        """{"global": (B, C)} of normalised images (B, 3, H, W)."""
        with torch.inference_mode():
            return {"global": self.teacher(images)["global"]}


def teacher_subject(
    arguments: Mapping[str, Any],
    *,
    view: Literal["crop", "squash"],
    store: Path,
    batch_size: int,
    workers: int,
) -> Subject:
    """The teacher, probed on its `global`.

    Args:
        arguments: of `load_teacher`; with the SHA-256 of the checkpoint or hf: folder they are the key.
        view: the geometry shared with training.
    """
    weights = _weights_sha256(arguments)

    def load_reference() -> Encoder:
        teacher = load_teacher(**arguments)
        preprocess = Preprocess(View(view, teacher.image_size), teacher.mean, teacher.std)
        return Encoder(TeacherNode(teacher), preprocess, None)

    shown = {key: str(value) for key, value in sorted(arguments.items()) if key != "checkpoint"}
    embedder = Embedder(
        TEACHER,
        digest=hash_json([shown, weights]),
        load=load_reference,
        store=store,
        preprocess=view,
        batch_size=batch_size,
        workers=workers,
    )
    return Subject(embedder, Provenance(TEACHER, REFERENCE, checkpoint_sha256=weights), probes_only=True)


def _weights_sha256(arguments: Mapping[str, Any]) -> str | None:
    """Of the teacher's own file or folder; None where it has none on this machine."""
    name, checkpoint = arguments["name"], arguments.get("checkpoint")
    if is_huggingface(name):
        return asked_origin(name, random_weights=arguments.get("random_weights", False)).get("file_sha256")
    return sha256_file(checkpoint) if checkpoint is not None and Path(checkpoint).is_file() else None
