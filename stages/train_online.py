"""`teacher.online: true`: the teacher that `pipe train` runs in the loop, ready, and its cache checked against it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.config import Config
from stages.train_data import Data


def online_teacher(config: Config, data: Data, device: Any, *, shown: bool) -> Any:
    """The pipeline.training.online.OnlineTeacher of a run; None where nothing asks for one.

    Args:
        shown: whether this process logs.

    Raises:
        PipeError: the cache is of another teacher, or its rows are.
    """
    if not config.teacher.online or data.cache is None:
        return None
    from pipeline.data.samples import SampleReader
    from pipeline.training import online
    from stages.extract_teacher import load

    teacher = online.OnlineTeacher(load(config), data.cache, device, batch_size=config.teacher.batch_size)
    rows, most = data.train_rows, online.CHECKED_ROWS
    if len(rows) > most:
        rows = np.sort(np.random.default_rng([config.train.seed, 0x0E]).choice(rows, most, replace=False))
    judge = teacher.difference(data.cache, SampleReader(data.manifest), rows)
    online.judge(judge, data.cache.path, show=shown)
    return teacher
