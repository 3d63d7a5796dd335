"""Whole suites with tiny models: values, gaps, provenance, pairing, caching, determinism."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colour_world import COLOURS, NAMES, Broken, ColourModel, NodeModel, colour_members, jpeg, write_colours, write_tar

from pipeline.data.samples import decode_image
from pipeline.errors import PipeError
from pipeline.evaluation.paired import mean_of
from pipeline.evaluation.records import Measurement, to_json
from pipeline.evaluation.registry import Entry, ManifestImages, Retrieval, subset
from pipeline.evaluation.suite import Results, opponents, run_entry, run_suite, versus

ZERO_SHOT = Entry(name="colours", kind="zero_shot", path="colours")
PROBE = Entry(name="colours", kind="probe", path="colours")
ABSENT = Entry(name="birds", kind="probe", path="birds", obtain="ask an ornithologist")
DOMAINS = Entry(name="paint", kind="probe", path="paint", domains=("oil", "ink", "chalk"))
RETRIEVAL = Entry(name="pairs", kind="retrieval", path="pairs")


def run(subjects, entries, tmp_path) -> Results:
    return run_suite(entries, tmp_path / "data", subjects, cache=tmp_path / "store", workers=2, code_version="v")


def value(results, metric, run="fake", **where):
    (found,) = [
        r
        for r in results.records
        if r.metric == metric and r.run == run and all(getattr(r, k) == v for k, v in where.items())
    ]
    return found


def retrieval_data(n: int = 24, bad: tuple[int, ...] = ()) -> Retrieval:
    """n images in three colours, two captions each; captions of a colour are equal words."""
    files = [b"?" if k in bad else jpeg(COLOURS[NAMES[k % 3]], k) for k in range(n)]
    reader = SimpleNamespace(image=lambda row: decode_image(files[row]))
    images = ManifestImages(reader, np.arange(n), f"retrieval{n}{bad}")
    texts = tuple(f"{start} {name}" for start in ("something", "a thing of") for name in NAMES)
    owner = np.repeat(np.arange(n), 2)
    text = np.stack([np.arange(n) % 3, 3 + np.arange(n) % 3], axis=1).ravel()
    return Retrieval(images, texts, owner, text, "test")


def test_a_perfect_model_scores_one_and_chance_a_third(subject, colours, tmp_path):
    results = run([subject()], [ZERO_SHOT, PROBE], tmp_path)
    assert value(results, "zero_shot/top1").value == 1.0
    assert value(results, "probe/top1").value == 1.0
    assert value(results, "probe/mean_per_class").value == 1.0
    assert value(results, "zero_shot/top1", run="chance").value == pytest.approx(1 / 3)
    assert value(results, "probe/top1", run="chance").node == "none"
    assert results.gaps == []


def test_every_node_is_scored_and_a_blind_one_is_worse(subject, colours, tmp_path):
    results = run([subject(NodeModel())], [ZERO_SHOT, PROBE], tmp_path)
    assert value(results, "zero_shot/top1", node="gated").value == 1.0
    assert value(results, "zero_shot/top1", node="trunk").value < 0.9
    assert {r.node for r in results.records if r.metric == "probe/top1"} == {"trunk", "gated", "none"}


def test_an_absent_dataset_is_a_named_gap_and_the_rest_goes_on(subject, colours, tmp_path):
    results = run([subject()], [ABSENT, ZERO_SHOT], tmp_path)
    assert results.gaps == ["birds (probe): no folder birds. To obtain it: ask an ornithologist"]
    assert value(results, "zero_shot/top1").value == 1.0


def test_records_carry_run_and_data(subject, colours, tmp_path):
    record = value(run([subject()], [ZERO_SHOT], tmp_path), "zero_shot/top1")
    assert (record.method, record.order, record.seed, record.checkpoint_sha256) == ("clip", 0, 0, "fake")
    assert (record.benchmark, record.split, record.n, record.code_version) == ("colours", "test", 24, "v")
    assert len(record.dataset_sha256) == 64


def test_a_second_evaluation_gives_the_same_bytes_and_calls_no_model(subject, colours, tmp_path):
    write_colours(tmp_path / "data" / "paint", {"oil": 30, "ink": 30, "chalk": 30})
    entries = [ZERO_SHOT, PROBE, DOMAINS]
    first = run([subject(NodeModel())], entries, tmp_path)
    again = run([subject(Broken())], entries, tmp_path)
    assert to_json(first.records) == to_json(again.records)


def test_a_second_evaluation_fits_no_probe(subject, colours, tmp_path, monkeypatch):
    first = run([subject()], [PROBE], tmp_path)
    monkeypatch.setattr("pipeline.evaluation.probe.probe", lambda *_: pytest.fail("fitted again"))
    again = run([subject(Broken())], [PROBE], tmp_path)
    assert to_json(again.records) == to_json(first.records)


def test_a_fresh_store_gives_the_same_bytes(subject, colours, tmp_path):
    first = to_json(run([subject()], [ZERO_SHOT, PROBE], tmp_path).records)
    shutil.rmtree(tmp_path / "store")
    assert to_json(run([subject()], [ZERO_SHOT, PROBE], tmp_path).records) == first


def test_each_domain_is_left_out_in_turn_and_averaged(subject, colours, tmp_path):
    root = write_colours(tmp_path / "data" / "paint", {"oil": 30, "ink": 33, "chalk": 1})
    labels_lie = [(f"s{k:04d}.cls", str((k + 1) % 3).encode()) for k in range(150)]
    images = [(f"s{k:04d}.jpg", jpeg(COLOURS[NAMES[k % 3]], 9000 + k)) for k in range(150)]
    write_tar(root / "chalk" / "0.tar", [m for pair in zip(images, labels_lie, strict=True) for m in pair])
    results = run([subject()], [DOMAINS], tmp_path)
    scores = {s: value(results, "probe/top1", split=s).value for s in ("oil", "ink", "chalk", "mean")}
    assert scores["chalk"] == 0.0  # its labels lie, and its rows, the most, were not fitted on
    assert scores["mean"] == pytest.approx((scores["oil"] + scores["ink"] + scores["chalk"]) / 3)
    assert value(results, "probe/top1", split="ink").n == 33
    assert value(results, "probe/top1", split="mean", run="chance").value == pytest.approx(1 / 3)


def test_a_broken_test_image_is_left_out_of_the_count(subject, colours, tmp_path):
    members = colour_members(24)
    members[0] = ("s0000.jpg", b"broken")
    write_tar(colours / "test" / "0.tar", members)
    results = run([subject()], [ZERO_SHOT, PROBE], tmp_path)
    assert value(results, "zero_shot/top1").n == value(results, "probe/top1").n == 23


def test_runs_are_compared_on_their_outputs_with_paired_intervals(subject, colours, tmp_path):
    class Blind(ColourModel):
        def encode_image(self, images, normalize=False):
            return super().encode_image(images) * torch.tensor([1.0, 0.0, 0.0]) + 1e-3

    results = run([subject(Blind(), name="blind"), subject(name="good")], [ZERO_SHOT], tmp_path)
    record = value(results, "zero_shot/top1:vs:blind", run="good")
    good, blind = value(results, "zero_shot/top1", run="good"), value(results, "zero_shot/top1", run="blind")
    assert record.value == pytest.approx(good.value - blind.value)
    assert 0 < record.low <= record.value <= record.high
    assert not [r for r in results.records if ":vs:good" in r.metric]


def test_many_runs_are_compared_with_the_first_only():
    assert opponents(["a", "b", "c"]) == [("b", "a"), ("c", "a"), ("c", "b")]
    assert opponents([*"abcdefgh"]) == [(run, "a") for run in "bcdefgh"]


def test_a_teacher_is_probed_and_nothing_else(subject, colours, tmp_path):
    teacher = replace(subject(name="teacher"), probes_only=True)
    results = run([subject(), teacher], [ZERO_SHOT, PROBE], tmp_path)
    assert {r.metric for r in results.records if r.run == "teacher"} == {"probe/top1", "probe/mean_per_class"}
    assert not [r for r in results.records if ":vs:" in r.metric]


def test_a_teacher_that_cannot_be_loaded_is_one_gap(subject, colours, tmp_path):
    teacher = replace(subject(name="teacher"), probes_only=True)

    def fail():
        raise PipeError("no weights", fix="get them")

    teacher.embedder._load = fail
    write_colours(tmp_path / "data" / "paint", {"oil": 30, "ink": 30, "chalk": 30})
    results = run([subject(), teacher], [PROBE, DOMAINS], tmp_path)
    assert results.gaps == ["teacher: no weights; get them"]
    assert value(results, "probe/top1", benchmark="colours").value == 1.0


def test_retrieval_gives_ranks_and_nodes_at_every_node_from_one_pass(subject):
    results = Results()
    model = NodeModel()
    run_entry(results, RETRIEVAL, retrieval_data(), [subject(model)], code_version="v")
    assert model.calls == 4 + 1  # 24 images in batches of 7, one batch of texts
    assert value(results, "retrieval/i2t_recall@1", node="gated").value == 1.0  # equal words are right for all
    assert value(results, "retrieval/t2i_recall@1", node="gated").value == pytest.approx(3 / 24)
    assert {r.node for r in results.records if r.metric == "nodes/gap"} == {"trunk", "gated"}


def test_retrieval_leaves_broken_images_and_their_captions_out(subject):
    results = Results()
    run_entry(results, RETRIEVAL, retrieval_data(bad=(2, 5)), [subject()], code_version="v")
    assert value(results, "retrieval/i2t_recall@1").n == 22
    assert value(results, "retrieval/t2i_recall@10", run="chance").value == pytest.approx(10 / 22)


def test_a_subset_of_images_keeps_their_pairs_renumbered():
    data = retrieval_data(6)
    keep = np.array([True, False, True, True, False, True])
    pair_image, pair_text, used = subset(data, keep)
    rebuilt = {(np.flatnonzero(keep)[i], used[t]) for i, t in zip(pair_image, pair_text, strict=True)}
    original = {(i, t) for i, t in zip(data.pair_image, data.pair_text, strict=True) if keep[i]}
    assert rebuilt == original
    assert len(used) == len({t for _, t in original})


def test_gate_and_drift_are_measured_where_a_model_injects_and_kept(subject):
    results, again = Results(), Results()
    run_entry(results, RETRIEVAL, retrieval_data(), [subject(NodeModel())], code_version="v")
    assert value(results, "gate/image_mean").value == pytest.approx(0.25)
    assert value(results, "gate/image_q95").value == pytest.approx(0.25)
    assert value(results, "drift/gamma_image").value == pytest.approx(0.1)
    assert value(results, "drift/slope").value == pytest.approx(
        value(results, "drift/finite_difference").value, rel=1e-2
    )
    assert not [r for r in results.records if r.metric.startswith("gate/text")]
    run_entry(again, RETRIEVAL, retrieval_data(), [subject(Broken())], code_version="v")
    assert to_json(results.records) == to_json(again.records)


def test_gap_and_drift_take_each_image_with_its_first_caption(subject):
    """Image 0 is broken and text 0 is its alone, so rows and texts are renumbered; second captions lie."""
    n = 13
    text = np.stack([1 + np.arange(n) % 3, 1 + (np.arange(n) + 1) % 3], axis=1)
    text[0, 0] = 0
    texts = ("nothing", *(f"something {name}" for name in NAMES))
    data = replace(retrieval_data(n, bad=(0,)), texts=texts, pair_text=text.ravel())
    results = Results()
    run_entry(results, RETRIEVAL, data, [subject(NodeModel())], code_version="v")
    x = np.array([np.asarray(data.images.load(k), dtype=float).mean((0, 1)) / 255 for k in range(1, n)]) + 1e-3
    y = np.eye(3)[np.arange(1, n) % 3] + 1e-3
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    aligned = np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)])
    assert value(results, "nodes/alignment", node="gated").value == pytest.approx(aligned, rel=1e-5)
    odds = np.exp(10 * x @ y.T)  # the model's scale is 10
    likely = [odds.diagonal() / odds.sum(axis) for axis in (0, 1)]
    assert value(results, "drift/loss_trunk").value == pytest.approx(-np.log(likely).mean(), rel=1e-5)


def test_a_plain_pair_of_encoders_has_no_gate_rows(subject):
    results = Results()
    run_entry(results, RETRIEVAL, retrieval_data(), [subject()], code_version="v")
    assert not [r for r in results.records if r.metric.startswith(("gate/", "drift/"))]


def test_a_comparison_takes_the_outputs_and_no_other_node_or_measure():
    def of(metric: str, node: str, values: list[float]) -> Measurement:
        return Measurement(metric, node, "test", float(np.mean(values)), 0.0, 1.0, 4, mean_of(values))

    mine = [
        of("zero_shot/top1", "gated", [1, 1, 1, 0]),
        of("zero_shot/top1", "trunk", [0, 0, 0, 0]),
        of("nodes/alignment", "gated", [1, 2, 3, 4]),
    ]
    theirs = [of("zero_shot/top1", "trunk", [0, 1, 0, 0]), of("nodes/alignment", "trunk", [1, 1, 1, 1])]
    (found,) = versus(mine, theirs, "plain")
    assert (found.metric, found.node, found.value) == ("zero_shot/top1:vs:plain", "gated", 0.5)


def test_runs_measured_on_different_numbers_of_units_are_not_compared():
    def of(metric: str, values: list[float]) -> Measurement:
        return Measurement(metric, "gated", "test", float(np.mean(values)), 0.0, 1.0, len(values), mean_of(values))

    mine = [of("zero_shot/top1", [1, 1, 1, 0]), of("probe/top1", [1, 1, 1, 0])]
    theirs = [of("zero_shot/top1", [0, 1, 0, 0, 1]), of("probe/top1", [0, 1, 0, 0])]
    (found,) = versus(mine, theirs, "plain")
    assert (found.metric, found.value, found.n) == ("probe/top1:vs:plain", 0.5, 4)
