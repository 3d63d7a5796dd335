"""Captions of generated scenes: true, compositional, and ambiguous as people's captions are.

A caption mentions some of the objects and some of their attributes, in one of several sentence forms and with one of
several words for the same thing. So one caption is true of many scenes and one scene has many captions: retrieval
cannot be perfect, and a model must learn which words matter.

    caption    = [opening] clause [background]
    clause     = phrase [place] | phrase relation phrase | list of phrases | count: list | count, among them list
    phrase     = "a" [size] [texture] [colour] noun ["with stripes"] | "something" colour
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.scenes import Dice, Scene, SceneObject

NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
}
GENERAL_NOUNS = ("shape", "thing", "object")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}  # medium goes without saying
TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
}
TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots", "checked": "with checks"}
COUNT_WORDS = {2: ("two shapes", "two things"), 3: ("three shapes", "three things"), 4: ("four shapes", "four things")}
OPENINGS = ("", "", "", "there is ", "a picture of ", "we see ", "a drawing of ")
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CAPTION_TRIES = 40


def captions(scene: Scene, count: int = 5) -> list[str]:
    """Up to `count` different captions of a scene, the same for the same scene every time; at least one."""
    dice = Dice(scene.seed, scene.index, 1)
    found: dict[str, None] = {}
    for _ in range(CAPTION_TRIES):
        found[_caption(scene, dice)] = None
        if len(found) == count:
            break
    return list(found)


def place_of(thing: SceneObject) -> str | None:
    """Where an object lies, in words; None where no word fits well."""
    left, right, top, bottom = thing.x < 0.37, thing.x > 0.63, thing.y < 0.37, thing.y > 0.63
    if not (left or right or top or bottom):
        return "in the middle"
    if (left or right) and (top or bottom):
        return f"at the {'top' if top else 'bottom'} {'left' if left else 'right'}"
    return f"on the {'left' if left else 'right'}" if left or right else f"at the {'top' if top else 'bottom'}"


def relation_of(one: SceneObject, other: SceneObject) -> str | None:
    """How `one` lies to `other`: left, right, above or below; None on a diagonal."""
    dx, dy = one.x - other.x, one.y - other.y
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _caption(scene: Scene, dice: Dice) -> str:
    clause = _clause(scene, dice)
    opening = dice.pick(OPENINGS) if clause.startswith(("a ", "an ", "one ")) else ""
    background = f" {dice.pick(('on', 'against'))} a {scene.background} background" if dice.chance(0.25) else ""
    return opening + clause + background


def _clause(scene: Scene, dice: Dice) -> str:
    things = _by_notice(scene.objects, dice)
    first = _phrase(things[0], dice)
    form = dice.pick(("one", "place", "two", "relation", "count"), (0.14, 0.16, 0.22, 0.30, 0.18))
    place = place_of(things[0])
    if form == "place" and place is not None:
        return f"{first} {place}"
    if len(things) == 1 or form == "one":
        return f"only {first}" if len(things) == 1 and dice.chance(0.3) else first
    second = _phrase(things[1], dice)
    relation = relation_of(things[0], things[1])
    if form == "relation" and relation is not None:
        return f"{first} {dice.pick(RELATIONS[relation])} {second}"
    if form == "count":
        number = dice.pick(COUNT_WORDS[len(things)])
        if len(things) == 2:
            return f"{number}: {first} and {second}"
        return f"{number}, one of them {first}" if dice.chance(0.5) else f"{number}, among them {first} and {second}"
    if len(things) > 2 and dice.chance(0.4):
        return f"{first}, {second} and {_phrase(things[2], dice)}"
    return f"{first} {dice.pick(('and', 'with'))} {second}"


def _by_notice(things: Sequence[SceneObject], dice: Dice) -> list[SceneObject]:
    """All objects in the order in which a writer names them: large ones tend to come first."""
    left = list(things)
    ordered = []
    while left:
        chosen = dice.pick(left, [thing.radius**1.5 for thing in left])
        left.remove(chosen)
        ordered.append(chosen)
    return ordered


def _phrase(thing: SceneObject, dice: Dice) -> str:
    """A noun phrase that is true of the object and names at least its colour or its shape."""
    if dice.chance(0.04):
        return f"something {thing.colour}"
    named = dice.chance(0.88)
    words = []
    if thing.size in SIZE_WORDS and dice.chance(0.3):
        words.append(dice.pick(SIZE_WORDS[thing.size]))
    tail = ""
    if dice.chance(0.12 if thing.texture == "plain" else 0.55):
        if thing.texture in TEXTURE_TAILS and dice.chance(0.3):
            tail = f" {TEXTURE_TAILS[thing.texture]}"
        else:
            words.append(dice.pick(TEXTURE_WORDS[thing.texture]))
    if dice.chance(0.75) or not named:
        words.append(thing.colour)
    words.append(dice.pick(NOUNS[thing.shape]) if named else dice.pick(GENERAL_NOUNS))
    article = "one" if dice.chance(0.1) else "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{tail}"
