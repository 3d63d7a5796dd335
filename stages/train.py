"""`pipe train`: stage two. Images, captions and the teacher's cached features become a model in a run folder.

The teacher itself is neither loaded nor needed. Alone, the command takes every visible GPU (or the CPU); under
`accelerate launch` it obeys that.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache, check_matches, open_cache
from pipeline.config import Config
from pipeline.console import log
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder, Workspace, code_version, sha256_file, write_bytes, write_json

VALIDATION_ROWS = 1000  # enough for a curve; pipe evaluate measures on all of them


def run(config: Config, *, name: str | None, resume: bool) -> None:
    """Train one run to its end.

    Raises:
        PipeError: the manifest or cache is missing or does not match, the run exists, or the loss is not finite.
        Stopped: a signal arrived; the state is saved.
    """
    from pipeline.training import machine
    from pipeline.training import resume as resuming

    if machine.several_gpus_alone():
        machine.launch_on_all_gpus("stages.cli", sys.argv[1:])
        return
    workspace = Workspace(config.workspace)
    folder = workspace.run(name or default_name(config))
    checkpoint = resuming.checkpoint_to_resume(folder, config.dump(), resume=resume)
    if resume and folder.finished:
        log.info("run %s is finished already: %s", folder.name, folder.path)
        return
    data = open_data(workspace, config)
    session = _prepare(config, data, folder)
    if checkpoint is not None:
        resuming.restore(session.training, checkpoint)
    _train(session, config, data)
    if session.training.accelerator.is_main_process:
        _finish(session, config, data)
    session.training.accelerator.wait_for_everyone()
    session.training.accelerator.end_training()


def default_name(config: Config) -> str:
    """`clip`, `rankclip`, `dinorankclip-r3-full`; with `-s1` behind for any seed but 0."""
    train = config.train
    name = train.method
    if train.method == "dinorankclip":
        name += f"-r{train.order}-{config.model.fusion}"
    return name if train.seed == 0 else f"{name}-s{train.seed}"


# ---- data ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run reads: the manifest, the cache (None without a student) and the rows of each split."""

    manifest: Manifest
    cache: Cache | None
    train_rows: np.ndarray
    val_rows: np.ndarray


def open_data(workspace: Workspace, config: Config) -> Data:
    """Open manifest and cache, refuse what does not fit, and leave out rows the teacher could not decode."""
    if not workspace.manifest.exists():
        raise PipeError("there is no manifest", where=workspace.manifest, fix="run: pipe index")
    manifest = read_manifest(workspace.manifest)
    rows = {split: manifest.rows(split) for split in ("train", "val")}
    cache = None
    if config.model.parts.student:
        if not workspace.teacher.exists():
            raise PipeError(
                "there is no teacher cache",
                where=workspace.teacher,
                fix="run: pipe extract-teacher (or train --fusion none)",
            )
        cache = open_cache(workspace.teacher)
        check_matches(cache, manifest_fingerprint=manifest.fingerprint(), teacher=asked_teacher(config))
        rows = {split: _cached_rows(cache, of_split, config) for split, of_split in rows.items()}
    generator = np.random.default_rng([config.train.seed, 0x7A])
    val = rows["val"]
    if len(val) > VALIDATION_ROWS:
        val = np.sort(generator.choice(val, VALIDATION_ROWS, replace=False))
    return Data(manifest, cache, rows["train"], val)


def asked_teacher(config: Config) -> dict[str, Any]:
    """The fields of the cache's teacher that the configuration fixes; a cache made otherwise is refused."""
    return {
        "name": config.teacher.name,
        "image_size": config.teacher.image_size,
        "view": config.data.view,
        "scales": [{"name": scale.name, "grid": scale.grid} for scale in config.teacher.scales],
    }


def _cached_rows(cache: Cache, rows: np.ndarray, config: Config) -> np.ndarray:
    state = cache.state()[rows]
    absent = int((state == 0).sum())
    if absent and config.data.rows == "all":
        raise PipeError(
            f"{absent:,} of {len(rows):,} rows are not in the teacher cache",
            where=cache.path,
            fix="run: pipe extract-teacher (or --set data.rows=cached to train on those that are)",
        )
    if undecodable := int((state == 2).sum()):
        log.info("leaving out %d rows whose image the teacher could not decode", undecodable)
    return rows[state == 1]


# ---- model and run folder --------------------------------------------------------------------------------------------


@dataclass
class Session:
    """Everything that lives while a run trains."""

    training: Any  # pipeline.training.loop.Training
    plan: Any  # pipeline.training.sampler.BatchPlan
    datasets: dict[str, Any]  # split -> pipeline.training.data.PairDataset
    workers: int


def _prepare(config: Config, data: Data, folder: RunFolder) -> Session:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from pipeline.training import machine
    from pipeline.training.loop import Training
    from pipeline.training.sampler import BatchPlan
    from pipeline.training.schedule import parameter_groups

    accelerator = Accelerator(
        mixed_precision=machine.precision(config.train.precision), cpu=not torch.cuda.is_available()
    )
    set_seed(config.train.seed)
    objective = build_objective(config, data.cache)
    groups = parameter_groups(objective.named_parameters(), weight_decay=config.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas)
    datasets = _datasets(config, data, objective.model)
    steps_per_epoch = len(data.train_rows) // config.train.batch_size
    total = config.train.max_steps or config.train.epochs * steps_per_epoch
    plan = BatchPlan(data.train_rows, config.train.batch_size, total, config.train.seed)
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_bytes(folder.config, config.to_yaml().encode())
        _write_record(folder, config, {"finished": False, "code_version": code_version()})
    accelerator.wait_for_everyone()
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    training = Training(accelerator, wrapped, prepared, _settings(config, plan), folder, config.dump())
    return Session(training, plan, datasets, machine.data_workers(config.data.workers, accelerator.num_processes))


def build_objective(config: Config, cache: Cache | None) -> Any:
    """Model and losses of a configuration; the trunk is built first, so that methods with one seed share it."""
    import torch

    from pipeline.losses.objective import LossWeights, Objective
    from pipeline.losses.targets import TargetInfo
    from pipeline.models.dinorankclip import DinoRankCLIP

    model_config = config.model
    parts = model_config.parts.model_dump()
    has_student = parts.pop("student")
    arguments: dict[str, Any] = {"trunk": model_config.trunk, "image_size": model_config.image_size, "student": None}
    targets = None
    if has_student and cache is not None:
        depth = {scale["name"]: scale["depth_fraction"] for scale in cache.teacher["scales"]}
        arguments |= {
            "student": model_config.student.model_dump(),
            "parts": parts,
            "scales": [{"name": s.name, "grid": s.grid, "depth_fraction": depth[s.name]} for s in cache.scales],
            "global_width": cache.global_width,
            "gate": model_config.gate.model_dump(),
        }
        targets = TargetInfo.from_cache(cache)
    model = DinoRankCLIP(**arguments)
    if has_student and cache is not None:
        means = {name: torch.from_numpy(value) for name, value in cache.baselines.items()}
        grams = {scale.name: means[f"{scale.name}_gram_mean"] for scale in cache.scales}
        model.start_at_baselines(global_mean=means["global_mean"], gram_means=grams)
    weights = LossWeights(**{("global_" if k == "global" else k): v for k, v in _loss_values(config).items()})
    return Objective(
        model,
        order=config.train.order,
        transition_depth=config.train.transition_depth,
        transition_dim=config.loss.transition_dim,
        weights=weights,
        targets=targets,
    )


def _loss_values(config: Config) -> dict[str, Any]:
    values = config.loss.model_dump(by_alias=True)
    values.pop("transition_dim")
    return values


def _datasets(config: Config, data: Data, model: Any) -> dict[str, Any]:
    from pipeline.data.samples import SampleReader
    from pipeline.data.views import Preprocess, View
    from pipeline.training.data import PairDataset, permuted_rows

    view = View(kind=config.data.view, size=config.model.image_size)
    preprocess = Preprocess(view, model.trunk.mean, model.trunk.std)
    target_rows = None
    if config.data.permute_targets:
        target_rows = permuted_rows(data.train_rows, manifest_rows=len(data.manifest), seed=config.train.seed)
    data.manifest.captions(int(data.train_rows[0]))  # loads them once, before workers are forked: shared memory
    dataset = PairDataset(
        SampleReader(data.manifest),
        preprocess,
        model.trunk.tokenizer,
        cache=data.cache,
        target_rows=target_rows,
        seed=config.train.seed,
    )
    return {"train": dataset, "val": dataset}


def _settings(config: Config, plan: Any) -> Any:
    from pipeline.training.loop import LoopSettings

    train = config.train
    return LoopSettings(
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=train.batch_size,
        lr=train.lr,
        warmup_steps=train.warmup_steps,
        grad_clip=train.grad_clip,
        seed=train.seed,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        keep_checkpoints=train.keep_checkpoints,
        validate_every=train.validate_every,
    )


# ---- training --------------------------------------------------------------------------------------------------------


def _train(session: Session, config: Config, data: Data) -> None:
    from pipeline.training.data import batches
    from pipeline.training.validation import validate, validation_steps

    training, plan = session.training, session.plan
    accelerator = training.accelerator
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    pin = accelerator.device.type == "cuda"
    if accelerator.is_main_process:
        log.info(
            "run %s: %s order %d fusion %s, %d steps of %d pairs (%d rows an epoch) on %d × %s, precision %s",
            training.folder.name,
            config.train.method,
            config.train.order,
            config.model.fusion,
            plan.total_steps,
            plan.batch_size,
            len(plan.rows),
            accelerator.num_processes,
            accelerator.device.type,
            accelerator.mixed_precision,
        )

    def measure() -> dict[str, float]:
        steps = validation_steps(data.val_rows, batch_size=config.train.batch_size, **place)
        return validate(
            training.objective,
            training.bare.model,
            batches(session.datasets["val"], steps, workers=0),
            accelerator.device,
        )

    stream = batches(
        session.datasets["train"], plan.steps(start=training.step, **place), workers=session.workers, pin_memory=pin
    )
    training.run(stream, measure)


def _finish(session: Session, config: Config, data: Data) -> None:
    from pipeline.models.cost import flops_per_sample
    from pipeline.models.dinorankclip import save
    from pipeline.training import machine

    training = session.training
    folder, objective = training.folder, training.bare
    model = objective.model.cpu()
    save(model, folder.weights, view=config.data.view, extra={"run": folder.name, "code_version": code_version()})
    transitions = sum(p.numel() for name, p in objective.named_parameters() if name.startswith("transitions"))
    _write_record(
        folder,
        config,
        {
            "finished": True,
            "steps": training.step,
            "samples_seen": training.samples,
            "seconds": round(training.seconds, 3),
            "samples_per_second": round(training.samples / max(training.seconds, 1e-9), 2),
            "parameters": model.parameter_counts(),
            "transition_parameters": transitions,
            "peak_memory_bytes": machine.peak_memory(),
            "flops_per_sample": flops_per_sample(model),
            "world_size": training.accelerator.num_processes,
            "precision": training.accelerator.mixed_precision,
            "machine": machine.describe(),
            "cache": data.cache.digest if data.cache is not None else None,
            "dataset_sha256": data.manifest.fingerprint(),
            "code_version": code_version(),
            "checkpoint_sha256": sha256_file(folder.weights),
        },
    )
    log.info("finished %s in %.0f s; next: pipe evaluate %s", folder.path, training.seconds, folder.name)


def _write_record(folder: RunFolder, config: Config, values: dict[str, Any]) -> None:
    train = config.train
    about = {
        "name": folder.name,
        "method": train.method,
        "order": train.order,
        "fusion": config.model.fusion,
        "seed": train.seed,
        "config_sha256": sha256_file(folder.config),
    }
    write_json(folder.record, about | values)
