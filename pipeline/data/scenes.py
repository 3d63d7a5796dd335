"""Generated images: scenes of one to four shapes, drawn with Pillow, every attribute known.

    scene = make_scene(seed=0, index=7)        # what is in it: shapes, colours, sizes, textures, places
    image = draw(scene)                        # (64, 64) RGB, antialiased
    labels = object_map(scene, 64)             # (64, 64) int: which object covers a pixel, -1 for the background

A scene is a function of (seed, index) alone, on every machine: only `random.Random(int).random()` is drawn from, whose
sequence Python guarantees. The style is no part of a scene: the same scene can be drawn in each, so that a benchmark
in a held-out style differs from its plain twin in nothing else.

Lengths are fractions of the image's side, x to the right, y down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLOURS = {
    "red": (224, 44, 44),
    "orange": (246, 138, 26),
    "yellow": (248, 214, 48),
    "green": (52, 166, 76),
    "blue": (44, 104, 226),
    "purple": (142, 68, 190),
    "pink": (246, 134, 184),
    "brown": (134, 84, 46),
}
BACKGROUNDS = {
    "white": (246, 244, 238),
    "grey": (178, 181, 186),
    "beige": (228, 212, 178),
    "dark": (42, 46, 60),
}
RADII = {"small": (0.105, 0.125), "medium": (0.14, 0.165), "large": (0.19, 0.23)}
SIZES = tuple(RADII)
COUNT_SHARES = (0.15, 0.35, 0.30, 0.20)  # of scenes with 1, 2, 3 and 4 objects

Style = Literal["plain", "sketch"]
STYLES: tuple[Style, ...] = ("plain", "sketch")

PAPER = (250, 248, 242)
SUPERSAMPLING = 3  # drawn at three times the side and averaged: smooth edges
GAP = 0.02  # between two objects' circles, and to the image's border
PLACING_TRIES = 200

Rgb = tuple[int, int, int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class SceneObject:
    """One shape: its named attributes, where it lies, and how exactly it is drawn."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    tilt: float  # degrees
    rgb: Rgb  # the named colour, slightly off

    def labels(self) -> dict[str, Any]:
        """JSON-able attributes."""
        names = {"shape": self.shape, "colour": self.colour, "size": self.size, "texture": self.texture}
        return names | {"x": round(self.x, 4), "y": round(self.y, 4), "radius": round(self.radius, 4)}


@dataclass(frozen=True)
class Scene:
    """Objects, the largest (the dominant one) first, on a background."""

    seed: int
    index: int
    objects: tuple[SceneObject, ...]
    background: str
    tint: tuple[Rgb, Rgb]  # the background's colour at the top and at the bottom

    @property
    def dominant(self) -> SceneObject:
        return self.objects[0]

    def labels(self) -> dict[str, Any]:
        """JSON-able ground truth."""
        return {
            "count": len(self.objects),
            "background": self.background,
            "dominant": self.dominant.labels(),
            "objects": [thing.labels() for thing in self.objects],
        }


class Dice:
    """Random choices that are the same in every Python version: all of them are made from `random()`."""

    def __init__(self, *key: int) -> None:
        folded = 0
        for part in key:
            if not 0 <= part < 2**32:
                raise ValueError(f"{part} is not in [0, 2^32)")
            folded = folded << 32 | part
        self._random = random.Random(folded)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def pick(self, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
        if weights is None:
            return items[int(self._random.random() * len(items))]
        left = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def order(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        return [item for _, item in sorted(((self._random.random(), i), item) for i, item in enumerate(items))]


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the endless series `seed`.

    One to four objects that do not touch, no two alike in both shape and colour. The dominant object is medium or
    large, the others are at least one size smaller. An object for which no place is left is dropped.

    Raises:
        ValueError: seed or index is outside [0, 2^32).
    """
    dice = Dice(seed, index, 0)
    count = dice.pick((1, 2, 3, 4), COUNT_SHARES)
    largest = dice.pick((1, 2), (0.3, 0.7))
    sizes = [SIZES[largest]] + [SIZES[dice.pick(range(largest))] for _ in range(count - 1)]
    objects: list[SceneObject] = []
    for size in sorted(sizes, key=SIZES.index, reverse=True):
        radius = dice.between(*RADII[size])
        place = _free_place(dice, radius, objects)
        if place is None:
            continue
        looks = (dice.pick(SHAPES), dice.pick(tuple(COLOURS)))
        while any(looks == (other.shape, other.colour) for other in objects):
            looks = (dice.pick(SHAPES), dice.pick(tuple(COLOURS)))
        texture, tilt = dice.pick(TEXTURES, (0.4, 0.2, 0.2, 0.2)), dice.between(-14, 14)
        rgb = _near(dice, COLOURS[looks[1]], 12)
        objects.append(SceneObject(*looks, size, texture, *place, radius, tilt, rgb))
    background = dice.pick(tuple(BACKGROUNDS))
    base = _near(dice, BACKGROUNDS[background], 8)
    return Scene(seed, index, tuple(objects), background, (base, _near(dice, base, 14)))


def _free_place(dice: Dice, radius: float, others: Sequence[SceneObject]) -> tuple[float, float] | None:
    margin = radius + GAP
    for _ in range(PLACING_TRIES):
        x, y = dice.between(margin, 1 - margin), dice.between(margin, 1 - margin)
        if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + GAP for o in others):
            return x, y
    return None


def _near(dice: Dice, rgb: Rgb, spread: int) -> Rgb:
    red, green, blue = (min(255, max(0, round(value + dice.between(-spread, spread)))) for value in rgb)
    return red, green, blue


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene, *, size: int = 64, style: Style = "plain") -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels.

    Styles: `plain`, filled shapes with a darker rim on a softly shaded background; `sketch` (held out from all
    training), outlines and hatching in the objects' colours on white paper.
    """
    side = size * SUPERSAMPLING
    canvas = _background(scene, side) if style == "plain" else Image.new("RGB", (side, side), PAPER)
    for thing in scene.objects:
        mask, corner = _shape_mask(thing, side)
        rim = 2 * round(side / 150) + 1  # a filter's width, odd; the rim is half of it
        if style == "plain":
            inner = mask.filter(ImageFilter.MinFilter(rim))
            canvas.paste(_mixed(thing.rgb, (20, 20, 30), 0.45), corner, mask)
            canvas.paste(thing.rgb, corner, inner)
            pattern = _pattern(thing, mask.size[0], side, thin=False)
            canvas.paste(_second_tone(thing.rgb), corner, ImageChops.multiply(inner, pattern))
        else:
            inner = mask.filter(ImageFilter.MinFilter(2 * rim + 1))
            pattern = _pattern(thing, mask.size[0], side, thin=True)
            strokes = ImageChops.lighter(ImageChops.subtract(mask, inner), ImageChops.multiply(inner, pattern))
            canvas.paste(_mixed(thing.rgb, (20, 20, 30), 0.12), corner, strokes)
    return canvas.reduce(SUPERSAMPLING)


def object_map(scene: Scene, side: int) -> NDArray[np.int64]:
    """(side, side) int64: the number of the object that covers a pixel, -1 where there is background."""
    found = Image.new("L", (side, side), 0)
    for number, thing in enumerate(scene.objects, start=1):
        mask, corner = _shape_mask(thing, side)
        found.paste(number, corner, mask)
    return np.asarray(found, dtype=np.int64) - 1


def patch_labels(scene: Scene, grid: int, *, resolution: int = 16) -> NDArray[np.int64]:
    """(grid, grid) int64: the object that covers most of a patch, where it covers at least a quarter of it; else -1."""
    pixels = object_map(scene, grid * resolution).reshape(grid, resolution, grid, resolution)
    shares = np.stack([(pixels == number).mean(axis=(1, 3)) for number in range(len(scene.objects))])
    return np.where(shares.max(axis=0) >= 0.25, shares.argmax(axis=0), -1)


def _background(scene: Scene, side: int) -> Image.Image:
    top, bottom = (Image.new("RGB", (side, side), rgb) for rgb in scene.tint)
    return Image.composite(bottom, top, Image.linear_gradient("L").resize((side, side)))


def _mixed(rgb: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(rgb, other, strict=True))
    return red, green, blue


def _second_tone(rgb: Rgb) -> Rgb:
    """Of a texture: lighter for dark colours, darker for light ones."""
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 150
    return _mixed(rgb, (30, 20, 20), 0.5) if light else _mixed(rgb, (255, 255, 255), 0.72)


def _shape_mask(thing: SceneObject, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The shape as a mask (255 inside) of its bounding box, and that box's upper left corner on the canvas."""
    reach = math.ceil(thing.radius * side) + 1
    middle = (round(thing.x * side), round(thing.y * side))
    mask = Image.new("L", (2 * reach + 1, 2 * reach + 1), 0)
    pen = ImageDraw.Draw(mask)
    radius = thing.radius * side

    def disc(x: float, y: float, r: float, value: int) -> None:
        box = [reach + x * radius - r * radius, reach + y * radius - r * radius]
        pen.ellipse([round(v) for v in (*box, box[0] + 2 * r * radius, box[1] + 2 * r * radius)], fill=value)

    if thing.shape in ("circle", "ring", "moon"):
        disc(0, 0, 1, 255)
        if thing.shape == "ring":
            disc(0, 0, 0.5, 0)
        elif thing.shape == "moon":
            turn = math.radians(thing.tilt)
            disc(0.55 * math.cos(turn), 0.55 * math.sin(turn) - 0.12, 0.82, 0)
    else:
        cos, sin = math.cos(math.radians(thing.tilt)), math.sin(math.radians(thing.tilt))
        outline = [(x * cos - y * sin, x * sin + y * cos) for x, y in POLYGONS[thing.shape]]
        pen.polygon([(round(reach + x * radius), round(reach + y * radius)) for x, y in outline], fill=255)
    return mask, (middle[0] - reach, middle[1] - reach)


def _pattern(thing: SceneObject, width: int, side: int, *, thin: bool) -> Image.Image:
    """Where the second tone goes (255), over a square of `width` pixels; `thin`: with the strokes of a sketch."""
    pattern = Image.new("L", (width, width), 0)
    pen = ImageDraw.Draw(pattern)
    unit = side / 64  # one pixel of a 64-pixel image
    if thing.texture == "striped":
        step = round(5.5 * unit)
        lean = round(width * math.tan(math.radians(20 + thing.tilt)))
        for x in range(-abs(lean), width + abs(lean), step):
            pen.line([(x, 0), (x + lean, width)], fill=255, width=round((1.2 if thin else 2.6) * unit))
    elif thing.texture == "dotted":
        step, r = round(5.6 * unit), round((1.0 if thin else 1.55) * unit)
        for row, y in enumerate(range(step // 2, width + step, step)):
            for x in range(0 if row % 2 else step // 2, width + step, step):
                pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
    elif thing.texture == "checked":
        step = round(4.4 * unit)
        for row, y in enumerate(range(0, width, step)):
            if thin:
                pen.line([(0, y), (width, y)], fill=255, width=round(1.0 * unit))
                pen.line([(y, 0), (y, width)], fill=255, width=round(1.0 * unit))
                continue
            for x in range(0 if row % 2 else step, width, 2 * step):
                pen.rectangle([x, y, x + step - 1, y + step - 1], fill=255)
    return pattern


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    turns = [math.pi * k / points for k in range(2 * points)]
    radii = [inner if k % 2 else 1.0 for k in range(2 * points)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]


def _heart(steps: int = 40) -> list[tuple[float, float]]:  # x = sin³ t, and y below
    turns = [2 * math.pi * k / steps for k in range(steps)]
    down = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17 for t in turns]
    return [(math.sin(t) ** 3, y) for t, y in zip(turns, down, strict=True)]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turned = [quarter, [(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
    return [(0.94 * x, 0.94 * y) for part in turned for x, y in part]


POLYGONS = {
    "square": [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)],
    "triangle": [(0.0, -1.0), (0.94, 0.7), (-0.94, 0.7)],
    "star": _star(5, 0.42),
    "cross": _cross(0.36),
    "heart": _heart(),
}
