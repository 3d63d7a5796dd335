"""The configuration of an experiment: the order in which layers override each other, and the errors they give.

    defaults < preset < YAML < method and fusion files < flags and --set

Unknown keys are refused with the nearest valid name, and all problems are reported at once. Only `stages` reads this
module: the library's parts take plain arguments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config_files import configs_folder, read_yaml, safe_yaml, shipped
from pipeline.config_schema import Config, ModelConfig, TrainConfig
from pipeline.console import log
from pipeline.errors import PipeError

__all__ = ["Config", "configs_folder", "load_config", "shipped", "validate"]

TERMS_OF_METHODS = ("contrastive", "cyclic_in_modal", "cyclic_cross", "simclr")  # what a method adds to CLIP's loss
REPLACED_WHOLE = {"trunk", "model_args", "scales"}  # a preset's trunk must not shine through a user's own
PATH_KEYS = (
    ("workspace",),
    ("data", "source"),
    ("data", "val_source"),
    ("data", "cache"),
    ("teacher", "checkpoint"),
    ("model", "init"),
    ("loss", "text_projection"),
    ("evaluate", "datasets"),
)


def load_config(
    path: Path | None, *, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = (), preset: str | None = None
) -> Config:
    """Resolve a configuration.

    Args:
        path: the YAML file; None uses preset and flags alone.
        flags: dotted key → value, for the command's own options (None values are left out).
        sets: `key.path=value` strings; the value is YAML.
        preset: a file of configs/.

    Raises:
        PipeError: naming every problem, each with its key and the nearest valid name.
    """
    base = path.parent if path is not None else Path.cwd()
    layers = [shipped("", preset) if preset else {}, read_yaml(path) if path is not None else {}]
    chosen: dict[str, Any] = {"workspace": str(base / Config().workspace)}
    for layer in layers:
        written = {key: value for key, value in layer.items() if value is not None or key not in _sections()}
        chosen = merge(chosen, _absolute_paths(written, base))  # an empty section says nothing
    explicit: dict[str, Any] = {}
    for key, value in (flags or {}).items():
        if value is not None:
            put(explicit, key, value)
    for item in sets:
        key, value = parse_set(item)
        put(explicit, key, value)
    explicit = _absolute_paths(explicit, Path.cwd())
    for values in (chosen, explicit):
        if any(not isinstance(values.get(name, {}), dict) for name in _sections()):
            return validate(values, where=path)  # refuses them, before method and fusion are laid over such a section
    chosen = _apply_named_files(chosen, explicit)
    return validate(merge(chosen, explicit, whole=False), where=path)


def _sections() -> list[str]:
    """The keys of a configuration that are mappings of keys: data, teacher, model, train, loss, evaluate, caption."""
    kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _apply_named_files(chosen: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    method = _get(explicit, "train.method") or _get(chosen, "train.method") or TrainConfig().method
    method_file = shipped("methods", str(method))
    of_yaml = chosen
    chosen = merge(chosen, {"data": {"permute_targets": False}})
    if isinstance(chosen.get("model"), dict):  # a saved run's YAML lists its parts; the fusion asked for now decides
        chosen["model"].pop("parts", None)
    _refuse_contradiction(str(method), method_file, explicit)
    # A YAML's own method and fusion decide the keys that their files set; when others are asked for, those keys leave.
    written = {kind: _get(chosen, key) for kind, key in (("methods", "train.method"), ("fusion", "model.fusion"))}
    if isinstance(written["methods"], str) and written["methods"] != method:
        chosen = _without(chosen, shipped("methods", written["methods"]))
    elif written["methods"] == method:
        _say_overridden(of_yaml, method_file, explicit, f"method {method}")
    chosen = merge(chosen, method_file)
    fusion = _get(explicit, "model.fusion") or _get(chosen, "model.fusion") or ModelConfig().fusion
    if isinstance(written["fusion"], str) and written["fusion"] != fusion:
        chosen = _without(chosen, shipped("fusion", written["fusion"]))
    fusion_file = shipped("fusion", str(fusion))
    if written["fusion"] == fusion:
        _say_overridden(of_yaml, fusion_file, explicit, f"fusion {fusion}")
    chosen = merge(chosen, fusion_file)
    put(chosen, "train.method", method)
    put(chosen, "model.fusion", fusion)
    return chosen


def _say_overridden(
    written: Mapping[str, Any], file: Mapping[str, Any], explicit: Mapping[str, Any], by: str, above: str = ""
) -> None:
    """Warn of every value of a YAML that its own method or fusion replaces: --set is the way to vary them."""
    for key, value in file.items():
        dotted = f"{above}{key}"
        if isinstance(value, Mapping):
            if isinstance(below := written.get(key), Mapping):
                _say_overridden(below, value, explicit, by, f"{dotted}.")
        elif key in written and written[key] != value and _get(explicit, dotted) is None:
            log.warning(
                "%s: %s in the YAML is replaced by %s of %s (vary it with --set)", dotted, written[key], value, by
            )


def _without(values: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """`values` less the keys that `file` sets."""
    out = {}
    for key, value in values.items():
        there = file.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            out[key] = _without(value, there)
        elif key not in file:
            out[key] = value
    return out


def _refuse_contradiction(method: str, method_file: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    """Order and fusion are what a method *is*; its other keys may be varied on purpose with --set."""
    for key in ("train.order", "model.fusion"):
        fixed, asked = _get(method_file, key), _get(explicit, key)
        if fixed is None or asked is None or fixed == asked:
            continue
        order = _get(explicit, "train.order")
        order = _get(method_file, "train.order") if order is None else order
        fusion = _get(explicit, "model.fusion") or _get(method_file, "model.fusion")
        terms = {name: value for name in TERMS_OF_METHODS if (value := _get(method_file, f"loss.{name}")) is not None}
        added = "".join(f" --set loss.{name}={value}" for name, value in terms.items())
        raise PipeError(
            f"method {method} has {key.split('.')[1]} {fixed}, not {asked}",
            where=key,
            fix=f"use: pipe train --method dinorankclip --order {order} --fusion {fusion}{added}",
        )


def validate(values: Mapping[str, Any], *, where: Path | None = None) -> Config:
    """Check all keys and values at once."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_problem(dict(item)) for item in error.errors()]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PipeError(
            f"{count} in the configuration: {' | '.join(problems)}", where=where, fix="correct the file or the --set"
        ) from None


def _problem(item: dict[str, Any]) -> str:
    names = [part for part in item["loc"] if not (isinstance(part, str) and re.search(r"[\[(]|^(str|int|dict)$", part))]
    key = ".".join(str(part) for part in names)
    if item["type"] == "extra_forbidden":
        return f"{key} is unknown{_nearest_key(key)}"
    shown = repr(item.get("input"))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type":  # pydantic would name our class
        message = "a mapping of keys to values is needed"
    return f"{key or 'file'}: {message[0].lower()}{message[1:]}" + (f" (got {shown})" if len(shown) < 60 else "")


def known_keys() -> list[str]:
    """Every dotted key of the configuration."""

    def walk(model: type[BaseModel], prefix: str) -> list[str]:
        keys: list[str] = []
        for name, field in model.model_fields.items():
            key = prefix + (field.alias or name)
            keys.append(key)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                keys += walk(field.annotation, key + ".")
        return keys

    return walk(Config, "")


def _nearest_key(key: str) -> str:
    keys = known_keys()
    last = key.split(".")[-1]
    by_last = [k for k in keys if k.split(".")[-1] == last]  # right name in the wrong section
    found = by_last or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else ""


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """`above` laid over `below`; with `whole`, the keys in REPLACED_WHOLE are not mixed but replaced."""
    out = dict(below)
    for key, value in above.items():
        mixes = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        if mixes and not (whole and key in REPLACED_WHOLE):
            out[key] = merge(out[key], value, whole=whole)
        elif value is None and isinstance(out.get(key), Mapping) and key in Config.model_fields:
            continue  # `train:` with nothing below it
        else:
            out[key] = value
    return out


def parse_set(item: str) -> tuple[str, Any]:
    """`train.lr=3e-4` → ("train.lr", "3e-4" parsed as YAML)."""
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise PipeError(f"--set takes key.path=value, not {item!r}", fix="for example --set train.lr=3e-4")
    try:
        return key.strip(), safe_yaml(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise PipeError(f"the value of --set {key} is not valid YAML ({reason})", where=value) from error


def _get(values: Mapping[str, Any], dotted: str) -> Any:
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key, making the sections on the way."""
    *parents, last = dotted.split(".")
    node = values
    for part in parents:
        child = node.get(part)
        node[part] = dict(child) if isinstance(child, Mapping) else {}
        node = node[part]
    node[last] = value


def _absolute_paths(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Paths in a YAML are relative to its folder, paths in --set to the current one; addresses (s3://) stay."""
    out = merge(values, {})
    for keys in PATH_KEYS:
        value = _get(out, ".".join(keys))
        if isinstance(value, str) and value and "://" not in value:
            put(out, ".".join(keys), str((base / Path(value).expanduser()).absolute()))
    for key, start in (("teacher.name", "hf:"), ("caption.model", "hf:"), ("caption.model", "")):
        name = _get(out, key)
        if isinstance(name, str) and name.startswith((f"{start}.", f"{start}~")):  # ORG/NAME is a repository
            put(out, key, f"{start}{(base / Path(name.removeprefix(start)).expanduser()).absolute()}")
    return out
