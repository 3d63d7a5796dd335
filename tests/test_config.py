"""The configuration: layers, named files, and errors that name the key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from pipeline.config import configs_folder, known_keys, load_config, merge, parse_set, shipped, validate
from pipeline.config_schema import Config, LossConfig
from pipeline.errors import PipeError


def write(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


def test_layers_override_in_the_documented_order(tmp_path):
    path = write(tmp_path / "pipe.yaml", {"train": {"lr": 0.5, "epochs": 3}})
    config = load_config(path, preset="small", sets=["train.epochs=9"])
    assert config.train.warmup_steps == 60  # preset over default
    assert config.train.lr == 0.5  # YAML over preset
    assert config.train.epochs == 9  # --set over YAML
    assert config.train.weight_decay == 0.1  # default


def test_a_method_file_overrides_the_yaml_and_sets_only_what_defines_it(tmp_path):
    path = write(tmp_path / "pipe.yaml", {"train": {"order": 2, "batch_size": 64}, "loss": {"cross": 7}})
    config = load_config(path, flags={"train.method": "rankclip"})
    assert (config.train.order, config.model.fusion, config.loss.positions) == (1, "none", "uniform")
    assert config.loss.cross == 0.0625
    assert config.train.batch_size == 64


def test_a_yaml_that_contradicts_its_own_method_is_told_so(tmp_path, caplog, monkeypatch):
    """A run's saved YAML does, where --set varied its method: without it the same file is another run."""
    monkeypatch.setattr(logging.getLogger("pipe"), "propagate", True)
    saved = load_config(write(tmp_path / "a.yaml", {}), flags={"train.method": "cyclip"}, sets=["loss.cyclic_cross=2"])
    path = write(tmp_path / "saved.yaml", saved.dump())
    assert caplog.text == ""
    assert load_config(path, sets=["loss.cyclic_cross=2"]) == saved
    assert caplog.text == ""
    assert load_config(path).loss.cyclic_cross == 0.25
    assert "loss.cyclic_cross: 2.0 in the YAML is replaced by 0.25 of method cyclip" in caplog.text
    load_config(write(tmp_path / "b.yaml", {"model": {"fusion": "no-distill"}, "loss": {"gram": 2}}))
    assert "loss.gram: 2 in the YAML is replaced by 0 of fusion no-distill" in caplog.text
    caplog.clear()
    for fusion in (file.stem for file in (configs_folder() / "fusion").glob("*.yaml")):
        own = load_config(write(tmp_path / "c.yaml", {}), flags={"model.fusion": fusion})
        assert load_config(write(tmp_path / "d.yaml", own.dump())) == own
    assert caplog.text == ""


def test_an_explicit_set_may_vary_a_methods_weights(tmp_path):
    path = write(tmp_path / "pipe.yaml", {})
    config = load_config(path, flags={"train.method": "rankclip"}, sets=["loss.cross=0.5"])
    assert config.loss.cross == 0.5


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ({"train.method": "rankclip", "train.order": 3}, "--method dinorankclip --order 3 --fusion none"),
        ({"train.method": "clip", "model.fusion": "full"}, "--method dinorankclip --order 0 --fusion full"),
        (
            {"train.method": "cyclip", "train.order": 3},
            "--order 3 --fusion none --set loss.cyclic_in_modal=0.25 --set loss.cyclic_cross=0.25",
        ),
        ({"train.method": "alip", "train.order": 2}, "--order 2 --fusion none --set loss.contrastive=alip"),
        ({"train.method": "slip", "model.fusion": "full"}, "--order 0 --fusion full --set loss.simclr=1.0"),
    ],
)
def test_a_contradiction_is_refused_with_the_right_command(tmp_path, flags, command):
    path = write(tmp_path / "pipe.yaml", {})
    with pytest.raises(PipeError, match=command):
        load_config(path, flags=flags)


def test_a_flag_equal_to_the_method_is_no_contradiction(tmp_path):
    path = write(tmp_path / "pipe.yaml", {})
    assert load_config(path, flags={"train.method": "clip", "train.order": 0}).train.order == 0


BASELINES = {
    "cyclip": {"cyclic_in_modal": 0.25, "cyclic_cross": 0.25},
    "alip": {"contrastive": "alip"},
    "slip": {"simclr": 1.0, "simclr_temperature": 0.1, "simclr_hidden": 4096, "simclr_dim": 256},
}


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_order_0_without_fusion_plus_its_own_terms(tmp_path, method):
    path = write(tmp_path / "pipe.yaml", {"train": {"batch_size": 64}})
    config = load_config(path, flags={"train.method": method})
    assert (config.train.order, config.model.fusion, config.train.batch_size) == (0, "none", 64)
    changed = {key: value for key, value in config.loss if value != getattr(LossConfig(), key)}
    assert changed == {key: value for key, value in BASELINES[method].items() if value != getattr(LossConfig(), key)}


def test_what_a_method_defined_leaves_with_it(tmp_path):
    """The YAML that a run saves names everything; another method must not inherit it."""
    for method in (*BASELINES, "rankclip"):
        saved = load_config(write(tmp_path / "a.yaml", {"loss": {"head_share": 0.3}}), flags={"train.method": method})
        path = write(tmp_path / "saved.yaml", saved.dump())
        assert load_config(path).dump() == saved.dump()
        other = load_config(path, flags={"train.method": "dinorankclip"})
        expected = load_config(write(tmp_path / "b.yaml", {"loss": {"head_share": 0.3}}))
        assert other.loss == expected.loss
        assert (other.train.order, other.model.fusion) == (3, "full")


def test_a_value_that_its_own_method_would_have_replaced_does_not_come_back_with_another(tmp_path):
    path = write(
        tmp_path / "a.yaml", {"train": {"method": "rankclip", "order": 2}, "loss": {"cross": 0.3, "gram": 0.4}}
    )
    own, other = load_config(path), load_config(path, flags={"train.method": "dinorankclip"})
    assert (own.train.order, own.loss.cross, own.loss.gram) == (1, 0.0625, 0.4)
    assert (other.train.order, other.loss.cross, other.loss.gram) == (3, 1.0, 0.4)


def test_a_methods_own_terms_leave_with_it_whatever_they_were_set_to(tmp_path):
    saved = load_config(None, flags={"train.method": "cyclip"}, sets=["loss.cyclic_cross=0.5"])
    path = write(tmp_path / "saved.yaml", saved.dump())
    assert load_config(path, flags={"train.method": "slip"}).loss.cyclic_cross == 0


def test_what_a_fusion_defined_leaves_with_it(tmp_path):
    saved = load_config(write(tmp_path / "a.yaml", {}), flags={"model.fusion": "no-distill"})
    assert load_config(write(tmp_path / "b.yaml", saved.dump()), flags={"model.fusion": "full"}).loss.gram == 1.0


@pytest.mark.parametrize(
    ("fusion", "part"),
    [
        ("none", "student"),
        ("no-pyramid", "pyramid"),
        ("no-attention", "attention"),
        ("no-refiner", "refiner"),
        ("image-only", "text_side"),
        ("no-gate", "gate"),
    ],
)
def test_each_fusion_variant_takes_away_exactly_its_part(tmp_path, fusion, part):
    path = write(tmp_path / "pipe.yaml", {})
    parts = load_config(path, flags={"model.fusion": fusion}).model.parts.model_dump()
    assert [name for name, there in parts.items() if not there] == [part]


def test_controls_change_the_loss_or_the_targets_but_not_the_network(tmp_path):
    path = write(tmp_path / "pipe.yaml", {})
    full = load_config(path)
    silent = load_config(path, flags={"model.fusion": "no-distill"})
    shuffled = load_config(path, flags={"model.fusion": "shuffled-cache"})
    assert full.model.parts == silent.model.parts == shuffled.model.parts
    assert (silent.loss.gram, silent.loss.rkd, silent.loss.global_, silent.loss.kd, silent.loss.crd) == (0,) * 5
    assert shuffled.data.permute_targets
    assert not full.data.permute_targets


def test_a_saved_runs_parts_do_not_shine_through_another_fusion(tmp_path):
    first = load_config(write(tmp_path / "a.yaml", {}), flags={"model.fusion": "no-gate"})
    saved = write(tmp_path / "config.yaml", first.dump())
    assert load_config(saved, flags={"model.fusion": "full"}).model.parts.gate
    assert not load_config(saved).model.parts.gate


def test_all_problems_are_named_at_once_with_the_nearest_key():
    with pytest.raises(PipeError) as caught:
        validate({"train": {"ordr": 2, "lr": "fast"}, "modle": {}, "data": {"order": 1}})
    line = str(caught.value)
    assert line.startswith("4 problems")
    assert "train.ordr is unknown (nearest: train.order)" in line
    assert "modle is unknown (nearest: model)" in line
    assert "data.order is unknown (nearest: train.order)" in line
    assert "train.lr" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"train": {"batch_size": 1}}, "train.batch_size"),
        ({"data": {"val_fraction": 1.5}}, "data.val_fraction"),
        ({"data": {"source": ""}}, "data.source"),
        ({"loss": {"cross": float("nan")}}, "loss.cross"),
        ({"loss": {"gram": -1}}, "loss.gram"),
        ({"teacher": {"scales": []}}, "teacher.scales"),
        ({"teacher": {"scales": [{"name": "global", "layer": 1, "grid": 7}]}}, "teacher.scales.0.name"),
        ({"teacher": {"dtype": "int4"}}, "teacher.dtype"),
        ({"teacher": {"random_weights": True, "checkpoint": "x"}}, "teacher"),
        ({"train": {"precision": "fp8"}}, "train.precision"),
    ],
)
def test_a_value_out_of_bounds_names_its_key(values, key):
    with pytest.raises(PipeError, match=key.replace(".", r"\.")):
        validate(values)


def test_an_unquoted_no_is_a_precision_and_not_a_boolean(tmp_path):
    path = tmp_path / "pipe.yaml"
    path.write_text("train: {precision: no}\n")
    assert load_config(path).train.precision == "no"
    assert load_config(path, sets=["train.precision=no"]).train.precision == "no"
    with pytest.raises(PipeError, match=r"train\.precision"):
        load_config(path, sets=["train.precision=yes"])


def test_two_scales_of_one_name_are_refused():
    scale = {"name": "fine", "layer": 1, "grid": 7}
    with pytest.raises(PipeError, match="share a name"):
        validate({"teacher": {"scales": [scale, scale]}})


def test_the_dump_is_a_fixed_point(tmp_path):
    config = load_config(write(tmp_path / "pipe.yaml", {}), preset="small", flags={"train.method": "rankclip"})
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path).dump() == config.dump()


def test_yaml_paths_follow_the_file_and_set_paths_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    path = write(tmp_path / "there" / "pipe.yaml", {"workspace": "w", "data": {"source": "t/*.tar"}})
    monkeypatch.chdir(tmp_path)
    config = load_config(path, sets=["teacher.checkpoint=x.safetensors"])
    assert config.workspace == tmp_path / "there" / "w"
    assert config.data.source == str(tmp_path / "there" / "t" / "*.tar")
    assert config.teacher.checkpoint == tmp_path / "x.safetensors"


def test_addresses_are_not_paths(tmp_path):
    path = write(tmp_path / "pipe.yaml", {"data": {"source": "s3://bucket/x.tar"}})
    assert load_config(path).data.source == "s3://bucket/x.tar"


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path, text):
    path = tmp_path / "pipe.yaml"
    path.write_text(text)
    with pytest.raises(PipeError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_cannot_build_objects(tmp_path):
    path = tmp_path / "pipe.yaml"
    path.write_text("workspace: !!python/object/apply:os.system ['true']")
    with pytest.raises(PipeError, match="not valid YAML"):
        load_config(path)


def test_set_values_are_yaml():
    assert parse_set("train.betas=[0.9, 0.98]") == ("train.betas", [0.9, 0.98])
    assert parse_set("loss.list_depth=null") == ("loss.list_depth", None)
    with pytest.raises(PipeError, match=r"key\.path=value"):
        parse_set("train.lr")


def test_a_trunk_mapping_replaces_the_presets_whole_but_set_reaches_into_it(tmp_path):
    own = {"embed_dim": 8, "vision_cfg": {"layers": 2}, "text_cfg": {"width": 8}}
    path = write(tmp_path / "pipe.yaml", {"model": {"trunk": own}})
    assert load_config(path, preset="small").model.trunk == own
    changed = load_config(path, preset="small", sets=["model.trunk.vision_cfg.layers=3"])
    assert changed.model.trunk["vision_cfg"] == {"layers": 3}


def test_merge_leaves_its_arguments_alone():
    below = {"train": {"lr": 1}}
    merge(below, {"train": {"lr": 2}})
    assert below == {"train": {"lr": 1}}


def test_every_shipped_preset_method_and_fusion_resolves():
    for kind in ("methods", "fusion"):
        for path in (configs_folder() / kind).glob("*.yaml"):
            key = "train.method" if kind == "methods" else "model.fusion"
            section, name = key.split(".")
            assert getattr(getattr(load_config(None, flags={key: path.stem}), section), name) == path.stem
    for path in configs_folder().glob("*.yaml"):
        assert load_config(None, preset=path.stem).train.method == "dinorankclip"


def test_an_unknown_named_file_gets_the_nearest():
    with pytest.raises(PipeError, match="did you mean no-gate"):
        shipped("fusion", "nogate")


def test_the_default_is_the_papers_order_and_the_cc3m_recipe():
    config = Config()
    assert (config.train.order, config.train.method, config.model.trunk) == (3, "dinorankclip", "RN50")
    assert {"train.order", "loss.global", "teacher.scales"} <= set(known_keys())


def test_sections_that_are_no_mappings_are_refused_all_at_once(tmp_path):
    path = tmp_path / "pipe.yaml"
    path.write_text("train: [1]\nmodel: hello\nteacher: {scales: {a: 1}}\n")
    with pytest.raises(PipeError) as caught:
        load_config(path)
    assert all(key in str(caught.value) for key in ("train", "model", "teacher.scales"))


@pytest.mark.parametrize("value", ["0", "[]", "''", "5"])
def test_a_section_that_is_no_mapping_is_refused_wherever_it_comes_from(tmp_path, value):
    path = tmp_path / "pipe.yaml"
    path.write_text(f"data: {value}\n")
    with pytest.raises(PipeError, match="data: a mapping of keys"):
        load_config(path)
    with pytest.raises(PipeError, match="train: a mapping of keys"):
        load_config(None, sets=[f"train={value}"])


@pytest.mark.parametrize("section", ["data", "teacher", "model", "train", "loss", "evaluate"])
def test_an_empty_section_is_all_defaults(tmp_path, section):
    path = tmp_path / "pipe.yaml"
    path.write_text(f"{section}:\n  # everything is commented out\n")
    assert getattr(load_config(path), section) == getattr(load_config(None), section)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "pipe.yaml"
    with pytest.raises(PipeError, match="name stands twice"):
        load_config(None, sets=["teacher.scales=[{name: a, name: b, layer: 0, grid: 1}]"])
    path.write_text("train: {lr: 1.0e-3, lr: 2.0e-3}\n")
    with pytest.raises(PipeError, match=r"lr stands twice.*line 1"):
        load_config(path)
