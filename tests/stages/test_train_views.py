"""`pipe extract-teacher` and `pipe train` with further views, and with crops of the one view."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_runs import losses, run

from pipeline.cache.reader import open_cache
from pipeline.config import load_config
from pipeline.console import log
from pipeline.data.geometry import view_choice
from pipeline.data.manifest import read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace, read_json
from pipeline.training.data import PairDataset
from pipeline.training.online import OnlineTeacher
from pipeline.training.sampler import Step
from stages import extract_teacher

VIEWS = "teacher.views=[{name: near, area: [0.2, 0.5]}, {name: mirror, area: [1, 1], flip: 1}]"
# More than two epochs of 5 steps, and nothing beside them that takes time.
LONG = ["train.max_steps=12", "train.checkpoint_every=12", "train.validate_every=12", "train.order=1"]
SHORT = ["train.max_steps=2", "train.order=1"]
ROI = "data.roi={area: [0.3, 0.6]}"


@pytest.fixture(scope="session")
def with_views(tiny_stage_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny workspace, its cache with two further views. Read only: copy it."""
    folder = Path(shutil.copytree(tiny_stage_one, tmp_path_factory.mktemp("views") / "copy"))
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    extract_teacher.run(load_config(folder / "pipe.yaml", sets=[VIEWS]), limit=None)
    return folder


@pytest.fixture
def viewed(with_views: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_views, tmp_path / "viewed"))


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def seen_images(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, bool], dict[int, torch.Tensor]]:
    """(step, whether it validates) → row → image, of whatever is trained from now on."""
    images: dict[tuple[int, bool], dict[int, torch.Tensor]] = {}
    item = PairDataset.__getitem__

    def noted(self, step):
        batch = item(self, step)
        images[step.step, step.validates] = dict(zip(batch.rows.tolist(), batch.images, strict=True))
        return batch

    monkeypatch.setattr(PairDataset, "__getitem__", noted)
    return images


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[step].keys() == b[step].keys() and all(torch.equal(a[step][row], b[step][row]) for row in a[step])
        for step in a
    )


def test_extract_teacher_prints_the_views_and_what_crops_are_worth(folder, capsys):
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    extract_teacher.run(load_config(folder / "pipe.yaml", sets=[VIEWS]), limit=9)
    out = capsys.readouterr().out
    assert "view            near: 0.2 to 0.5 of the area, aspect 0.75 to 1.3333, 50 % mirrored" in out
    assert "view            mirror: 1 to 1 of the area, aspect 0.75 to 1.3333, 100 % mirrored" in out
    cosine = open_cache(folder / "workspace" / "teacher.zarr").roi_cosine
    worst = min(cosine[name]["0.5"] for name in ("fine", "mid"))
    assert "crops of stored maps (data.roi) are approximate: cosine" in out
    assert f"{worst:.2f} at 0.5 of the area" in out


def test_a_run_goes_through_the_views_and_resumes_in_mid_epoch_with_the_same(viewed, monkeypatch):
    images = seen_images(monkeypatch)
    whole = run(viewed, name="whole", sets=[VIEWS, *LONG])
    undisturbed = dict(images)
    images.clear()
    from pipeline.training.loop import Training

    original = Training._any_process
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 8))
        with pytest.raises(Stopped, match="step 8 of 12"):
            run(viewed, name="cut", sets=[VIEWS, *LONG])
    cut = run(viewed, name="cut", sets=[VIEWS, *LONG], resume=True)
    assert same(images, undisturbed)
    assert losses(cut) == losses(whole)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_clip_without_a_cache_sees_the_crops_of_dinorankclip(viewed, monkeypatch):
    images = seen_images(monkeypatch)
    run(viewed, name="dino", sets=[VIEWS, *LONG])
    theirs = dict(images)
    images.clear()
    shutil.rmtree(viewed / "workspace" / "teacher.zarr")
    run(viewed, name="clip", sets=[VIEWS, *LONG[:3]], **{"train.method": "clip"})
    assert same(images, theirs)
    images.clear()
    run(viewed, name="plain", sets=LONG[:3], **{"train.method": "clip"})
    differ, step_rows = 0, [(step, row) for step in theirs if not step[1] for row in theirs[step]]
    per_epoch = read_json(Workspace(viewed / "workspace").run("plain").record)["data"]["train_rows"] // 8
    for step, row in step_rows:
        base = view_choice(0, step[0] // per_epoch, row, 3) == 0
        assert torch.equal(images[step][row], theirs[step][row]) == base
        differ += not base
    assert 0.5 < differ / len(step_rows) < 0.8  # two of three views are further ones
    assert same({k: v for k, v in images.items() if k[1]}, {k: v for k, v in theirs.items() if k[1]})  # validation


def test_shuffled_cache_trains_on_views(viewed, monkeypatch):
    images = seen_images(monkeypatch)
    run(viewed, name="own", sets=[VIEWS, *SHORT])
    own = dict(images)
    images.clear()
    control = run(viewed, name="control", sets=[VIEWS, *SHORT], **{"model.fusion": "shuffled-cache"})
    assert read_json(control.record)["finished"]
    assert same(images, own)
    assert losses(control) != losses(Workspace(viewed / "workspace").run("own"))


@pytest.mark.parametrize(
    ("views", "field"),
    [
        ("teacher.views=[{name: near, area: [0.2, 0.5]}]", r"settings\.views"),
        (VIEWS.replace("0.5", "0.6"), r"settings\.views\[0\]\.area\[1\]: 0\.5 in the cache, 0\.6 asked for"),
        (VIEWS.replace("near", "far"), r"settings\.views\[0\]\.name"),
        (VIEWS.replace("flip: 1", "flip: 0.5"), r"settings\.views\[1\]\.flip"),
    ],
)
def test_a_cache_of_other_views_is_refused_with_the_field(viewed, views, field):
    with pytest.raises(PipeError, match=f"does not match: {field}"):
        run(viewed, sets=[views])


def test_views_that_the_cache_lacks_are_refused(folder):
    with pytest.raises(PipeError, match=r"does not match: settings\.views: not recorded in the cache"):
        run(folder, sets=[VIEWS])


def test_a_config_without_views_trains_on_the_base_view(viewed, folder):
    """Of a cache with views and of one without: the same run."""
    a, b = (run(place, name="run", sets=SHORT) for place in (viewed, folder))
    assert losses(a) == losses(b)


def test_a_resume_with_other_views_or_boxes_names_the_key(viewed, monkeypatch):
    from pipeline.training.loop import Training

    original = Training._any_process
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 1))
        with pytest.raises(Stopped):
            run(viewed, name="views", sets=[VIEWS])
        with pytest.raises(Stopped):
            run(viewed, name="roi", sets=[ROI])
    with pytest.raises(PipeError, match=r"teacher\.views is \[\] now"):
        run(viewed, name="views", resume=True)
    with pytest.raises(PipeError, match=r"data\.roi.* is .* now and was"):
        run(viewed, name="roi", resume=True)


# ---- crops of the one view -------------------------------------------------------------------------------------------


def test_a_run_on_crops_says_what_their_targets_are_worth_and_resumes(folder, monkeypatch, said):
    images = seen_images(monkeypatch)
    whole = run(folder, name="whole", sets=[ROI, *LONG])
    cosine = open_cache(folder / "workspace" / "teacher.zarr").roi_cosine
    (line,) = [line for line in said if "approximate" in line]
    worst = min(cosine[name]["0.5"] for name in ("fine", "mid"))
    assert line.startswith("targets of crops are approximate: cosine ")
    assert f"{worst:.2f} at 0.5 of the area" in line
    undisturbed = dict(images)
    images.clear()
    from pipeline.training.loop import Training

    original = Training._any_process
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 8))
        with pytest.raises(Stopped):
            run(folder, name="cut", sets=[ROI, *LONG])
    cut = run(folder, name="cut", sets=[ROI, *LONG], resume=True)
    assert same(images, undisturbed)
    assert losses(cut) == losses(whole)
    images.clear()
    del said[:]
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    run(folder, name="clip", sets=[ROI, *LONG[:3]], **{"train.method": "clip"})
    assert same(images, undisturbed)
    assert not [line for line in said if "approximate" in line]


def test_a_box_of_everything_is_the_run_without_boxes(folder):
    """A square picture and area 1: image and targets are those of whole views, so that losses agree to rounding."""
    whole = run(folder, name="whole", sets=["data.roi={area: [1, 1]}", *SHORT])
    plain = run(folder, name="plain", sets=SHORT)
    np.testing.assert_array_equal(losses(whole), losses(plain))
    cut = run(folder, name="cut", sets=[ROI, *SHORT])
    assert np.abs(np.array(losses(cut)) - losses(plain)).max() > 1e-3


def test_a_cache_that_has_not_measured_crops_says_so(folder, said):
    path = folder / "workspace" / "teacher.zarr"
    document = json.loads((path / "zarr.json").read_text())
    del document["attributes"]["roi_cosine"]
    from pipeline.cache import layout

    (path / "zarr.json").write_bytes(layout.json_bytes(document))
    digest = json.loads((path / "digest.json").read_text())
    digest["sha256"] = layout.digest_of(path, digest["files"])
    (path / "digest.json").write_bytes(layout.json_bytes(digest))
    assert open_cache(path).roi_cosine == {}
    run(folder, sets=[ROI, "train.max_steps=1"])
    assert any("approximate" in line and "not measured" in line for line in said)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([ROI, VIEWS], r"data\.roi and teacher\.views exclude each other"),
        (["data.roi={flip: 0.5}"], r"data\.roi: a mirrored map is not the map of the mirrored image"),
        (["data.roi={area: [0.6, 0.3]}"], r"data\.roi\.area: .*the larger one"),
        (["data.roi={area: [0, 1]}"], r"data\.roi\.area"),
        (["data.roi={aspect: [0, 1]}"], r"data\.roi\.aspect"),
        (["data.roi={size: 3}"], r"data\.roi\.size is unknown"),
        (["teacher.views=[{name: base}]"], r"teacher\.views\.0\.name: base is the view that everyone has"),
        (["teacher.views=[{name: a}, {name: a}]"], r"two views share a name"),
        (["teacher.scales=[{name: views, layer: 1, grid: 2}]"], r"used by the cache itself"),
    ],
)
def test_what_contradicts_itself_is_refused(folder, sets, message):
    with pytest.raises(PipeError, match=message):
        load_config(folder / "pipe.yaml", sets=sets)


def test_the_defaults_of_crops_are_those_documented(folder):
    found = load_config(folder / "pipe.yaml", sets=["data.roi={}"]).data.roi
    assert (found.area, found.aspect) == ((0.75, 1.0), (0.75, 1.3333))
    assert load_config(folder / "pipe.yaml").data.roi is None


def test_a_teacher_in_the_loop_sees_the_views_that_the_cache_has(with_views: Path) -> None:
    config = load_config(with_views / "pipe.yaml", sets=[VIEWS])
    workspace = Workspace(config.workspace)
    cache, samples = open_cache(workspace.teacher), SampleReader(read_manifest(workspace.manifest))
    online = OnlineTeacher(extract_teacher.load(config), cache, torch.device("cpu"), batch_size=8)
    views = {"views": config.teacher.view_specs, "view_seed": config.teacher.seed}
    how = (samples, Preprocess(View("crop", 32), (0.5,) * 3, (0.5,) * 3), lambda texts: torch.zeros(len(texts), 2))
    live = PairDataset(*how, teacher_view=online.view, **views)  # type: ignore[arg-type]
    cached = PairDataset(*how, cache=cache, **views)  # type: ignore[arg-type]
    for epoch in range(3):
        a, b = (dataset[Step(0, epoch, np.array([9, 4, 30, 2, 17]))] for dataset in (live, cached))
        found, want = online(a).targets, b.targets
        assert torch.equal(a.images, b.images)
        assert found is not None
        assert want is not None
        assert set(found) == set(want)
        assert all(torch.equal(found[name], want[name]) for name in want)
