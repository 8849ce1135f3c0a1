"""Scenes of one to three coloured shapes on a grey background, drawn from a seed.

A scene is a value: everything that can be asked about it (how many things, how large, where) is read off
the dataclass, never off its pixels. `draw` turns it into a 64 x 64 picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIDE = 64  # pixels; the tiny model's input size, so nothing is ever resized
SUPERSAMPLE = 3  # shapes are drawn three times as large and averaged down, for smooth edges

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "orange": (250, 130, 20),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
    "cyan": (60, 205, 220),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 6.0, "medium": 10.0, "large": 14.5}  # radius in pixels
BACKGROUNDS = {"dark": 40, "grey": 125, "light": 210}  # grey level
COUNTS = (1, 2, 3)
SHARE_ALIKE = 0.7  # how often all things of a scene share shape, colour, texture and size


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y` are the centre and `radius` the extent, in pixels; y grows downwards."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def looks(self) -> tuple[str, str, str, str]:
        return self.size, self.texture, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """One to three things that do not overlap, on a grey background of one brightness.

    gain: the light on everything; each pixel is this many times as bright as colours and level say.
    """

    things: tuple[Thing, ...]
    background: str
    level: int
    gain: float = 1.0

    @property
    def alike(self) -> bool:
        """Whether all things look the same, so that "two small red stars" describes them all."""
        return len({thing.looks for thing in self.things}) == 1

    @property
    def position(self) -> str | None:
        """Where the only thing stands; None when there are several, or when it stands in between."""
        if len(self.things) != 1:
            return None
        dx, dy = (self.things[0].x - SIDE / 2, self.things[0].y - SIDE / 2)
        if max(abs(dx), abs(dy)) < 5:
            return "middle"
        if abs(dx) > abs(dy) + 4:
            return "left" if dx < 0 else "right"
        if abs(dy) > abs(dx) + 4:
            return "top" if dy < 0 else "bottom"
        return None


def sample(rng: np.random.Generator, count: int | None = None, alike: bool | None = None) -> Scene:
    """A random scene: every attribute uniform, count included unless it is given."""
    count = count or int(rng.choice(COUNTS))
    alike = rng.random() < SHARE_ALIKE if alike is None else alike
    looks = [_looks(rng)] * count if alike else [_looks(rng) for _ in range(count)]
    radii = [SIZES[size] * rng.uniform(0.92, 1.08) for size, *_ in looks]
    centres = _place(radii, rng)
    background = str(rng.choice(list(BACKGROUNDS)))
    level = BACKGROUNDS[background] + int(rng.integers(-25, 26))
    things = [
        Thing(shape, colour, texture, size, x, y, radius)
        for (size, texture, colour, shape), (x, y), radius in zip(looks, centres, radii)
    ]
    return Scene(tuple(things), background, level)


def _looks(rng: np.random.Generator) -> tuple[str, str, str, str]:
    return tuple(str(rng.choice(list(values))) for values in (SIZES, TEXTURES, COLOURS, SHAPES))


def _place(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres inside the picture, apart from one another: by rejection, or in quadrants when it is tight."""
    if len(radii) == 1 and rng.random() < 0.2:  # the middle is a place too, and rare by chance
        return [tuple(SIDE / 2 + rng.uniform(-4, 4, size=2))]
    for _ in range(30):
        centres = [tuple(rng.uniform(r + 1, SIDE - r - 1, size=2)) for r in radii]
        pairs = [(i, j) for i in range(len(radii)) for j in range(i)]
        if all(math.dist(centres[i], centres[j]) > radii[i] + radii[j] + 2 for i, j in pairs):
            return centres
    quadrants = rng.permutation([(x, y) for x in (16, 48) for y in (16, 48)])[: len(radii)]
    return [(float(x), float(y)) for x, y in quadrants]


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB picture. Deterministic: all randomness was spent in `sample`."""
    side = SIDE * SUPERSAMPLE
    picture = Image.new("RGB", (side, side), (scene.level,) * 3)
    for thing in scene.things:
        mask = Image.new("L", (side, side), 0)
        _draw_shape(ImageDraw.Draw(mask), thing)
        colour = COLOURS[thing.colour]
        picture.paste(colour, mask=mask)
        if thing.texture != "plain":
            marks = Image.new("L", (side, side), 0)
            _draw_texture(ImageDraw.Draw(marks), thing)
            shade = tuple(int(0.3 * channel) for channel in colour)
            picture.paste(shade, mask=ImageChops.multiply(mask, marks))
    return picture.reduce(SUPERSAMPLE).point([min(255, round(scene.gain * value)) for value in range(256)] * 3)


# Outlines around the centre, in radii: ellipses as (left, top, right, bottom, fill), and the corners of polygons.
_ELLIPSES = {
    "circle": [(-1, -1, 1, 1, 255)],
    "ring": [(-1, -1, 1, 1, 255), (-0.55, -0.55, 0.55, 0.55, 0)],
    "heart": [(-1, -0.85, 0.1, 0.25, 255), (-0.1, -0.85, 1, 0.25, 255)],
}
_TURNS = [-math.pi / 2 + 2 * math.pi * k / 10 for k in range(10)]
_POLYGONS = {
    "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "triangle": [[(0, -1), (0.95, 0.8), (-0.95, 0.8)]],
    "diamond": [[(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]],
    "star": [[(r * math.cos(turn), r * math.sin(turn)) for turn, r in zip(_TURNS, (1.1, 0.45) * 5)]],
    "cross": [
        [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)],
        [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
    ],
    "heart": [[(-0.95, -0.05), (0.95, -0.05), (0, 1.05)]],
}


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r = (SUPERSAMPLE * value for value in (thing.x, thing.y, thing.radius))
    for left, top, right, bottom, fill in _ELLIPSES.get(thing.shape, []):
        pen.ellipse((x + r * left, y + r * top, x + r * right, y + r * bottom), fill=fill)
    for corners in _POLYGONS.get(thing.shape, []):
        pen.polygon([(x + r * px, y + r * py) for px, py in corners], fill=255)


def _draw_texture(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r = (SUPERSAMPLE * value for value in (thing.x, thing.y, thing.radius))
    step = 6 * SUPERSAMPLE
    steps = range(-math.ceil(r / step) - 1, math.ceil(r / step) + 2)
    for i in steps:
        if thing.texture == "striped":
            pen.rectangle((x - 1.2 * r, y + i * step, x + 1.2 * r, y + i * step + step / 2 - 1), fill=255)
        else:
            for j in steps:
                cx, cy = x + i * step + (j % 2) * step / 2, y + j * step
                pen.ellipse((cx - step / 3.4, cy - step / 3.4, cx + step / 3.4, cy + step / 3.4), fill=255)
