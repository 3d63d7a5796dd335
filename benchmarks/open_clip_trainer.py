"""open_clip's own trainer beside `pipe train --method clip`: its data pipeline and its training loop, unchanged.

Both get the same tars, model, weights at the start, batch, workers, precision, learning rate, clipping and logging
interval, and the one view as pixels (open_clip's default would crop at random). A round is one of its epochs. Its
reader needs `webdataset`, which comes with open_clip_torch[training].
"""

from __future__ import annotations

import importlib.util
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from step_runs import LOG_EVERY, Run
from torch import Tensor

TOLERANCE = 1e-5


def missing() -> str:
    """What its trainer needs and is not installed, "" for nothing."""
    needed = ("open_clip_train", "webdataset", "braceexpand", "pandas")
    return ", ".join(name for name in needed if importlib.util.find_spec(name) is None)


class OpenClip:
    """Its trainer on a run's model and tars; a call trains one epoch of `steps` batches.

    Args:
        run: ours; its weights are copied as they are now.
        tars: what its reader reads. steps: batches an epoch. folder: for its TensorBoard.
    """

    def __init__(self, run: Run, tars: list[Path], steps: int, folder: Path) -> None:
        from open_clip.loss import ClipLoss
        from open_clip_train.data import get_data
        from open_clip_train.scheduler import cosine_lr
        from torch.utils.tensorboard import SummaryWriter

        logging.getLogger().setLevel(logging.WARNING)
        trunk, train = run.training.bare.model.trunk, run.config.train
        device = run.training.accelerator.device
        self.model = _copy(trunk, run.config.model.trunk, run.config.model.image_size).to(device)
        self.args = _arguments(run, tars, steps, device)
        self.loss = ClipLoss()
        self.optimizer = _optimizer(self.model, train)
        self.scheduler = cosine_lr(self.optimizer, train.lr, train.warmup_steps, train.max_steps)
        preprocess = run.session.datasets["train"].preprocess
        tokenizer = trunk.tokenizer
        self.data = get_data(self.args, (preprocess, preprocess), tokenizer=lambda text: tokenizer([text]))
        self.writer, self.epoch = SummaryWriter(str(folder)), 0

    def __call__(self, _: int) -> None:
        from open_clip_train.train import train_one_epoch

        to = (self.optimizer, None, self.scheduler, None, self.args, self.writer)
        train_one_epoch(self.model, self.data, self.loss, self.epoch, *to)
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self.epoch += 1

    def check(self, run: Run, images: Tensor, tokens: Tensor) -> None:
        """Both give the same loss and gradient of one batch; ValueError if not. Call it before anything is trained."""
        ours, _ = run.training.bare(images=images, tokens=tokens, targets=None, progress=0.0)
        theirs = self.loss(**self.model(images, tokens), output_dict=True)["contrastive_loss"]
        gradients = []
        for loss, clip in ((ours, run.training.bare.model.trunk.clip), (theirs, self.model)):
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in clip.parameters() if p.grad is not None]))
            clip.zero_grad(set_to_none=True)
        apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        one, other = float(ours.detach()), float(theirs.detach())
        if not (abs(one - other) < TOLERANCE * other and apart < 100 * TOLERANCE):
            raise ValueError(f"ours and open_clip's differ: loss {one}, {other}; gradients by {apart:.2g}")


def _copy(trunk: Any, config: Any, image_size: int) -> torch.nn.Module:
    """open_clip's model with the trunk's weights, answering as its trainer expects."""
    from open_clip.model import CLIP

    vision = config["vision_cfg"] | {"image_size": image_size}
    model: torch.nn.Module = CLIP(config["embed_dim"], vision, config["text_cfg"], output_dict=True)
    model.load_state_dict(trunk.clip.state_dict())
    return model


def _optimizer(model: torch.nn.Module, train: Any) -> torch.optim.Optimizer:
    """As its main.py makes it."""
    named = list(model.named_parameters())
    words = ("bn", "ln", "bias", "logit_scale")
    gains = [p for name, p in named if p.ndim < 2 or any(word in name for word in words)]
    rest = [p for name, p in named if not (p.ndim < 2 or any(word in name for word in words))]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": train.weight_decay}]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)


def _arguments(run: Run, tars: list[Path], steps: int, device: torch.device) -> Namespace:
    """The options of its command line that are read on the way."""
    train = run.config.train
    return Namespace(
        train_data="::".join(map(str, tars)),
        train_data_upsampling_factors=None,
        train_num_samples=steps * train.batch_size,
        val_data=None,
        imagenet_val=None,
        imagenet_v2=None,
        dataset_type="webdataset",
        dataset_resampled=False,
        batch_size=train.batch_size,
        workers=run.session.workers,
        seed=train.seed,
        rank=0,
        world_size=1,
        distributed=False,
        horovod=False,
        device=device,
        precision={"no": "fp32", "bf16": "amp_bf16"}[run.training.accelerator.mixed_precision],
        distill=False,
        accum_freq=1,
        skip_scheduler=False,
        grad_clip_norm=train.grad_clip,
        log_every_n_steps=LOG_EVERY,
        wandb=False,
    )
