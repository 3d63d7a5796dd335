"""`model.init`: which file a run starts from, and the model filled from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.console import log
from pipeline.run_folder import sha256_file

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import DinoRankCLIP
    from pipeline.training.checkpoint import Found


def origin(config: Config, found: Found | None) -> dict[str, str] | None:
    """{path, sha256} of the file that `model.init` means, None without; for the run's record and its checkpoints.

    Args:
        found: the checkpoint from which the run goes on, which needs the file no more: where it is gone, the hash is
            taken from there; where it is another one now, the caller refuses.
    """
    from pipeline.models.init_files import locate

    path = config.model.init
    if path is None:
        return None
    if found is not None and not path.exists():
        log.info("model.init %s is gone: the checkpoint has all that is needed", path)
        return {"path": str(path), "sha256": str(found.state.data.get("init_sha256"))}
    return {"path": str(path), "sha256": sha256_file(locate(path))}


def fill(model: DinoRankCLIP, config: Config, *, shown: bool) -> None:
    """Fill the model from `model.init`, if there is one, and say what was taken (`shown`: in this process).

    Transition heads and what else belongs to the losses starts fresh: a model file holds none of it.
    """
    from pipeline.models.init_files import read_init
    from pipeline.models.warm_start import warm_start

    path = config.model.init
    if path is not None:
        said = warm_start(model, read_init(path), view=config.data.view)
        if shown:
            log.info("model.init %s: %s", path, said)
    elif config.model.freeze_trunk and shown:
        log.warning("model.freeze_trunk without model.init: the trunk stays as random as it is now")
