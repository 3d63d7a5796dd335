"""The precision of float32 products, which is a setting of the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever the rest of training chose (TF32), for all backends at once or for one."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    each = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was chosen by backend, and there is no one answer
        before = None
    torch.set_float32_matmul_precision("highest")  # all backends
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, each, strict=True):
            backend.fp32_precision = precision
