"""docs/recipe.md against configs/cc3m.yaml: the page says what the file does, and leaves no key out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| `([^`]*)` \| ", re.MULTILINE)

# Where things lie, how often something is written, which machine it runs on, and other methods' own terms.
NOT_OF_THE_RECIPE = {
    *("data.source", "data.val_source", "data.workers", "data.cache", "data.cache_access"),
    *("data.permute_targets", "data.second_caption"),
    *("teacher.checkpoint", "teacher.random_weights", "teacher.mean", "teacher.std", "teacher.compile", "teacher.seed"),
    *("teacher.online", "train.channels_last"),
    *(
        "teacher.model_args",
        "train.method",
        "train.seed",
        "train.max_steps",
        "train.wandb",
        "train.zero_shot",
        "model.fusion",
    ),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.validate_every", "train.log_every"),
    *("train.micro_batch_size", "train.grad_checkpointing", "train.compile"),
    *(f"train.ddp.{key}" for key in ("gradient_as_bucket_view", "static_graph", "bucket_cap_mb")),
    *("train.ddp.find_unused_parameters",),
    *("train.term_gradients_every", "loss.contrastive", "loss.cyclic_in_modal", "loss.cyclic_cross", "loss.head"),
    *("loss.simclr", "loss.simclr_temperature", "loss.simclr_hidden", "loss.simclr_dim"),
}


def flat(values: dict, above: str = "") -> dict:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


@pytest.fixture(scope="module")
def resolved() -> dict:
    config = load_config(None, preset="cc3m").dump()
    return flat({section: config[section] for section in ("data", "teacher", "model", "train", "loss")})


@pytest.fixture(scope="module")
def stated() -> dict:
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 40
    return {key: yaml.safe_load(value) for key, value in found}


def test_every_value_of_the_page_is_the_files(resolved: dict, stated: dict) -> None:
    assert {key: resolved.get(key, "no such key") for key in stated} == stated


def test_no_key_that_shapes_a_run_is_left_out(resolved: dict, stated: dict) -> None:
    shaping = {key for key in resolved if key not in NOT_OF_THE_RECIPE and not key.startswith("model.parts.")}
    assert shaping == set(stated)
