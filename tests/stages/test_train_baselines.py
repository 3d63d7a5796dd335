"""`pipe train --method cyclip | alip | slip`: from the command to a model, stopped and resumed, and refused in time."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_runs import losses, run, spoil

from pipeline.config import load_config
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace, read_json, sha256_file
from pipeline.training.checkpoint import checkpoints
from pipeline.training.tracking import read_metrics
from stages import caption, index

SETTINGS = {
    "cyclip": [],
    "alip": ["data.second_caption=another"],
    "slip": ["loss.simclr_hidden=8", "loss.simclr_dim=4"],
}
TERMS = {
    "cyclip": {"cyclic/in_modal", "cyclic/cross"},
    "alip": {"alip", "alip/mean/text_caption", "alip/weight/sample"},
    "slip": {"simclr"},
}


@pytest.mark.parametrize("method", SETTINGS)
def test_a_baseline_trains_is_recorded_and_loads(folder, method):
    from pipeline.models.dinorankclip import load

    done = run(folder, sets=SETTINGS[method], **{"train.method": method})
    record, lines = read_json(done.record), read_metrics(done.metrics)
    assert record["finished"]
    assert (record["method"], record["order"], record["fusion"], record["cache"]) == (method, 0, "none", None)
    train = next(line for line in lines if "train/loss" in line)
    assert {f"train/{term}" for term in TERMS[method]} <= train.keys()
    assert {f"val/{term}" for term in TERMS[method]} <= next(line for line in lines if "val/loss" in line).keys()
    plain = run(folder, name="clip", **{"train.method": "clip"})
    assert losses(done) != losses(plain)
    model, _, _ = load(done.path)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in load(plain.path)[0].named_parameters()
    }
    cost = {name: read_json(x.record)["flops_per_sample"] for name, x in (("own", done), ("clip", plain))}
    assert (cost["own"] > cost["clip"]) == (method != "cyclip")
    assert (record["simclr_parameters"] > 0) == (method == "slip")


@pytest.mark.parametrize("method", SETTINGS)
def test_a_baseline_stopped_and_resumed_equals_undisturbed(folder, monkeypatch, method):
    from pipeline.training.loop import Training

    options = {"sets": SETTINGS[method], "train.method": method}
    whole = run(folder, name="whole", **options)
    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped):
        run(folder, name="cut", **options)
    monkeypatch.undo()
    cut = run(folder, name="cut", resume=True, **options)
    assert losses(cut) == losses(whole)
    last = [load_file(checkpoints(x.checkpoints)[-1] / "objective.safetensors") for x in (whole, cut)]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    if method == "alip":
        assert 0 < float(last[0]["adaptive.image_text"]) < 1


def test_alip_without_second_captions_is_refused_before_anything_is_written(folder):
    with pytest.raises(PipeError, match="pipe caption"):
        run(folder, **{"train.method": "alip"})
    assert not Workspace(folder / "workspace").run("run").path.exists()


def test_another_caption_needs_rows_that_have_one(folder):
    with tarfile.open(folder / "tars" / "00000.tar") as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers() if not m.name.endswith("5.json")]
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    (folder / "workspace" / "manifest.parquet").unlink()
    index.run(load_config(folder / "pipe.yaml"))
    with pytest.raises(PipeError, match=r"of \d+ train rows have one caption only.*pipe caption"):
        run(folder, sets=SETTINGS["alip"], **{"train.method": "alip"})


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent.parent / "captioning"))
    import tiny_captioners

    return tiny_captioners.MAKERS["blip"](tmp_path_factory.mktemp("captioner") / "blip")


def test_alip_on_the_captions_that_pipe_caption_wrote(folder, captioner, caplog):
    """Rows that the captioner failed at are left out; those that it has not reached are asked for."""
    from pipeline.data.manifest import read_manifest

    (folder / "workspace" / "manifest.parquet").unlink()
    index.run(load_config(folder / "pipe.yaml"))  # of this copy's tars
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    spoil(folder, manifest, manifest.rows("train")[:2])
    sets = [f"caption.model={captioner}", "caption.max_new_tokens=6"]
    caption.run(load_config(folder / "pipe.yaml", sets=sets), limit=30)
    with pytest.raises(PipeError, match=r"rows have not been captioned.*pipe caption"):
        run(folder, **{"train.method": "alip"})
    caption.run(load_config(folder / "pipe.yaml", sets=sets))
    done = run(folder, **{"train.method": "alip"})
    record = read_json(done.record)
    assert record["data"]["train_rows"] == len(manifest.rows("train")) - 2
    assert record["data"]["captions"] == sha256_file(folder / "workspace" / "captions.parquet")
    assert (
        record["flops_per_sample"]
        > read_json(run(folder, name="clip", **{"train.method": "clip"}).record)["flops_per_sample"]
    )
    assert "captions" not in read_json(Workspace(folder / "workspace").run("clip").record)["data"]


def test_validation_rows_without_captions_are_asked_for_by_a_command_that_helps(folder, captioner):
    """Under `split: train` the same command again would do nothing."""
    sets = [f"caption.model={captioner}", "caption.max_new_tokens=6", "caption.split=train"]
    caption.run(load_config(folder / "pipe.yaml", sets=sets))
    with pytest.raises(PipeError, match=r"val rows have not been captioned.*pipe caption --set caption\.split=all"):
        run(folder, **{"train.method": "alip"})
    caption.run(load_config(folder / "pipe.yaml", sets=[*sets, "caption.split=all"]))
    run(folder, **{"train.method": "alip"})


def test_other_captions_end_a_resume(folder, captioner, monkeypatch):
    from pipeline.training.loop import Training

    sets = [f"caption.model={captioner}", "caption.max_new_tokens=6"]
    caption.run(load_config(folder / "pipe.yaml", sets=sets))
    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped):
        run(folder, **{"train.method": "alip"})
    monkeypatch.undo()
    caption.run(load_config(folder / "pipe.yaml", sets=[*sets, "caption.num_beams=2"]), overwrite=True)
    with pytest.raises(PipeError, match=r"the data is not what the run began with: captions is"):
        run(folder, resume=True, **{"train.method": "alip"})


def test_a_second_caption_is_the_rows_own_and_goes_with_its_image(folder, captioner):
    from pipeline.data.manifest import read_manifest
    from pipeline.data.samples import SampleReader
    from pipeline.data.synthetic_captions import open_captions
    from pipeline.data.views import Preprocess, View
    from pipeline.training.data import PairDataset
    from pipeline.training.sampler import Step
    from pipeline.training.second_captions import AnotherOfItsOwn, Synthetic

    caption.run(load_config(folder / "pipe.yaml", sets=[f"caption.model={captioner}", "caption.max_new_tokens=6"]))
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    written = open_captions(folder / "workspace" / "captions.parquet", manifest)
    preprocess = Preprocess(View(kind="crop", size=32), (0.5,) * 3, (0.5,) * 3)
    spell = lambda texts: torch.tensor([[*text.encode()[:99].ljust(99)] for text in texts])  # noqa: E731
    rows = np.array([7, 3, 11])
    for second in (AnotherOfItsOwn(0), Synthetic(written)):
        data = PairDataset(SampleReader(manifest), preprocess, spell, second=second)
        for epoch in range(3):
            batch = data[Step(0, epoch, rows)]
            texts = [[bytes(row).decode().rstrip() for row in x.tolist()] for x in (batch.tokens, batch.second_tokens)]
            for row, first, other in zip(rows.tolist(), *texts, strict=True):
                if isinstance(second, Synthetic):
                    assert other == written.caption(row)
                else:
                    assert {first, other} == set(manifest.captions(row))
    assert PairDataset(SampleReader(manifest), preprocess, spell)[Step(0, 0, rows)].second_tokens is None


def test_alip_can_be_had_beside_everything_else(folder):
    done = run(folder, sets=[*SETTINGS["alip"], "loss.contrastive=alip", "train.order=2"])
    line = next(line for line in read_metrics(done.metrics) if "train/loss" in line)
    assert {"train/alip", "train/gram/fine", "train/cross", "train/gamma/text"} <= line.keys()


def test_measuring_gradients_changes_nothing_and_names_every_term(folder):
    measured = run(folder, name="a", sets=["train.term_gradients_every=2"])
    plain = run(folder, name="b", sets=["train.term_gradients_every=null"])
    assert losses(measured) == losses(plain)
    a, b = load_file(measured.weights), load_file(plain.weights)
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [line for line in read_metrics(measured.metrics) if "train/loss" in line]
    assert [line["step"] for line in lines if "train/term_grad_norm/contrastive" in line] == [1, 2, 4, 6]
    line = lines[-1]
    assert {key.removeprefix("train/term_grad_norm/") for key in line if "term_grad_norm" in key} == {
        "contrastive", "cross", "in_modal", "gram", "rkd", "global", "gate_l1", "conflict"
    }  # fmt: skip
    parts = {key: line[f"train/grad_norm/{key}"] for key in ("trunk", "student", "fusion", "transitions", "residuals")}
    assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(line["train/grad_norm"], rel=1e-4)
    assert not any("term_grad_norm" in key for x in read_metrics(plain.metrics) for key in x)


def test_a_run_begun_before_a_key_existed_goes_on(folder, monkeypatch):
    from pipeline.training.loop import Training

    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped):
        run(folder)
    monkeypatch.undo()
    state = checkpoints(Workspace(folder / "workspace").run("run").checkpoints)[-1] / "state.json"
    body = json.loads(state.read_text())
    del body["config"]["loss"]["cyclic_cross"], body["config"]["data"]["second_caption"]
    state.write_text(json.dumps(body))
    with pytest.raises(PipeError, match=r"loss\.cyclic_cross is 0.25 now and was 0.0"):
        run(folder, resume=True, sets=["loss.cyclic_cross=0.25"])
    assert read_json(run(folder, resume=True).record)["finished"]
