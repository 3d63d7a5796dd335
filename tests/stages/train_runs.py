"""A training run of the tests: started, read, and its images spoilt."""

from __future__ import annotations

from pipeline.config import load_config
from pipeline.run_folder import Workspace
from pipeline.training.tracking import read_metrics
from stages import train


def run(folder, *, name="run", resume=False, sets=(), **flags):
    config = load_config(folder / "pipe.yaml", flags=flags, sets=list(sets))
    train.run(config, name=name, resume=resume)
    return Workspace(config.workspace).run(name)


def losses(run_folder):
    return [line["train/loss"] for line in read_metrics(run_folder.metrics) if "train/loss" in line]


def spoil(folder, manifest, rows):
    """Make images undecodable where they lie."""
    for row in rows:
        record = manifest.record(row)
        tar = folder / "tars" / record.source
        data = bytearray(tar.read_bytes())
        data[record.image_offset : record.image_offset + 60] = bytes(60)
        tar.write_bytes(data)
