"""Captions of generated scenes: true of what is drawn, ambiguous, and of many forms."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from pipeline.data.scene_captions import captions, place_of, relation_of
from pipeline.data.scene_files import ATTRIBUTES, PROMPTS
from pipeline.data.scenes import COLOURS, SceneObject, make_scene

SCENES = [make_scene(11, index) for index in range(150)]


def thing_at(x: float, y: float) -> SceneObject:
    return SceneObject("circle", "blue", "large", "plain", x, y, 0.2, 0.0, COLOURS["blue"])


# An independent reading of a noun phrase: which words a caption uses for what stands here once more, on purpose.
WORDS = {
    "size": {"small": "small little tiny", "large": "large big"},
    "texture": {"plain": "plain", "striped": "striped stripy stripes", "dotted": "dotted spotted dots"}
    | {"checked": "checked chequered checks"},
    "colour": {name: name for name in COLOURS},
    "shape": {"circle": "circle disc", "square": "square box", "triangle": "triangle", "star": "star"}
    | {"cross": "cross plus", "ring": "ring hoop", "heart": "heart", "moon": "moon crescent"},
}
MEANING = {
    word: (attribute, value) for attribute, of in WORDS.items() for value, all_ in of.items() for word in all_.split()
}
NOUN = "|".join([*" ".join(WORDS["shape"].values()).split(), "shape", "thing", "object"])
PHRASE = re.compile(
    rf"(?:an?|one)((?: [a-z]+){{0,3}}?) ({NOUN})(?: with (stripes|dots|checks))?\b|something ({'|'.join(COLOURS)})"
)
RELATION = re.compile(r" (?:to the )?(left of|right of|above|over|below|under) ")


def phrases(caption: str) -> list[dict[str, str]]:
    """The attributes that each noun phrase of a caption claims."""
    found = []
    for match in PHRASE.finditer(re.sub(r"a picture of |a drawing of |one of them ", "", caption)):
        words = [word for group in match.groups() if group for word in group.split()]
        found.append(dict(MEANING[word] for word in words if word not in ("shape", "thing", "object")))
    return found


def fits(thing: SceneObject, claims: dict[str, str]) -> bool:
    return all(getattr(thing, attribute) == value for attribute, value in claims.items())


ALL_CAPTIONS = [(scene, caption) for scene in SCENES for caption in captions(scene)]


def test_every_phrase_of_every_caption_is_true_of_some_object() -> None:
    for scene, caption in ALL_CAPTIONS:
        claims = phrases(caption)
        assert claims, caption
        for claim in claims:
            assert claim.keys() & {"shape", "colour"}, caption
            assert any(fits(thing, claim) for thing in scene.objects), caption


def test_relations_counts_places_and_backgrounds_are_true() -> None:
    seen: Counter[str] = Counter()
    for scene, caption in ALL_CAPTIONS:
        if match := RELATION.search(caption):
            seen["relation"] += 1
            first, second = phrases(caption)[:2]
            dx_dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "over": (0, -1)}
            sign = (dx_dy | {"below": (0, 1), "under": (0, 1)})[match[1]]
            pairs = [(a, b) for a in scene.objects for b in scene.objects if fits(a, first) and fits(b, second)]
            assert any((a.x - b.x) * sign[0] + (a.y - b.y) * sign[1] > 0 for a, b in pairs if a is not b), caption
        if match := re.match(r"(two|three|four) ", caption):
            seen["count"] += 1
            assert {"two": 2, "three": 3, "four": 4}[match[1]] == len(scene.objects)
        if caption.startswith("only "):
            seen["only"] += 1
            assert len(scene.objects) == 1
        if match := re.search(r"(on|against) a (\w+) background$", caption):
            seen["background"] += 1
            assert match[2] == scene.background
        if match := re.search(r"(at the|on the|in the) (top|bottom|left|right|middle)", caption):
            seen["place"] += 1
            where = {"top": (1, 0), "bottom": (1, 1), "left": (0, 0), "right": (0, 1)}.get(match[2])
            things = [thing for thing in scene.objects if fits(thing, phrases(caption)[0])]
            if where is not None:
                assert any((((t.x, t.y)[where[0]] > 0.5) == bool(where[1])) for t in things), caption
    assert min(seen[form] for form in ("relation", "count", "only", "background", "place")) > 5


def test_captions_are_several_different_and_reproducible() -> None:
    for scene in SCENES[:30]:
        found = captions(scene)
        assert len(set(found)) == len(found) == 5
        assert found == captions(scene)
        assert captions(scene, 2) == found[:2]


def test_captions_are_ambiguous_but_informative() -> None:
    """Most captions leave objects or attributes out, many are true of other scenes, and few of most."""
    others = [scene.objects for scene in SCENES]
    shares = []
    for _, caption in ALL_CAPTIONS[:300]:
        claims = phrases(caption)
        shares.append(np.mean([all(any(fits(t, claim) for t in objects) for claim in claims) for objects in others]))
    assert np.mean(np.array(shares) > 1.5 / len(SCENES)) > 0.3  # true of more than its own scene
    assert np.median(shares) < 0.1
    mentioned = [
        len(phrases(caption)) < len(scene.objects) for scene, caption in ALL_CAPTIONS if len(scene.objects) > 2
    ]
    assert 0.5 < np.mean(mentioned) < 1


def test_one_thing_is_called_by_several_words() -> None:
    text = " ".join(caption for _, caption in ALL_CAPTIONS).split()
    for attribute in ("shape", "texture", "size"):
        for words in WORDS[attribute].values():
            assert set(words.split()) <= set(text)


def test_places_and_relations_by_hand() -> None:
    a, b = (thing_at(x, y) for x, y in ((0.3, 0.5), (0.7, 0.55)))
    assert (place_of(a), place_of(b)) == ("on the left", "on the right")
    assert (relation_of(a, b), relation_of(b, a)) == ("left", "right")
    diagonal = thing_at(0.7, 0.9)
    assert relation_of(a, diagonal) is None
    assert place_of(thing_at(0.5, 0.5)) == "in the middle"
    assert place_of(diagonal) == "at the bottom right"


def test_prompts_use_only_words_that_captions_use() -> None:
    known = set(" ".join(caption for _, caption in ALL_CAPTIONS).split())
    for attribute, templates in PROMPTS.items():
        assert set(" ".join(t.replace("{c}", c) for t in templates for c in ATTRIBUTES[attribute]).split()) <= known
