"""Every fusion variant and control, one path: trained, saved, loaded and evaluated."""

from __future__ import annotations

import json

from train_runs import run

from pipeline.config import load_config
from pipeline.models.dinorankclip import load
from pipeline.run_folder import read_json
from stages import evaluate

FUSIONS = ["full", "none", "no-pyramid", "no-attention", "no-refiner", "image-only", "no-gate"]
CONTROLS = ["no-distill", "shuffled-cache"]


def test_every_variant_is_evaluated_at_its_nodes(folder, capsys):
    names = FUSIONS + CONTROLS
    for fusion in names:
        done = run(folder, name=fusion, sets=["train.max_steps=2"], **{"model.fusion": fusion})
        model, record = load(done.path)[0], read_json(done.record)
        assert record["fusion"] == fusion
        assert record["parameters"] == model.parameter_counts()
        assert bool(record["cache"]) is (fusion != "none")
    capsys.readouterr()
    evaluate.run(load_config(folder / "pipe.yaml"), names, True)
    records = json.loads(capsys.readouterr().out)
    for fusion in names:
        of_run = [record for record in records if record["run"] == fusion]
        recall = {record["node"] for record in of_run if record["metric"] == "retrieval/mean_recall@1"}
        everywhere = {"trunk"} if fusion == "none" else {"trunk", "fused", "gated"}
        assert recall >= everywhere, fusion
        assert recall <= everywhere | {"student"}
        drift = {record["metric"] for record in of_run if record["metric"].startswith("drift/")}
        assert ("drift/remainder" in drift) is (fusion != "none"), fusion
        gates = {record["metric"] for record in of_run if record["metric"] in ("gate/image_mean", "gate/text_mean")}
        assert len(gates) == {"none": 0, "image-only": 1}.get(fusion, 2), fusion
