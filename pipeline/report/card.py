"""The model card of an exported folder: what a stranger has to know, from what the run recorded.

Nothing is claimed that no file says. What is not recorded is called so; what only its maker can know (licence, data,
intended use) is left to be filled in, marked TO FILL IN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.records import VERSUS, Record, headline_node
from pipeline.report.text import compact, duration

UNKNOWN = "not recorded"
FILL_IN = "TO FILL IN"
SHOWN = ("recall@1", "recall@5", "recall@10", "top1", "top5")  # endings of the metrics that a card shows
TAGS = ("clip", "contrastive", "image-text", "dinorankclip")


def model_card(config: Mapping[str, Any], results: Sequence[Record] = (), other_results: bool = False) -> str:
    """README.md of an exported model.

    Args:
        config: what config.json holds (models.export.model_config).
        results: records of this very checkpoint.
        other_results: the report holds results of a run of this name, but of another checkpoint.
    """
    name = config.get("name") or "model"
    sections = [
        _front_matter("dinorankclip", TAGS),
        f"# {name}\n\n{_what(config)}",
        f"## Use\n\n{_use()}",
        f"## Training\n\n{_table(training_facts(config))}\n\n{_data(config)}",
        f"## Results\n\n{results_text(results, other_results)}{_stored(config)}",
        f"## Limitations\n\n{limitations(config)}",
    ]
    return "\n\n".join(sections) + "\n"


def trunk_card(config: Mapping[str, Any], results: Sequence[Record] = (), other_results: bool = False) -> str:
    """README.md of a trunk that was exported as an open_clip checkpoint; arguments as for `model_card`.

    Of the checkpoint's results those at the node `trunk` are this trunk's own.
    """
    name = config.get("name") or "model"
    what = (
        f"The trunk of {name} as an open_clip checkpoint: {_trunk(config)}, {config['embed_dim']} dimensions, images "
        f"of {config['preprocess']['view']['size']} px, texts of up to {config['tokenizer']['context_length']} tokens."
    )
    if _injected(config):
        what += (
            "\n\nIt is not the whole model: that one adds, to what this trunk sees, what a distilled student sees "
            "(a fusion and a gate on each side). A trunk comes to rely on what is added while it is trained, so that "
            "alone it can be much worse than a plain CLIP trained by itself. No result of the whole model holds for it."
        )
    use = """```python
import open_clip

folder = "local-dir:FOLDER"  # this folder; once pushed: hf-hub:ORG/NAME
model, _, preprocess = open_clip.create_model_and_transforms(folder)
tokenizer = open_clip.get_tokenizer(folder)
```"""
    sections = [
        _front_matter("open_clip", TAGS),
        f"# {name}: trunk\n\n{what}",
        f"## Use\n\n{use}",
        f"## Training\n\n{_table(training_facts(config))}\n\n{_data(config)}",
        f"## Results\n\n{results_text(results, other_results, node='trunk')}{_stored(config)}",
        f"## Limitations\n\n{limitations(config)}",
    ]
    return "\n\n".join(sections) + "\n"


def own_results(records: Iterable[Record], run: str, checkpoint_sha256: str) -> tuple[list[Record], bool]:
    """(records of this run and checkpoint, whether there are any of the run's name but of another checkpoint)."""
    named = [record for record in records if record.run == run]
    own = [record for record in named if record.checkpoint_sha256 == checkpoint_sha256]
    return own, bool(named) and not own


def _front_matter(library: str, tags: Sequence[str]) -> str:
    """The hub's YAML. `other` is the hub's word for a licence that is not on its list."""
    lines = ["---", f"license: other  # {FILL_IN}: an identifier of the hub's list, or keep `other` and name it below"]
    lines += ["license_name: unspecified", f"library_name: {library}"]
    lines += ["pipeline_tag: zero-shot-image-classification", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _what(config: Mapping[str, Any]) -> str:
    fusion = config.get("fusion") or UNKNOWN
    order = UNKNOWN if config.get("order") is None else config["order"]
    text = (
        f"An image-text dual encoder: {_trunk(config)}, {config['embed_dim']} dimensions, "
        f"{compact(config['parameters']['total'])} parameters, images of "
        f"{config['preprocess']['view']['size']} px, texts of up to {config['tokenizer']['context_length']} tokens. "
        f"Method `{config.get('method') or UNKNOWN}`, order of the ranking loss {order}, fusion `{fusion}` "
        "(DINORANKCLIP, arXiv 2605.06592, an independent implementation)."
    )
    teacher = config.get("teacher")
    if teacher is None:
        return text
    distilled = "with its features as targets" if teacher.get("distils") else "without targets (a control)"
    if teacher.get("permuted"):
        distilled = "with the features of other images as targets (a control)"
    return f"{text}\nThe student was trained {distilled}; teacher: `{teacher.get('name') or UNKNOWN}`, not needed here."


def _use() -> str:
    return """```python
from PIL import Image
from pipeline.models.dinorankclip import load

model, preprocess, tokenizer = load("FOLDER")  # this folder; offline, without teacher or cache
image = model.encode_image(preprocess(Image.open("photo.jpg"))[None])  # (1, D), unit norm
texts = model.encode_text(tokenizer(["a red bus", "a green field"]))   # (2, D), unit norm
probabilities = (model.trunk.scale() * image @ texts.T).softmax(-1)
```

`encode_image` and `encode_text` have open_clip's signatures. `load` comes with the package `dinorankclip`. Many images
at once: `pipe embed FOLDER SOURCE`."""


def training_facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the training, in reading order; every one that was recorded, and what was not."""
    training, data = config.get("training") or {}, config.get("data") or {}

    def shown(value: Any, form: str = "{:,}") -> str:
        return UNKNOWN if value is None else form.format(value)

    seconds = training.get("seconds")
    return [
        ("training rows: an image and its captions", shown(data.get("train_rows"))),
        ("pairs seen", shown(training.get("samples_seen"))),
        ("steps", shown(training.get("steps"))),
        ("batch size", shown(training.get("batch_size"))),
        ("learning rate (peak), weight decay", f"{shown(training.get('lr'), '{:g}')}, {_g(training, 'weight_decay')}"),
        ("warm-up steps", shown(training.get("warmup_steps"))),
        ("augmentation", shown(training.get("augmentation"), "{}")),
        ("started from", shown(training.get("started_from"), "{}")),
        ("trunk", "frozen" if training.get("trunk_frozen") else "trained"),
        ("seed", shown(config.get("seed"), "{}")),
        ("time", UNKNOWN if seconds is None else duration(seconds)),
        ("machine", f"{shown(training.get('world_size'), '{} ×')} {shown(training.get('machine'), '{}')}"),
        ("precision", "float32" if training.get("precision") == "no" else shown(training.get("precision"), "{}")),
        ("code", shown(config.get("code_version"), "{}")),
    ]


def _g(values: Mapping[str, Any], key: str) -> str:
    return UNKNOWN if values.get(key) is None else f"{values[key]:g}"


def _data(config: Mapping[str, Any]) -> str:
    fingerprint = (config.get("data") or {}).get("manifest_fingerprint")
    known = f"the list of samples has the fingerprint `{fingerprint}`" if fingerprint else "nothing is recorded of it"
    return (
        f"{FILL_IN}: which data these are, their language, their terms. The run knows its data by number only; {known}."
    )


def results_text(results: Sequence[Record], other: bool, node: str | None = None) -> str:
    """A table of the headline metrics at a node (None: the model's output), or why there is none."""
    node = node or headline_node(record.node for record in results)
    kept = [r for r in results if r.node == node and VERSUS not in r.metric and r.metric.endswith(SHOWN)]
    if not kept:
        other_note = " The report at hand is of another checkpoint of this run's name." if other else ""
        return f"None: this checkpoint was not evaluated when it was exported.{other_note}"
    rows = ["| benchmark | split | metric | % | 95 % interval | items |", "| --- | --- | --- | --- | --- | --- |"]
    for r in sorted(kept, key=lambda r: (r.benchmark, r.split, _reading_order(r.metric))):
        between = "–" if r.low is None or r.high is None else f"{100 * r.low:.1f} to {100 * r.high:.1f}"
        rows.append(f"| {r.benchmark} | {r.split} | {r.metric} | {100 * r.value:.1f} | {between} | {r.n:,} |")
    note = f"At the node `{node}`, one run; intervals: bootstrap over the test items, not over trainings."
    return "\n".join(rows) + f"\n\n{note}"


def _stored(config: Mapping[str, Any]) -> str:
    dtype = config["weights"]["dtype"]
    return "" if dtype == "float32" else f"\n\nThese weights are stored in {dtype}; results are of the ones in float32."


def _reading_order(metric: str) -> tuple[str, int]:
    name, _, number = metric.rpartition("@")
    return (name or metric, int(number) if name else 0)


def limitations(config: Mapping[str, Any]) -> str:
    """What holds of any such model, with this one's numbers."""
    crop, length = config["preprocess"]["view"]["kind"] == "crop", config["tokenizer"]["context_length"]
    lines = [
        "- It sees a square at an image's centre; what lies outside of it is invisible to it."
        if crop
        else "- It sees images squashed to a square: shapes are distorted.",
        f"- Texts are cut after {length} tokens, start and end mark included.",
        "- Nothing was measured about fairness, safety, or harmful associations; do not rely on it where they matter.",
        "- How good it is, is known as far as results stand above, and no further.",
        f"- {FILL_IN}: intended use, and uses that are out of scope.",
    ]
    return "\n".join(lines)


def _table(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in facts)])


def _trunk(config: Mapping[str, Any]) -> str:
    """The trunk's open_clip name, or its family where it was configured by hand."""
    trunk = config["arguments"]["trunk"]
    if isinstance(trunk, str):
        return f"open_clip's {trunk}"
    vision = trunk["vision_cfg"]
    if vision.get("timm_model_name"):
        return f"timm's {vision['timm_model_name']}"
    family = "a ResNet" if isinstance(vision.get("layers"), (list, tuple)) else "a ViT"
    return f"{family} of open_clip's kind"


def _injected(config: Mapping[str, Any]) -> bool:
    return config["arguments"].get("student") is not None
