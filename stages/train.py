"""`pipe train`: stage two. Images, captions and the teacher's cached features become a model in a run folder.

The teacher itself is neither loaded nor needed, unless `teacher.online` asks for it. Alone, the command takes every
visible GPU (or the CPU); under `accelerate launch` it obeys that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.config import validate as validate_config
from pipeline.console import log
from pipeline.run_folder import RunFolder, Workspace, code_version, sha256_file
from stages import train_init, train_processes
from stages.train_data import Data, open_data
from stages.train_setup import Session, initial_model, prepare, write_record
from stages.train_zero_shot import zero_shot_entry, zero_shot_of

if TYPE_CHECKING:
    from pipeline.training.data import Batch


def run(config: Config, *, name: str | None, resume: bool) -> None:
    """Train one run to its end.

    Raises:
        PipeError: the manifest or cache is missing or does not match, the run exists or is being trained, or something
            went wrong on the way (the last good checkpoint is named).
        Stopped: a signal arrived; the state is saved.
    """
    import torch

    from pipeline.training import lock, machine
    from pipeline.training.tracking import refuse_without_wandb

    if machine.several_gpus_alone():
        train_processes.run(torch.cuda.device_count(), sys.argv[1:])
        return
    folder = Workspace(config.workspace).run(name or default_name(config))
    refuse_without_wandb(config.train.wandb)
    with lock.holding(folder, main=machine.is_main()):
        _run(config, folder, resume=resume)


def _run(config: Config, folder: RunFolder, *, resume: bool) -> None:
    from pipeline.training import resume as resuming

    found = resuming.checkpoint_to_resume(
        folder, config.dump(), resume=resume, completed=lambda then: validate_config(then).dump()
    )
    if resume and folder.finished:
        log.info("run %s is finished already: %s", folder.name, folder.path)
        return
    data = open_data(Workspace(config.workspace), config)
    data.init = train_init.origin(config, found)
    if found is not None:
        resuming.refuse_other_data(found, data.identity(), folder)
    benchmark = zero_shot_entry(config)
    session = prepare(config, data, folder, fresh=found is None)
    with session.training.ending_together():
        resuming.begin(session.training, found)
        _train(session, config, data, zero_shot_of(benchmark, session, config))
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


def _train(session: Session, config: Config, data: Data, zero_shot: Any) -> None:
    from pipeline.training.affinities import compare_affinities
    from pipeline.training.data import batches
    from pipeline.training.validation import even_batches, validate, validation_steps
    from pipeline.training.validation_pairs import Captions

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

    val, dataset = data.val_rows, session.datasets["val"]
    hashes = data.manifest.column("sha256", val).tolist()
    captions = Captions.of(val, hashes, data.manifest.captions, dataset.tokenizer)
    batch_size = config.train.batch_size

    def validation() -> Iterator[Batch]:
        steps = validation_steps(val, batch_size=batch_size, **place)
        return session.with_targets(batches(dataset, steps, workers=0))

    def measure() -> dict[str, float]:
        if training.ema is not None:
            training.ema.share()
        objective, model = training.judged()
        figures = validate(
            objective,
            model,
            validation(),
            accelerator.device,
            captions=captions,
            even=even_batches(len(val), batch_size),
            note=lambda batch: training.note_failed(batch, "val"),
            at_once=config.train.micro_batch_size,
        )
        if zero_shot is not None:
            figures |= zero_shot.measure(model, accelerator.device)
        if training.step == plan.total_steps and training.bare.targets is not None:
            same = (batch for batch in validation() if batch.step < even_batches(len(val), batch_size))
            judged = training.bare if training.ema is None else training.ema.module
            figures |= compare_affinities(
                judged,
                initial_model(config, data),
                same,
                accelerator.device,
                at_once=config.train.micro_batch_size,
            )
        return figures

    stream = batches(
        session.datasets["train"], plan.steps(start=training.step, **place), workers=session.workers, pin_memory=pin
    )
    with closing(stream):  # also after an error: its workers would outlive it
        training.run(session.with_targets(stream), measure)


def _finish(session: Session, config: Config, data: Data) -> None:
    from pipeline.models.cost import flops_per_sample
    from pipeline.models.dinorankclip import save
    from pipeline.training import machine

    training = session.training
    folder, objective = training.folder, training.bare
    model = training.judged()[1].cpu()
    about = {"run": folder.name, "code_version": code_version()}
    if training.ema is not None:
        about["weights"] = f"moving average, decay {training.ema.decay}"
    save(model, folder.weights, view=config.data.view, extra=about)
    transitions = sum(p.numel() for name, p in objective.named_parameters() if name.startswith("transitions"))
    write_record(
        folder,
        config,
        {
            "finished": True,
            "steps": training.step,
            "samples_seen": training.samples,
            "skipped": training.skipped.summary(),
            "seconds": round(training.seconds, 3),
            "samples_per_second": round(training.samples / max(training.seconds, 1e-9), 2),
            "parameters": model.parameter_counts(),
            "transition_parameters": transitions,
            "simclr_parameters": sum(p.numel() for p in objective.simclr.parameters()) if objective.simclr else 0,
            "peak_memory_bytes": machine.peak_memory(),
            "flops_per_sample": flops_per_sample(
                model,
                texts=1 + (objective.adaptive is not None),
                simclr=objective.simclr,
                teacher=session.teacher and session.teacher.teacher,
            ),
            "teacher_online": session.teacher is not None,
            "world_size": training.accelerator.num_processes,
            "precision": training.accelerator.mixed_precision,
            "machine": machine.describe(),
            "cache": data.cache.digest if data.cache is not None else None,
            "dataset_sha256": data.manifest.fingerprint(),
            "init": data.init,
            "data": data.identity(),
            "code_version": code_version(),
            "checkpoint_sha256": sha256_file(folder.weights),
        },
    )
    log.info("finished %s in %.0f s; next: pipe evaluate %s", folder.path, training.seconds, folder.name)
