"""Which captions a sample has: a text file's, then a JSON file's `captions` or `caption`; each once, in this order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

MAX_CAPTION_BYTES = 2**20  # of a text or JSON file; the longest alt texts have some ten thousand

MISSING, EMPTY = "caption_missing", "caption_empty"
UNDECODABLE, TOO_LARGE = "caption_undecodable", "caption_too_large"
_WORST_FIRST = (UNDECODABLE, TOO_LARGE, EMPTY, MISSING)


@dataclass(frozen=True)
class Captions:
    """Usable captions; `status` says why there is none ("" if there is one); `reason` tells what was passed over."""

    texts: list[str]
    status: str
    reason: str


def read_captions(text: bytes | None, json_text: bytes | None) -> Captions:
    """Captions of an img2dataset or cc3m-wds sample.

    Args:
        text: content of key.txt, the first caption; None if there is no such file.
        json_text: content of key.json; None if there is no such file.
    """
    found: list[str | None] = []
    problems: list[tuple[str, str]] = []
    if text is not None:
        if len(text) > MAX_CAPTION_BYTES:
            problems.append((TOO_LARGE, f"the text has {len(text):,} bytes"))
        else:
            found.append(_decode(text))
    if json_text is not None:
        if len(json_text) > MAX_CAPTION_BYTES:
            problems.append((TOO_LARGE, f"the JSON has {len(json_text):,} bytes"))
        else:
            of_json, problem = _of_json(json_text)
            found += of_json
            problems += [(UNDECODABLE, problem)] if problem else []
    return collect_captions(found, problems)


def collect_captions(found: Iterable[str | None], problems: Iterable[tuple[str, str]] = ()) -> Captions:
    """Strip, drop what is empty or not UTF-8 (None, or lone surrogates), and keep each caption once, in order."""
    texts: dict[str, None] = {}
    problems = list(problems)
    any_found = False
    for caption in found:
        any_found = True
        if caption is None or not _encodable(caption):
            problems.append((UNDECODABLE, "a caption is not UTF-8"))
        elif not any(c.isprintable() and not c.isspace() for c in caption):
            problems.append((EMPTY, "a caption is empty"))
        else:
            texts[caption.strip()] = None
    if not any_found and not problems:
        problems.append((MISSING, "no caption"))
    status = "" if texts else min((kind for kind, _ in problems), key=_WORST_FIRST.index)
    return Captions(list(texts), status, "; ".join(dict.fromkeys(reason for _, reason in problems)))


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON's \ud83d without its other half, or a table's byte that is not UTF-8
        return False
    return True


def _of_json(data: bytes) -> tuple[list[str | None], str]:
    text = _decode(data)
    if text is None:
        return [None], ""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return [], "the JSON is not valid"
    if not isinstance(stored, dict):
        return [], "the JSON is not an object"
    listed = stored.get("captions")
    values = [*(listed if isinstance(listed, list) else [listed]), stored.get("caption")]
    wrong = any(value is not None and not isinstance(value, str) for value in values)
    return [value for value in values if isinstance(value, str)], "a caption in the JSON is not text" if wrong else ""
