"""Zero-shot while a run trains: the evaluation's own figure, and clear words where it cannot be measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toy_training import ToyModel, labelled_images, zero_shot_of

from pipeline.config import load_config
from pipeline.errors import PipeError
from pipeline.evaluation.zero_shot import prompts
from stages.train_zero_shot import zero_shot_entry


def test_it_is_the_share_of_readable_images_nearest_to_their_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labelled_images(tmp_path)
    of, model = zero_shot_of(tmp_path), ToyModel()
    model.image = nn.Sequential(model.image, nn.BatchNorm1d(4))
    model.train()
    found = of.measure(model, torch.device("cpu"))
    of.measure(model, torch.device("cpu"))
    assert model.training
    model.eval()
    assert int(model.image[1].num_batches_tracked) == 0
    texts = model.encode_text(of.tokenizer(prompts(of.class_names, of.templates))).detach().double().numpy()
    means = texts.reshape(3, 2, -1).mean(1)
    hits = []
    for index, label in enumerate(of.split.labels):
        if of.split.images.members[index].file.endswith("torn.png"):
            continue
        image = model.encode_image(of.preprocess(of.split.images.load(index))[None]).detach().double().numpy()[0]
        hits.append(np.argmax(means @ image / np.linalg.norm(means, axis=1)) == label)
    assert len(hits) == 13
    assert found == {"zero_shot/shapes/top1": pytest.approx(np.mean(hits))}


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["train.zero_shot=shape"], r"no zero-shot entry 'shape', train\.zero_shot; did you mean shapes\?"),
        (["train.zero_shot=pictures"], "no zero-shot entry 'pictures'"),  # a retrieval
        (["train.zero_shot=shapes"], r"evaluate\.datasets is not set"),
        (["train.zero_shot=shapes", "evaluate.datasets=."], r"shapes is not there: no folder shapes.*draw them"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_begins(tmp_path: Path, sets: list[str], words: str) -> None:
    entries = [
        {"name": "shapes", "kind": "zero_shot", "path": "shapes", "obtain": "draw them"},
        {"name": "pictures", "kind": "retrieval", "path": "pictures"},
    ]
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"entries": entries}))
    (tmp_path / "pipe.yaml").write_text("{}")
    config = load_config(tmp_path / "pipe.yaml", sets=[*sets, f"evaluate.suite={suite}"])
    with pytest.raises(PipeError, match=words):
        zero_shot_entry(config)
    assert zero_shot_entry(load_config(tmp_path / "pipe.yaml")) is None
