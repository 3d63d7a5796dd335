"""The YAML files that a configuration is made of: the user's own, and those that are shipped in configs/."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import PipeError


def configs_folder() -> Path:
    """`pipeline/configs` in an installed wheel, `configs/` in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def shipped(kind: str, name: str) -> dict[str, Any]:
    """The mapping in configs/[kind/]name.yaml; an unknown name is refused with the nearest one.

    Args:
        kind: "" for presets, else "methods", "fusion" or "suites".
    """
    folder = configs_folder() / kind
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    label = {"": "preset", "methods": "method", "fusion": "fusion", "suites": "suite"}[kind]
    if name not in known:
        raise PipeError(f"there is no {label} {name!r}", fix=f"{nearest(name, known)}choose one of {', '.join(known)}")
    return read_yaml(folder / f"{name}.yaml")


def safe_yaml(text: str) -> Any:
    """`yaml.safe_load`, refusing a key that comes twice in one mapping, of which YAML silently takes the last."""
    nodes, met = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in met:  # an alias, perhaps of what it stands in
            continue
        met.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
                nodes.append(value)
    return yaml.safe_load(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; anything else is one clear line."""
    try:
        loaded = safe_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PipeError("there is no such config file", where=path, fix="write one: pipe init --data SOURCE") from error
    except IsADirectoryError as error:
        raise PipeError("this is a folder, not a YAML file", where=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipeError(f"not valid YAML ({' '.join(str(error).split())})", where=path) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise PipeError("a config must be a mapping of keys to values", where=path)
    return loaded


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean X? `, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]}? " if found else ""
