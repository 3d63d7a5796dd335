"""What `pipe train` is made of: from a configuration and opened data to model, losses and a trainer ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.cache.reader import Cache
from pipeline.config import Config
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder, code_version, sha256_file, write_bytes, write_json
from stages import train_init
from stages.train_data import Data
from stages.train_online import online_teacher


@dataclass
class Session:
    """Everything that lives while a run trains."""

    training: Any  # pipeline.training.loop.Training
    plan: Any  # pipeline.training.sampler.BatchPlan
    datasets: dict[str, Any]  # split -> pipeline.training.data.PairDataset
    workers: int
    teacher: Any = None  # pipeline.training.online.OnlineTeacher, where it is in the loop

    def with_targets(self, stream: Any) -> Any:
        """The same batches; where the teacher is in the loop, with what it says of them."""
        return stream if self.teacher is None else map(self.teacher, stream)


def prepare(config: Config, data: Data, folder: RunFolder, *, fresh: bool = True) -> Session:
    """Build everything, and only when all of it fits begin the run's folder.

    Args:
        fresh: the run starts now, from `model.init` where there is one; else a checkpoint is to be restored.
    """
    import torch
    from accelerate.utils import set_seed

    from pipeline.training import machine
    from pipeline.training.compiled import Towers, compile_towers
    from pipeline.training.ema import MovingAverage
    from pipeline.training.loop import Training
    from pipeline.training.memory import save_memory
    from pipeline.training.schedule import parameter_groups

    accelerator = machine.accelerator(config.train.precision, ddp=config.train.ddp.model_dump())
    set_seed(config.train.seed)
    objective = build_objective(config, data.cache, data.projection)
    if fresh:
        train_init.fill(objective.model, config, shown=accelerator.is_main_process)
    train = config.train
    save_memory(
        objective,
        micro_batch_size=train.micro_batch_size,
        batch_size=train.batch_size,
        grad_checkpointing=train.grad_checkpointing,
    )
    if train.channels_last:
        objective.model.trunk.clip.visual.to(memory_format=torch.channels_last)
    ema = None if train.ema is None else MovingAverage(objective, train.ema)
    towers = compile_towers(objective.model, accelerator.device) if train.compile else Towers()
    groups = parameter_groups(
        objective.named_parameters(), weight_decay=train.weight_decay, student_scale=config.model.student.lr_scale
    )
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas, eps=config.train.eps)
    shown = accelerator.is_main_process
    teacher = None if objective.targets is None else online_teacher(config, data, accelerator.device, shown=shown)
    datasets = _datasets(config, data, objective.model, teacher)
    steps_per_epoch = len(data.train_rows) // config.train.batch_size
    total = config.train.max_steps or config.train.epochs * steps_per_epoch
    plan = _plan(config, data, total)
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_bytes(folder.config, config.to_yaml().encode())
        write_record(folder, config, {"finished": False, "init": data.init, "code_version": code_version()})
    accelerator.wait_for_everyone()
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    if ema is not None:
        ema.module = accelerator.prepare_model(ema.module, evaluation_mode=True)  # its device and autocast, no DDP
    settings, about = _settings(config, plan), data.identity()
    training = Training(
        accelerator,
        wrapped,
        prepared,
        settings,
        folder,
        config.dump(),
        about,
        wandb=train.wandb,
        ema=ema,
        towers=towers,
    )
    workers = machine.data_workers(config.data.workers, accelerator.num_processes)
    return Session(training, plan, datasets, workers, teacher)


def _plan(config: Config, data: Data, total_steps: int) -> Any:
    from pipeline.cache.layout import auto_shard_rows
    from pipeline.training.sampler import BatchPlan

    # Without a cache there are still tars to be read in sequence: any shard size of a cache will do.
    shard_rows = auto_shard_rows(0, len(data.manifest)) if data.cache is None else data.cache.shard_rows
    train, shuffle = config.train, config.data.shuffle
    return BatchPlan(
        data.train_rows, train.batch_size, total_steps, train.seed, shuffle, shard_rows, config.data.shuffle_buffer
    )


def build_objective(config: Config, cache: Cache | None, projection: Any = None) -> Any:
    """Model and losses of a configuration; the trunk is built first, so that methods with one seed share it.

    projection: the text branch's target is this one of the teacher's `global`; None for `global` itself.
    """
    import torch

    from pipeline.losses.measured import measure
    from pipeline.losses.objective import Objective
    from pipeline.losses.targets import TargetInfo
    from pipeline.losses.weights import LossWeights
    from pipeline.models.dinorankclip import DinoRankCLIP

    has_student = config.model.parts.student
    targets, scales, width, measured = None, [], None, None
    if has_student and cache is not None:
        scales, width = cached_scales(cache), cache.global_width
        asks = config.loss.kd or config.loss.crd or projection is not None
        measured = measure(cache, kd=config.loss.kd > 0, projection=projection) if asks else None
        targets = TargetInfo.from_cache(cache, measured)
    arguments = model_arguments(config, scales, width)
    if projection is not None and arguments["student"] is not None:
        arguments["text_target_width"] = len(projection.bias)
    model = DinoRankCLIP(**arguments)
    if config.model.freeze_trunk:
        model.trunk.freeze()
    if has_student and cache is not None:
        means = {name: torch.from_numpy(value) for name, value in cache.baselines.items()}
        grams = {scale.name: means[f"{scale.name}_gram_mean"] for scale in cache.scales}
        text_mean = None if measured is None else measured.text_mean
        model.start_at_baselines(global_mean=means["global_mean"], gram_means=grams, text_mean=text_mean)
        if model.text_projection is not None:
            model.text_projection.set_to(projection)
    weights = LossWeights(**{("global_" if k == "global" else k): v for k, v in _loss_values(config).items()})
    return Objective(
        model,
        order=config.train.order,
        transition_depth=config.train.transition_depth,
        transition_dim=config.loss.transition_dim,
        weights=weights,
        targets=targets,
    )


def model_arguments(config: Config, scales: list[dict[str, Any]], global_width: int | None) -> dict[str, Any]:
    """The model's constructor arguments, for a teacher of these scales; of none (no scales) the trunk alone."""
    model = config.model
    arguments: dict[str, Any] = {"trunk": model.trunk, "image_size": model.image_size, "student": None}
    if model.parts.student and scales:
        arguments |= {
            "student": model.student.model_dump(exclude={"lr_scale"}),
            "parts": model.parts.model_dump(exclude={"student"}),
            "scales": scales,
            "global_width": global_width,
            "gate": model.gate.model_dump(),
        }
    return arguments


def cached_scales(cache: Cache) -> list[dict[str, Any]]:
    """[{name, grid, depth_fraction}] of a cache, as the model takes them."""
    depth = {scale["name"]: scale["depth_fraction"] for scale in cache.teacher["scales"]}
    return [{"name": s.name, "grid": s.grid, "depth_fraction": depth[s.name]} for s in cache.scales]


def initial_model(config: Config, data: Data) -> Any:
    """The model as it is before its first step, made again from the seed; random states are left alone.

    Where `model.init` has gone meanwhile, it is the one from the seed alone, and the log says so.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build_objective(config, data.cache, data.projection).model
    try:
        train_init.fill(model, config, shown=False)
    except PipeError as error:
        log.warning("gram_init is that of a student from the seed: %s", error)
    return model


def _loss_values(config: Config) -> dict[str, Any]:
    values = config.loss.model_dump(by_alias=True)
    for key in ("transition_dim", "text_target", "text_projection"):
        values.pop(key)
    return values


def _datasets(config: Config, data: Data, model: Any, teacher: Any) -> dict[str, Any]:
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
        cache=data.cache if teacher is None else None,
        teacher_view=None if teacher is None else teacher.view,
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
        explosion_factor=None if train.explosion is None else train.explosion.factor,
        explosion_steps=20 if train.explosion is None else train.explosion.steps,
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
