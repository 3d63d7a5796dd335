"""What `pipe train` is made of: from a configuration to opened data, model, losses and a trainer ready to run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache, check_matches, open_cache
from pipeline.config import Config
from pipeline.config_schema import TeacherConfig
from pipeline.console import log
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.synthetic_captions import SyntheticCaptions, open_captions
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder, Workspace, code_version, sha256_file, write_bytes, write_json

VALIDATION_ROWS = 1000  # enough for a curve; pipe evaluate measures on all of them


@dataclass
class Data:
    """What a run reads: the manifest, the cache (None without a student) and the rows of each split."""

    manifest: Manifest
    cache: Cache | None
    train_rows: np.ndarray
    val_rows: np.ndarray
    captions: SyntheticCaptions | None = None  # where the loss reads a second caption that is synthetic

    def identity(self) -> dict[str, Any]:
        """What decides, with the configuration, every batch and target; goes into checkpoints and the record."""
        return {
            "rows": len(self.manifest),
            "manifest_fingerprint": self.manifest.fingerprint(),
            "split_sha256": self.manifest.split_sha256(),
            "train_rows": len(self.train_rows),
            "train_rows_sha256": hashlib.sha256(self.train_rows.astype("<i8").tobytes()).hexdigest(),
            "cache": None if self.cache is None else self.cache.digest,
        } | ({} if self.captions is None else {"captions": sha256_file(self.captions.path)})


def open_data(workspace: Workspace, config: Config) -> Data:
    """Open manifest and cache, refuse what does not fit, and leave out rows the teacher could not decode."""
    if not workspace.manifest.exists():
        raise PipeError("there is no manifest", where=workspace.manifest, fix="run: pipe index")
    manifest = read_manifest(workspace.manifest)
    rows = {split: manifest.rows(split) for split in ("train", "val")}
    cache = None
    if config.model.parts.student:
        # Checksums of every row: far cheaper than decoding its image.
        cache = open_cache(cache_place(workspace, config), verify=True, access=config.data.cache_access)
        check_matches(
            cache,
            manifest_fingerprint=manifest.fingerprint(min(cache.rows, len(manifest))),
            teacher=asked_teacher(config, cache.teacher.get("layers", 0)),
            settings=asked_settings(config),
        )
        rows = {split: _cached_rows(cache, of_split, config) for split, of_split in rows.items()}
    captions = None
    if config.loss.contrastive == "alip":
        captions, rows = _second_captions(workspace, config, manifest, rows)
    generator = np.random.default_rng([config.train.seed, 0x7A])
    val = rows["val"]
    if len(val) > VALIDATION_ROWS:
        val = np.sort(generator.choice(val, VALIDATION_ROWS, replace=False))
    return Data(manifest, cache, rows["train"], val, captions)


def _second_captions(
    workspace: Workspace, config: Config, manifest: Manifest, rows: dict[str, np.ndarray]
) -> tuple[SyntheticCaptions | None, dict[str, np.ndarray]]:
    """Where second captions come from, and the rows that have one."""
    if config.data.second_caption == "another":
        for split, of_split in rows.items():
            single = int((manifest.caption_counts(of_split) < 2).sum())
            if single:
                raise PipeError(
                    f"{single:,} of {len(of_split):,} {split} rows have one caption only, and ALIP reads two",
                    where="data.second_caption",
                    fix="write synthetic ones: pipe caption, then --set data.second_caption=synthetic",
                )
        return None, rows
    captions = open_captions(workspace.captions, manifest)
    return captions, {split: _captioned(captions, of_split, split) for split, of_split in rows.items()}


def _captioned(captions: SyntheticCaptions, rows: np.ndarray, split: str) -> np.ndarray:
    """The rows that have a synthetic caption; those that the captioner failed at are left out."""
    absent, failed = captions.without(rows)
    if absent.any():
        raise PipeError(
            f"{int(absent.sum()):,} of {len(rows):,} {split} rows have not been captioned",
            where=captions.path,
            fix="run: pipe caption --set caption.split=all" if split == "val" else "run: pipe caption",
        )
    if failed.any():
        log.info("leaving out %d %s rows that the captioner could say nothing of", int(failed.sum()), split)
    return rows[~failed]


def cache_place(workspace: Workspace, config: Config) -> str:
    """Folder or URL of the teacher cache; PipeError where there should be a folder and is none."""
    place = config.data.cache or str(workspace.teacher)
    if "://" not in place and not Path(place).exists():
        raise PipeError(
            "there is no teacher cache", where=place, fix="run: pipe extract-teacher (or train --fusion none)"
        )
    return place


def asked_teacher(config: Config, layers: int) -> dict[str, Any]:
    """The fields of a cache's teacher that the configuration fixes; `layers`: how many the teacher has."""
    from pipeline.teacher.huggingface_folder import label

    teacher = config.teacher
    asked: dict[str, Any] = {
        "name": label(teacher.name),
        "image_size": teacher.image_size,
        "view": config.data.view,
        "scales": [{"name": s.name, "grid": s.grid, "layer": _resolved(s.layer, layers)} for s in teacher.scales],
        "model_args": teacher.model_args,
        "weights": _asked_weights(teacher),
    }
    # Those not set are the network's own, which only the network knows.
    return asked | {key: list(value) for key in ("mean", "std") if (value := getattr(teacher, key)) is not None}


def _resolved(layer: int, layers: int) -> int:
    """A layer from the end as the cache names it; one that the teacher does not have stays as it is, to be refused."""
    return layer + layers if -layers <= layer < 0 else layer


def _asked_weights(teacher: TeacherConfig) -> dict[str, str]:
    """The teacher itself is not needed here; its file is compared where it is at hand."""
    from pipeline.teacher.huggingface_folder import asked_origin, is_huggingface
    from pipeline.teacher.weights import weights_origin

    if is_huggingface(teacher.name):
        return asked_origin(teacher.name, random_weights=teacher.random_weights)

    if teacher.checkpoint is None or Path(teacher.checkpoint).is_file():
        path = None if teacher.checkpoint is None else Path(teacher.checkpoint)
        return weights_origin(path, random_weights=teacher.random_weights)
    log.info("%s is not on this machine: not compared with the teacher cache's weights", teacher.checkpoint)
    return {"origin": "checkpoint"}


def asked_settings(config: Config) -> dict[str, Any]:
    """What else shapes a cache's numbers, as the configuration has it."""
    asked = config.teacher.model_dump(include={"pca", "dtype", "calibration_rows", "seed"})
    views = [spec.to_json() for spec in config.teacher.view_specs]
    return asked | ({"views": views} if views else {})


def _cached_rows(cache: Cache, rows: np.ndarray, config: Config) -> np.ndarray:
    state = np.zeros(max(int(rows.max(initial=-1)) + 1, cache.rows), np.uint8)  # the manifest may have grown since
    state[: cache.rows] = cache.state()
    state = state[rows]
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


@dataclass
class Session:
    """Everything that lives while a run trains."""

    training: Any  # pipeline.training.loop.Training
    plan: Any  # pipeline.training.sampler.BatchPlan
    datasets: dict[str, Any]  # split -> pipeline.training.data.PairDataset
    workers: int


def prepare(config: Config, data: Data, folder: RunFolder) -> Session:
    """Build everything, and only when all of it fits begin the run's folder."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from pipeline.training import machine
    from pipeline.training.loop import Training
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
    plan = _plan(config, data, total)
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_bytes(folder.config, config.to_yaml().encode())
        write_record(folder, config, {"finished": False, "code_version": code_version()})
    accelerator.wait_for_everyone()
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    settings, about = _settings(config, plan), data.identity()
    training = Training(
        accelerator, wrapped, prepared, settings, folder, config.dump(), about, wandb=config.train.wandb
    )
    return Session(training, plan, datasets, machine.data_workers(config.data.workers, accelerator.num_processes))


def _plan(config: Config, data: Data, total_steps: int) -> Any:
    from pipeline.cache.layout import auto_shard_rows
    from pipeline.training.sampler import BatchPlan

    # Without a cache there are still tars to be read in sequence: any shard size of a cache will do.
    shard_rows = auto_shard_rows(0, len(data.manifest)) if data.cache is None else data.cache.shard_rows
    train, shuffle = config.train, config.data.shuffle
    return BatchPlan(
        data.train_rows, train.batch_size, total_steps, train.seed, shuffle, shard_rows, config.data.shuffle_buffer
    )


def build_objective(config: Config, cache: Cache | None) -> Any:
    """Model and losses of a configuration; the trunk is built first, so that methods with one seed share it."""
    import torch

    from pipeline.losses.objective import Objective
    from pipeline.losses.targets import TargetInfo
    from pipeline.losses.weights import LossWeights
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
    from pipeline.data.augment import SimCLRViews
    from pipeline.data.samples import SampleReader
    from pipeline.data.views import Preprocess, View
    from pipeline.training.data import PairDataset, permuted_rows

    view = View(kind=config.data.view, size=config.model.image_size)
    preprocess = Preprocess(view, model.trunk.mean, model.trunk.std)
    target_rows = None
    if config.data.permute_targets:
        target_rows = permuted_rows(data.train_rows, manifest_rows=len(data.manifest), seed=config.train.seed)
    if len(data.train_rows):
        data.manifest.captions(int(data.train_rows[0]))  # loads them once, before workers are forked: shared memory
    dataset = PairDataset(
        SampleReader(data.manifest),
        preprocess,
        model.trunk.tokenizer,
        cache=data.cache,
        roi=_roi(config, data.cache),
        target_rows=target_rows,
        seed=config.train.seed,
        views=config.teacher.view_specs,
        view_seed=config.teacher.seed,
        second=_second(config, data),
        augment=SimCLRViews(config.model.image_size, model.trunk.mean, model.trunk.std) if config.loss.simclr else None,
    )
    return {"train": dataset, "val": dataset}


def _second(config: Config, data: Data) -> Any:
    """What gives each row a second caption; None where no loss reads one."""
    from pipeline.training.second_captions import AnotherOfItsOwn, Synthetic

    if config.loss.contrastive != "alip":
        return None
    return AnotherOfItsOwn(config.train.seed) if data.captions is None else Synthetic(data.captions)


def _roi(config: Config, cache: Cache | None) -> Any:
    """How crops of the one view are drawn, None for none; says what their targets are worth."""
    from pipeline.data import roi

    asked = config.data.roi
    if asked is None:
        return None
    if cache is not None:
        log.warning("targets of crops are approximate: cosine %s to the teacher's own", roi.described(cache.roi_cosine))
    return roi.RoiSpec(asked.area, asked.aspect)


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
        term_gradients_every=train.term_gradients_every,
        checkpoint_every=train.checkpoint_every,
        keep_checkpoints=train.keep_checkpoints,
        validate_every=train.validate_every,
    )


def write_record(folder: RunFolder, config: Config, values: dict[str, Any]) -> None:
    """record.json: what names the run, and `values`."""
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
