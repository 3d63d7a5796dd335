"""`train.channels_last`: another memory layout of a convolutional trunk, the same training but for rounding."""

from __future__ import annotations

import pytest
import torch
import yaml
from train_runs import losses, run

from pipeline.config import load_config
from pipeline.errors import Stopped
from pipeline.run_folder import Workspace
from pipeline.training.loop import Training
from stages import train_data, train_setup

RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
CLIP = {"train.method": "clip"}
LAST = "train.channels_last=true"


@pytest.fixture
def convolutional(folder):
    path = folder / "pipe.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"]["trunk"]["vision_cfg"] = RESNET
    path.write_text(yaml.safe_dump(values))
    return folder


def prepared(folder, *sets):
    config = load_config(folder / "pipe.yaml", flags=CLIP, sets=list(sets))
    workspace = Workspace(config.workspace)
    return train_setup.prepare(config, train_data.open_data(workspace, config), workspace.run("any"))


def test_loss_and_gradients_are_those_of_the_usual_layout(convolutional):
    found = []
    for sets in ([], [LAST]):
        session = prepared(convolutional, *sets)
        batch = session.datasets["train"][next(session.plan.steps())]
        loss, _ = session.training.bare(**batch.inputs, progress=0.0)
        loss.backward()
        named = dict(session.training.bare.named_parameters())
        found.append((float(loss.detach()), {name: p.grad for name, p in named.items()}, named))
    (usual, gradients, plain), (other, others, last) = found
    assert other == pytest.approx(usual, rel=1e-5)
    kernels = [name for name, p in last.items() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert len(kernels) > 4
    assert all(last[n].is_contiguous(memory_format=torch.channels_last) and plain[n].is_contiguous() for n in kernels)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_a_run_goes_on_bit_for_bit(convolutional, monkeypatch):
    sets = [LAST, "train.max_steps=2"]
    whole = run(convolutional, name="whole", sets=sets, **CLIP)
    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 1))
    with pytest.raises(Stopped):
        run(convolutional, name="cut", sets=sets, **CLIP)
    monkeypatch.undo()
    cut = run(convolutional, name="cut", sets=sets, resume=True, **CLIP)
    assert losses(cut) == losses(whole)
    assert cut.weights.read_bytes()[-4096:] == whole.weights.read_bytes()[-4096:]
