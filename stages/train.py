"""`pipe train`: stage two. Images, captions and the teacher's cached features become a model in a run folder.

The teacher itself is neither loaded nor needed. Alone, the command takes every visible GPU (or the CPU); under
`accelerate launch` it obeys that.
"""

from __future__ import annotations

import sys

from pipeline.config import Config
from pipeline.config import validate as validate_config
from pipeline.console import log
from pipeline.run_folder import Workspace, code_version, sha256_file
from stages.train_data import Data, open_data
from stages.train_setup import Session, prepare, write_record


def run(config: Config, *, name: str | None, resume: bool) -> None:
    """Train one run to its end.

    Raises:
        PipeError: the manifest or cache is missing or does not match, the run exists, or the loss is not finite.
        Stopped: a signal arrived; the state is saved.
    """
    from pipeline.training import machine
    from pipeline.training import resume as resuming
    from pipeline.training.tracking import refuse_without_wandb

    if machine.several_gpus_alone():
        machine.launch_on_all_gpus("stages.cli", sys.argv[1:])
        return
    workspace = Workspace(config.workspace)
    folder = workspace.run(name or default_name(config))
    refuse_without_wandb(config.train.wandb)
    checkpoint = resuming.checkpoint_to_resume(
        folder, config.dump(), resume=resume, completed=lambda then: validate_config(then).dump()
    )
    if resume and folder.finished:
        log.info("run %s is finished already: %s", folder.name, folder.path)
        return
    data = open_data(workspace, config)
    if checkpoint is not None:
        resuming.refuse_other_data(checkpoint, data.identity(), folder)
    session = prepare(config, data, folder)
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


def _train(session: Session, config: Config, data: Data) -> None:
    from pipeline.training.data import batches
    from pipeline.training.validation import number_images, validate, validation_steps

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

    image_numbers = number_images(data.val_rows, data.manifest.column("sha256", data.val_rows).tolist())

    def measure() -> dict[str, float]:
        steps = validation_steps(data.val_rows, batch_size=config.train.batch_size, **place)
        objective, model = training.judged()
        return validate(
            objective,
            model,
            batches(session.datasets["val"], steps, workers=0),
            accelerator.device,
            image_numbers=image_numbers,
            at_once=config.train.micro_batch_size,
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
            "seconds": round(training.seconds, 3),
            "samples_per_second": round(training.samples / max(training.seconds, 1e-9), 2),
            "parameters": model.parameter_counts(),
            "transition_parameters": transitions,
            "simclr_parameters": sum(p.numel() for p in objective.simclr.parameters()) if objective.simclr else 0,
            "peak_memory_bytes": machine.peak_memory(),
            "flops_per_sample": flops_per_sample(
                model, texts=1 + (objective.adaptive is not None), simclr=objective.simclr
            ),
            "world_size": training.accelerator.num_processes,
            "precision": training.accelerator.mixed_precision,
            "machine": machine.describe(),
            "cache": data.cache.digest if data.cache is not None else None,
            "dataset_sha256": data.manifest.fingerprint(),
            "data": data.identity(),
            "code_version": code_version(),
            "checkpoint_sha256": sha256_file(folder.weights),
        },
    )
    log.info("finished %s in %.0f s; next: pipe evaluate %s", folder.path, training.seconds, folder.name)
