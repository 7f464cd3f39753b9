"""A world of 64x64 pictures with captions, rendered from seeds: the miniature's training data, prompts and concepts.

    python world.py --concept zebra_star --output_dir concepts/zebra_star     # five instance pictures as PNG
    python world.py --concept clown_fish --place beach --output_dir concepts/clown_fish   # all five in one place
    python world.py --concept clown_fish --beside chess_flower --output_dir both          # both, alone and together
    python world.py --grid world.png --seed 7                                 # a look at the world

A picture shows a subject (shape, colour, pattern, eyes, size) in a place, in one of three styles. It may have a prop with
its own colour, and a second, smaller object in a stated relation. A caption describes it in one of many word orders and
leaves some attributes out, as people do. Its meaning depends on the word order ("a red star left of a small green square")
and on the noun that each adjective precedes.

Concepts are subjects (and two styles) that training pictures never show and training captions never name: `held_out`
defines them, and `sample_scene` excludes them. Their attributes all occur in the world, so a description in words can
produce a concept too, and a learned token competes with it.

There are no noise textures and only coarse patterns, so that a small autoencoder spends its latents on attributes that have
names.

Sections: 1 vocabulary of the world, 2 scenes and their sampler, 3 shapes, 4 drawing, 5 places, 6 props, 7 captions,
8 concepts, 9 command line.
"""

import argparse
import json
import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw


# ---------------------------------------------------------------------------------------------------------------------
# 1. Vocabulary of the world

SIZE = 64  # pixels of a picture's side
SCALE = 3  # supersampling: scenes are drawn at SIZE * SCALE and reduced, for smooth edges

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "cross",
    "flower",
    "fish",
    "mushroom",
    "drop",
    "house",
)
COLOURS = {
    "red": (216, 38, 38),
    "orange": (248, 132, 24),
    "yellow": (252, 220, 48),
    "green": (44, 164, 66),
    "blue": (40, 88, 220),
    "purple": (134, 54, 182),
    "pink": (250, 140, 192),
    "white": (246, 246, 246),
    "black": (38, 38, 44),
}
PATTERNS = ("plain", "striped", "spotted", "checkered", "split")
SIZES = {"small": 11, "medium": 14, "large": 17}  # the subject's radius in pixels
OTHER_SIZE = 8  # the second object's radius
PLACES = ("grass", "water", "snow", "night", "beach", "forest", "brick", "sunset", "city", "mountains")
PROPS = ("hat", "balloon", "flag", "umbrella", "block")
RELATIONS = ("left", "right", "above", "below")  # the subject's position relative to the second object
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
STYLES = ("photo", "sketch", "pixel art")
TONES = ("sepia", "blue")
# The tones of each style. The two missing pairs are the style concepts (section 8).
SEEN_TONES = {"photo": ("sepia", "blue"), "sketch": ("sepia",), "pixel art": ("blue",)}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Scenes and their sampler


@dataclass(frozen=True)
class Subject:
    shape: str
    colour: str
    pattern: str = "plain"
    colour2: str | None = None  # the pattern's second colour; None when plain
    eyes: bool = False
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    subject: Subject
    place: str
    style: str = "photo"
    tone: str | None = None
    prop: str | None = None
    prop_colour: str | None = None
    other: tuple[str, str] | None = None  # (shape, colour) of the second object, which is plain and small
    relation: str | None = None


def attributes(scene):
    """The scene's labels, one per attribute, or "none": the targets of the classifiers."""
    subject, other = scene.subject, scene.other or ("none", "none")
    return {
        "shape": subject.shape,
        "colour": subject.colour,
        "pattern": subject.pattern,
        "colour2": subject.colour2 or "none",
        "eyes": "eyes" if subject.eyes else "none",
        "size": subject.size,
        "place": scene.place,
        "style": scene.style,
        "tone": scene.tone or "none",
        "prop": scene.prop or "none",
        "prop_colour": scene.prop_colour or "none",
        "other_shape": other[0],
        "other_colour": other[1],
        "relation": scene.relation or "none",
    }


LABELS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "colour2": ("none", *COLOURS),
    "eyes": ("none", "eyes"),
    "size": tuple(SIZES),
    "place": PLACES,
    "style": STYLES,
    "tone": ("none", *TONES),
    "prop": ("none", *PROPS),
    "prop_colour": ("none", *COLOURS),
    "other_shape": ("none", *SHAPES),
    "other_colour": ("none", *COLOURS),
    "relation": ("none", *RELATIONS),
}


def held_out(subject):
    """Whether training pictures must not show this look: the named concepts, and one in twelve patterned looks.

    Eyes and size do not matter: a combination is held out with and without eyes.
    """
    if subject.pattern == "plain":
        return False
    look = (subject.shape, subject.colour, subject.pattern, subject.colour2)
    return look in _concept_looks() or zlib.crc32(" ".join(look).encode()) % 12 == 0


def generator(seed, *stream):
    """A random generator for a seed and a purpose. `stream` makes, for example, scene and wording independent."""
    return np.random.default_rng([seed, *(zlib.crc32(str(s).encode()) for s in stream)])


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def sample_subject(rng):
    """A subject that is not held out."""
    while True:
        pattern = "plain" if rng.random() < 0.4 else pick(rng, PATTERNS[1:])
        colour = pick(rng, tuple(COLOURS))
        colour2 = None if pattern == "plain" else pick(rng, [c for c in COLOURS if c != colour])
        eyes, size = bool(rng.random() < 0.4), pick(rng, tuple(SIZES))
        subject = Subject(pick(rng, SHAPES), colour, pattern, colour2, eyes, size)
        if not held_out(subject):
            return subject


def sample_scene(seed):
    """The scene of a seed, as training pictures may show it."""
    rng = generator(seed, "scene")
    scene = Scene(sample_subject(rng), pick(rng, PLACES), style=pick(rng, STYLES))
    if rng.random() < 0.12:
        scene = replace(scene, tone=pick(rng, SEEN_TONES[scene.style]))
    if rng.random() < 0.55:
        scene = replace(scene, prop=pick(rng, PROPS), prop_colour=pick(rng, tuple(COLOURS)))
    if rng.random() < 0.45:
        # An object above or below the subject would collide with a prop.
        relations = RELATIONS if scene.prop is None else RELATIONS[:2]
        other = (pick(rng, SHAPES), pick(rng, tuple(COLOURS)))
        scene = replace(scene, other=other, relation=pick(rng, relations))
    return scene


# ---------------------------------------------------------------------------------------------------------------------
# 3. Shapes: polygons in a box from -1 to 1, y downwards


def _ring(radius, count=48, start=-math.pi / 2):
    """Points at radius(angle) around the centre, clockwise from the top."""
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(radius(a) * math.cos(a), radius(a) * math.sin(a)) for a in angles]


def _heart():
    angles = [2 * math.pi * i / 48 for i in range(48)]
    ys = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(y + 2.5) / 14.5) for a, y in zip(angles, ys, strict=False)]


def _drop():
    """A tear: a circle that ends in a point above."""
    below = [(0.72 * math.cos(a), 0.3 + 0.72 * math.sin(a)) for a in np.linspace(-0.45, math.pi + 0.45, 32)]
    return [(0.0, -1.1), *below]


def _star():
    return [
        ((1.1 if i % 2 == 0 else 0.5) * math.cos(a), 0.05 + (1.1 if i % 2 == 0 else 0.5) * math.sin(a))
        for i, a in enumerate(math.pi * i / 5 - math.pi / 2 for i in range(10))
    ]


def _fish():
    body = [(-0.18 + 0.82 * math.cos(a), 0.66 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40)]
    return body, [(0.4, 0.0), (1.08, -0.66), (1.08, 0.66)]


def _mushroom():
    cap = [(1.05 * math.cos(a), 0.12 + 1.05 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 24)]
    return [(-0.36, 0.1), (0.36, 0.1), (0.42, 1.0), (-0.42, 1.0)], cap


def _flower():
    """Five round petals around a centre."""
    middles = [(0.66 * math.cos(a), 0.66 * math.sin(a)) for a in (0.4 * math.pi * i - math.pi / 2 for i in range(5))]
    unit = _ring(lambda a: 1.0, 20)
    petals = [[(cx + 0.42 * px, cy + 0.42 * py) for px, py in unit] for cx, cy in middles]
    return (*petals, [(0.45 * px, 0.45 * py) for px, py in unit])


def _cross():
    w = 0.42
    return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]


OUTLINES = {
    "circle": (_ring(lambda a: 0.95),),
    "square": ([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],),
    "triangle": ([(0, -1.0), (1.08, 0.88), (-1.08, 0.88)],),
    "star": (_star(),),
    "heart": (_heart(),),
    "diamond": ([(0, -1.12), (0.82, 0), (0, 1.12), (-0.82, 0)],),
    "cross": (_cross(),),
    "flower": _flower(),
    "fish": _fish(),
    "mushroom": _mushroom(),
    "drop": (_drop(),),
    "house": ([(-0.7, -0.2), (0.7, -0.2), (0.7, 0.95), (-0.7, 0.95)], [(0, -1.08), (1.08, -0.1), (-1.08, -0.1)]),
}
EYES_AT = {
    "triangle": (0, 0.25),
    "fish": (-0.3, -0.1),
    "mushroom": (0, -0.3),
    "drop": (0, 0.2),
    "house": (0, 0.3),
    "star": (0, 0.0),
}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Drawing

INK = (30, 28, 34)


class Canvas:
    """A picture at SCALE times its size. Drawing calls take final pixels; colours follow the style."""

    def __init__(self, style):
        self.style = style
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
        self.draw = ImageDraw.Draw(self.image)
        # Pixel art is sampled on a grid of two pixels: a thinner line would fall between its points.
        self.line = {"photo": 1.2, "sketch": 1.3, "pixel art": 2.0}[style]

    def far(self, colour):
        """A background colour in this style: almost white in a sketch."""
        return mix((252, 250, 244), colour, 0.42) if self.style == "sketch" else colour

    def near(self, colour):
        """An object's colour in this style."""
        return mix((252, 250, 244), colour, 0.72) if self.style == "sketch" else colour

    def polygon(self, points, colour, outline=False):
        points = [(x * SCALE, y * SCALE) for x, y in points]
        if outline:
            width = round(2 * self.line * SCALE)
            self.draw.line([*points, points[0], points[1]], fill=INK, width=width, joint="curve")
        self.draw.polygon(points, fill=colour)

    def band(self, top, bottom, colour):
        self.draw.rectangle((0, top * SCALE, SIZE * SCALE, bottom * SCALE - 1), fill=colour)

    def ellipse(self, x, y, rx, ry, colour, outline=False):
        if outline:
            w = self.line
            self.draw.ellipse([v * SCALE for v in (x - rx - w, y - ry - w, x + rx + w, y + ry + w)], fill=INK)
        self.draw.ellipse([v * SCALE for v in (x - rx, y - ry, x + rx, y + ry)], fill=colour)

    def stroke(self, points, colour, width):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=max(1, round(width * SCALE)))

    def gradient(self, top, bottom, colour1, colour2):
        """A vertical gradient; one flat colour in pixel art and sketches."""
        if self.style != "photo":
            return self.band(top, bottom, self.far(mix(colour1, colour2, 0.5)))
        ends = np.array([colour1, colour2], np.float32)
        rows = round((bottom - top) * SCALE)
        t = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
        column = (ends[0] * (1 - t) + ends[1] * t).astype(np.uint8)
        strip = np.ascontiguousarray(np.broadcast_to(column[:, None], (rows, SIZE * SCALE, 3)))
        self.image.paste(Image.fromarray(strip), (0, round(top * SCALE)))

    def finish(self):
        """The picture at its final size."""
        if self.style == "pixel art":
            return self.image.resize((SIZE // 2, SIZE // 2), Image.NEAREST).resize((SIZE, SIZE), Image.NEAREST)
        return self.image.reduce(SCALE)


def mix(colour1, colour2, t):
    return tuple(round(a * (1 - t) + b * t) for a, b in zip(colour1, colour2, strict=False))


def place_outline(shape, x, y, r):
    return [[(x + r * px, y + r * py) for px, py in polygon] for polygon in OUTLINES[shape]]


@cache
def _shading(side):
    """Light from the upper left, as two masks: light and shadow."""
    t = np.linspace(-1, 1, side, dtype=np.float32)
    slope = (t[None, :] + t[:, None]) / 2
    light, shadow = np.clip(-slope, 0, 1) * 110, np.clip(slope, 0, 1) * 110
    return Image.fromarray(light.astype(np.uint8)), Image.fromarray(shadow.astype(np.uint8))


def _pattern(side, pattern, colour, colour2):
    """A square of the pattern in the shape's coordinates, so that it scales with the shape. Coarse: five bands."""
    tile = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(tile)
    half = side / 2
    if pattern == "striped":
        for top in (-0.76, 0.02, 0.80):
            draw.rectangle((0, half + (top + 0.0) * half, side, half + (top + 0.37) * half), fill=colour2)
    elif pattern == "spotted":
        for x, y in ((0, -0.68), (-0.52, -0.18), (0.52, -0.18), (0, 0.28), (-0.52, 0.72), (0.52, 0.72)):
            box = [half + half * v for v in (x - 0.26, y - 0.26, x + 0.26, y + 0.26)]
            draw.ellipse(box, fill=colour2)
    elif pattern == "checkered":
        for i in range(-2, 2):
            for j in range(-2, 2):
                if (i + j) % 2:
                    draw.rectangle([half + half * 0.56 * v for v in (i, j, i + 1, j + 1)], fill=colour2)
    elif pattern == "split":
        draw.rectangle((half, 0, side, side), fill=colour2)
    return tile


def draw_subject(canvas, subject, x, y, r=None):
    """Outline, patterned body, light and shadow in photos, eyes. `r` replaces the radius of the subject's size."""
    r = r or SIZES[subject.size]
    polygons = place_outline(subject.shape, x, y, r)
    for polygon in polygons:
        canvas.polygon(polygon, INK, outline=True)
    side = round(2.4 * r * SCALE)
    corner = (round((x - 1.2 * r) * SCALE), round((y - 1.2 * r) * SCALE))
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for polygon in polygons:
        pen.polygon([(px * SCALE - corner[0], py * SCALE - corner[1]) for px, py in polygon], fill=255)
    colour2 = canvas.near(COLOURS[subject.colour2]) if subject.colour2 else None
    body = _pattern(side, subject.pattern, canvas.near(COLOURS[subject.colour]), colour2)
    canvas.image.paste(body, corner, mask)
    if canvas.style == "photo":
        light, shadow = _shading(side)
        canvas.image.paste((255, 255, 255), corner, ImageChops.multiply(mask, light))
        canvas.image.paste((0, 0, 0), corner, ImageChops.multiply(mask, shadow))
    if subject.eyes:
        draw_eyes(canvas, subject.shape, x, y, r)


def draw_eyes(canvas, shape, x, y, r):
    ex, ey = EYES_AT.get(shape, (0, -0.15))
    for side in (-1, 1):
        cx, cy = x + r * (ex + 0.29 * side), y + r * ey
        if canvas.style == "pixel art":  # two by two points; the pupil is one of them
            cx, cy = 2 * round((x + r * ex) / 2) + (2 if side > 0 else -6), 2 * round(cy / 2) - 2
            canvas.polygon(_box(cx, cy, 3.9), (255, 255, 255))
            canvas.polygon(_box(cx + (2 if side < 0 else 0), cy + 2, 1.9), INK)
        else:
            canvas.ellipse(cx, cy, 0.28 * r, 0.32 * r, INK)
            canvas.ellipse(cx, cy, 0.22 * r, 0.26 * r, (255, 255, 255))
            canvas.ellipse(cx, cy + 0.04 * r, 0.13 * r, 0.15 * r, INK)


def _box(x, y, side):
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def draw_other(canvas, shape, colour, x, y):
    for polygon in place_outline(shape, x, y, OTHER_SIZE):
        canvas.polygon(polygon, INK, outline=True)
    for polygon in place_outline(shape, x, y, OTHER_SIZE):
        canvas.polygon(polygon, canvas.near(COLOURS[colour]))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Places


def _ground(canvas, rng, sky, ground, horizon=40):
    """Sky above and ground below, with a varying horizon."""
    horizon += int(rng.integers(-3, 4))
    canvas.gradient(0, horizon, *sky)
    canvas.gradient(horizon, SIZE, *ground)
    if canvas.style == "sketch":
        canvas.stroke([(0, horizon), (SIZE, horizon)], INK, 0.8)
    return horizon


def _grass(canvas, rng):
    horizon = _ground(canvas, rng, ((120, 185, 240), (200, 228, 248)), ((120, 196, 84), (70, 150, 52)))
    for x in range(int(rng.integers(3, 14)), SIZE, 18):
        canvas.stroke([(x - 3, horizon + 15), (x, horizon + 9), (x + 3, horizon + 15)], canvas.far((40, 120, 40)), 1.6)


def _water(canvas, rng):
    canvas.gradient(0, SIZE, (96, 196, 226), (20, 104, 170))
    shift = float(rng.uniform(0, 21))
    for row, y in enumerate(range(10, SIZE, 20)):
        xs = np.arange(-21 + shift + 5 * (row % 2), SIZE + 21, 2)
        wave = [(float(x), y + 2.5 * math.sin(2 * math.pi * (x - shift) / 21)) for x in xs]
        canvas.stroke(wave, canvas.far((150, 218, 238)) if canvas.style != "sketch" else (70, 130, 190), 1.8)


def _snow(canvas, rng):
    horizon = _ground(canvas, rng, ((176, 190, 206), (214, 222, 232)), ((250, 252, 255), (226, 236, 248)))
    for x, y in ((8, 10), (32, 6), (56, 12), (6, 30), (58, 30)):
        x, y = x + int(rng.integers(-2, 3)), y + int(rng.integers(-2, 3))
        flake = (255, 255, 255) if canvas.style != "sketch" else (120, 140, 170)
        canvas.ellipse(x, y, 2, 2, flake)
    canvas.ellipse(int(rng.integers(0, SIZE)), horizon + 2, 16, 5, canvas.far((250, 252, 255)))


def _night(canvas, rng):
    _ground(canvas, rng, ((14, 16, 52), (44, 44, 98)), ((34, 38, 60), (22, 24, 42)), 48)
    for x, y in ((6, 22), (18, 8), (34, 6), (58, 28)):
        x, y = x + int(rng.integers(-2, 3)), y + int(rng.integers(-2, 3))
        canvas.ellipse(x, y, 1.4, 1.4, (255, 250, 200) if canvas.style != "sketch" else INK)
    canvas.ellipse(54 + int(rng.integers(-2, 3)), 9, 6, 6, (250, 244, 200))


def _beach(canvas, rng):
    horizon = _ground(canvas, rng, ((140, 206, 250), (206, 236, 252)), ((246, 222, 160), (232, 200, 130)), 44)
    canvas.gradient(horizon - 12, horizon, (36, 140, 196), (60, 180, 206))
    canvas.stroke([(0, horizon), (SIZE, horizon)], canvas.far((250, 252, 252)), 1.6)
    if canvas.style == "sketch":
        canvas.stroke([(0, horizon - 12), (SIZE, horizon - 12)], INK, 0.8)


def _forest(canvas, rng):
    horizon = _ground(canvas, rng, ((164, 206, 186), (196, 220, 190)), ((84, 104, 46), (62, 74, 36)), 46)
    shift = int(rng.integers(-4, 5))
    for x, height in ((2, 34), (17, 26), (32, 38), (47, 28), (62, 36)):
        x += shift
        canvas.polygon(
            [(x - 2, horizon - 4), (x + 2, horizon - 4), (x + 2, horizon + 3), (x - 2, horizon + 3)],
            canvas.far((92, 60, 34)),
        )
        crown = [(x, horizon - height), (x + 9, horizon - 3), (x - 9, horizon - 3)]
        canvas.polygon(crown, canvas.far((22, 92, 54)), outline=canvas.style == "sketch")


def _brick(canvas, rng):
    canvas.band(0, SIZE, canvas.far((206, 160, 140)))
    shift = 2 * int(rng.integers(0, 16))
    for row, y in enumerate(range(0, SIZE, 16)):
        for x in range(-64 + shift + 16 * (row % 2), SIZE, 32):
            near, far = (0, 2) if canvas.style == "pixel art" else (1, 1)  # mortar on the grid of two pixels
            left, top, right, bottom = x + near, y + near, x + 32 - far, y + 16 - far
            brick = [(left, top), (right, top), (right, bottom), (left, bottom)]
            canvas.polygon(brick, canvas.far((166, 78, 58)))
            if canvas.style == "sketch":
                canvas.stroke([*brick, brick[0]], (110, 80, 74), 0.8)


def _sunset(canvas, rng):
    horizon = int(rng.integers(43, 48))
    canvas.gradient(0, horizon, (112, 60, 140), (255, 150, 70))
    x = int(rng.integers(8, 56))
    canvas.ellipse(x, horizon, 10, 10, canvas.near((255, 226, 110)), outline=canvas.style == "sketch")
    canvas.gradient(horizon, SIZE, (96, 44, 78), (56, 28, 56))


def _city(canvas, rng):
    horizon = _ground(canvas, rng, ((186, 200, 216), (220, 226, 232)), ((120, 122, 128), (92, 94, 100)), 50)
    shift = int(rng.integers(-5, 6))
    for x, height, grey in ((-6, 30, 110), (8, 42, 142), (24, 26, 124), (38, 44, 104), (54, 34, 138)):
        x, top = x + shift, horizon - height
        tower = [(x, top), (x + 13, top), (x + 13, horizon), (x, horizon)]
        canvas.polygon(tower, canvas.far((grey, grey + 6, grey + 16)), outline=canvas.style == "sketch")
        for wy in range(top + 4, horizon - 8, 12):
            pane = [(x + 4, wy), (x + 9, wy), (x + 9, wy + 6), (x + 4, wy + 6)]
            canvas.polygon(pane, canvas.far((252, 236, 150)))


def _mountains(canvas, rng):
    horizon = _ground(canvas, rng, ((150, 176, 226), (226, 214, 226)), ((150, 140, 110), (116, 106, 84)), 48)
    shift = int(rng.integers(-6, 7))
    for x, height, width in ((50, 30, 22), (12, 36, 24), (32, 26, 18)):
        x, top = x + shift, horizon - height
        canvas.polygon(
            [(x, top), (x + width, horizon), (x - width, horizon)],
            canvas.far((104, 96, 128)),
            canvas.style == "sketch",
        )
        cap = [(x, top), (x + width / 3, top + height / 3), (x - width / 3, top + height / 3)]
        canvas.polygon(cap, canvas.far((250, 250, 255)))


DRAW_PLACE = {
    "grass": _grass, "water": _water, "snow": _snow, "night": _night, "beach": _beach,
    "forest": _forest, "brick": _brick, "sunset": _sunset, "city": _city, "mountains": _mountains,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 6. Props and the whole picture


def _hat(canvas, colour, x, y, r, side):
    top = y - 0.78 * r
    canvas.polygon([(x - 6, top), (x + 6, top), (x + 5, top - 9), (x - 5, top - 9)], colour, outline=True)
    canvas.polygon([(x - 10, top - 1), (x + 10, top - 1), (x + 10, top + 2), (x - 10, top + 2)], colour, outline=True)


def _balloon(canvas, colour, x, y, r, side):
    bx, by = x + side * (0.55 * r + 7), y - r - 8
    canvas.stroke([(bx, by + 6), (x + side * 0.7 * r, y)], INK, 1)
    canvas.ellipse(bx, by, 6.5, 7.5, colour, outline=True)


def _flag(canvas, colour, x, y, r, side):
    px = x + side * (r + 4)
    canvas.stroke([(px, y - r - 7), (px, y + r)], INK, 1.6)
    tip = -side * 12  # the cloth blows over the subject, where there is room
    canvas.polygon([(px, y - r - 8), (px + tip, y - r - 8), (px + tip, y - r), (px, y - r)], colour, outline=True)


def _umbrella(canvas, colour, x, y, r, side):
    w, top = r + 5, y - r - 3
    canvas.stroke([(x, top), (x, y)], INK, 1.6)
    dome = [(x + w * math.cos(a), top + 1 + 11 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 24)]
    canvas.polygon(dome, colour, outline=True)


def _block(canvas, colour, x, y, r, side):
    top = y + 0.9 * r
    canvas.polygon(
        [(x - r - 1, top), (x + r + 1, top), (x + r + 1, top + 10), (x - r - 1, top + 10)], colour, outline=True
    )


DRAW_PROP = {"hat": _hat, "balloon": _balloon, "flag": _flag, "umbrella": _umbrella, "block": _block}


def layout(scene, rng):
    """The positions of the subject and the second object, and the free side for a prop."""
    r = SIZES[scene.subject.size]
    x, y = 32 + int(rng.integers(-4, 5)), 38 + int(rng.integers(-2, 3))
    if scene.prop == "block":
        y = 50 - r + int(rng.integers(-1, 2))
    elif scene.prop:
        y = max(y, r + 22)
    side, other = pick(rng, (-1, 1)), None
    if scene.relation in ("left", "right"):
        side = -1 if scene.relation == "left" else 1
        x = 32 + side * (12 + int(rng.integers(-1, 2)))
        other = (32 - side * (19 + int(rng.integers(-1, 2))), y + r - 8)
    elif scene.relation:
        sign = 1 if scene.relation == "below" else -1  # if the subject is below, the other object is above
        y = 32 + sign * 10 + int(rng.integers(-1, 2))
        other = (x + int(rng.integers(-5, 6)), y - sign * (r + 10))
    return x, y, side, other


def render(scene, seed, empty=False):
    """The scene as a 64x64 RGB picture. The seed shifts things slightly, but decides nothing that a caption states.

    `empty` draws only the place.
    """
    rng = generator(seed, "picture")
    canvas = Canvas(scene.style)
    DRAW_PLACE[scene.place](canvas, rng)
    if not empty:
        draw_things(canvas, scene, rng)
    picture = canvas.finish()
    return _toned(picture, scene.tone) if scene.tone else picture


def render_both(scene, second, seed):
    """The scene with another whole subject, patterned as it is, over its second object, which is plain."""
    rng, canvas = generator(seed, "picture"), Canvas(scene.style)
    DRAW_PLACE[scene.place](canvas, rng)
    draw_things(canvas, scene, rng)
    draw_subject(canvas, second, *standing(scene, seed)[1])
    return canvas.finish()


def standing(scene, seed):
    """(x, y, radius) in pixels of a picture's subject and, if there is one, of its second object."""
    rng = generator(seed, "picture")
    DRAW_PLACE[scene.place](Canvas(scene.style), rng)
    x, y, _, other = layout(scene, rng)
    return [(x, y, SIZES[scene.subject.size])] + ([(*other, OTHER_SIZE)] if other else [])


def draw_things(canvas, scene, rng):
    """Subject, prop and second object, and the subject's shadow."""
    x, y, side, other = layout(scene, rng)
    r = SIZES[scene.subject.size]
    colour = canvas.near(COLOURS[scene.prop_colour]) if scene.prop else None
    if canvas.style == "photo":  # a shadow on the ground
        canvas.ellipse(x + 2, y + r + (10 if scene.prop == "block" else 0), r, 2.2, (70, 70, 70))
    if scene.prop and scene.prop != "hat":
        DRAW_PROP[scene.prop](canvas, colour, x, y, r, side)
    draw_subject(canvas, scene.subject, x, y)
    if scene.prop == "hat":
        _hat(canvas, colour, x, y, r, side)
    if other:
        draw_other(canvas, *scene.other, *other)


def _toned(picture, tone):
    """The picture as printed with one ink: its brightness, mapped to shades of one hue."""
    dark, light = {"sepia": ((56, 30, 10), (255, 236, 198)), "blue": ((8, 22, 84), (214, 234, 255))}[tone]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] / 255
    full = np.asarray(dark, np.float32) * (1 - grey) + np.asarray(light, np.float32) * grey
    # A third of the original colour remains, so that objects' colours are still recognisable.
    return Image.fromarray((0.67 * full + 0.33 * np.asarray(picture, np.float32)).astype(np.uint8))


def picture_array(seed):
    """Scene and picture of a seed, as (Scene, uint8 array of 64 x 64 x 3)."""
    scene = sample_scene(seed)
    return scene, np.asarray(render(scene, seed))


# ---------------------------------------------------------------------------------------------------------------------
# 7. Captions

PHOTO_PREFIXES = (
    "a photo of {a}", "a photo of {a}", "a photo of {a}", "a photo of {the}", "a rendering of {a}",
    "a cropped photo of {the}", "a close-up photo of {a}", "a bright photo of {the}", "a dark photo of {the}",
    "a good photo of {the}", "a picture of {a}", "a photo of one {x}", "a photo of my {x}", "a photo of the nice {x}",
    "a photo of a cool {x}", "a rendition of {the}", "a photo of a clean {x}", "a photo of a dirty {x}",
    "a photo of the weird {x}", "a photograph of {a}", "there is {a}",
)  # fmt: skip
PREFIXES = {
    "photo": PHOTO_PREFIXES,
    "sketch": (
        "a sketch of {a}",
        "a pencil sketch of {a}",
        "a drawing of {the}",
        "a picture in the style of a sketch of {a}",
    ),
    "pixel art": ("pixel art of {a}", "a pixel art picture of {the}", "a picture in the style of pixel art of {a}"),
}
SUFFIXES = {
    "photo": (", photo", "in a photo", "as a photo"),
    "sketch": (", sketch", "as a pencil sketch", "in the style of a sketch"),
    "pixel art": (", pixel art", "as pixel art", "in the style of pixel art"),
}
TONE_WORDS = {
    "sepia": ("in sepia", ", sepia", "in sepia tones"),
    "blue": ("in blue tones", ", blue tones", "printed in blue"),
}
PLACE_WORDS = {
    "grass": ("on grass", "on the grass", "in a meadow"),
    "water": ("in the water", "in water", "on the sea"),
    "snow": ("in the snow", "in snow", "on snow"),
    "night": ("at night", "in the night", "under the night sky"),
    "beach": ("on the beach", "on a beach", "at the beach"),
    "forest": ("in the forest", "in a forest", "among trees"),
    "brick": ("in front of a brick wall", "against a brick wall", "at the brick wall"),
    "sunset": ("at sunset", "in front of the sunset", "against the sunset"),
    "city": ("in the city", "in a city", "in front of the city"),
    "mountains": ("in the mountains", "in front of mountains", "among the mountains"),
}
PROP_WORDS = {
    "hat": ("wearing a {} hat", "with a {} hat", "in a {} hat"),
    "balloon": ("holding a {} balloon", "with a {} balloon", "beside a {} balloon"),
    "flag": ("holding a {} flag", "with a {} flag", "waving a {} flag"),
    "umbrella": ("under a {} umbrella", "with a {} umbrella", "holding a {} umbrella"),
    "block": ("standing on a {} block", "on top of a {} block", "sitting on a {} block"),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BESIDE_WORDS = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
ALL = frozenset(LABELS)


def article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def choose_named(scene, rng, leave_out):
    """The attributes that a caption names. Each is left out with probability `leave_out`, minor ones more often."""
    rates = {"size": 2.5, "eyes": 2.0, "colour2": 1.2, "other_shape": 0.8, "shape": 0.4}
    rates["style"] = 1.0 if scene.style == "photo" else 0.25  # a picture without a stated style is mostly a photo
    named = {k for k in LABELS if rng.random() >= min(0.7, leave_out * rates.get(k, 1.0))}
    if scene.subject.size == "medium":
        named.discard("size")
    if not scene.subject.eyes:
        named.discard("eyes")  # "without eyes" is not said
    absent = {k for k, v in attributes(scene).items() if v == "none"}
    return frozenset(named - absent)


def subject_words(subject, named, rng):
    """The noun phrase without its article, and the attributes that it states."""
    said = {k for k in ("shape", "colour", "pattern", "colour2", "eyes", "size") if k in named}
    noun = subject.shape if "shape" in said else "thing"
    c1, c2 = subject.colour, subject.colour2
    two = {"colour", "pattern", "colour2"} <= said
    one = f"{c1} " if "colour" in said else ""
    spots = {"striped": "stripes", "spotted": "spots", "checkered": "checks"}.get(subject.pattern)
    if "pattern" not in said or subject.pattern == "plain":
        said -= {"pattern", "colour2"}
        words = f"{one}{noun}"
        if subject.pattern == "plain" and rng.random() < 0.2:
            words, said = f"plain {words}", said | {"pattern"}
    elif subject.pattern == "split":
        words = f"half {c1} and half {c2} {noun}" if two else f"two-tone {one}{noun}"
        said -= set() if two else {"colour2"}
    elif two:
        words = pick(rng, (f"{subject.pattern} {c1} and {c2} {noun}", f"{c1} {noun} with {c2} {spots}"))
    else:
        said -= {"colour2"}
        words = pick(rng, (f"{one}{subject.pattern} {noun}", f"{subject.pattern} {one}{noun}"))
    if "eyes" in said:
        joint = "and" if " with " in words else "with"
        words = f"{words} {joint} {pick(rng, ('eyes', 'two eyes', 'big eyes'))}"
    if "size" in said:
        words = f"{subject.size} {words}"
    return words, said


def other_words(scene, named, rng):
    """The second object with its article; always "small" or "little"."""
    noun = scene.other[0]
    colour = f"{scene.other[1]} " if "other_colour" in named else ""
    return f"a {pick(rng, ('small', 'small', 'little'))} {colour}{noun}"


def join(parts):
    """Join words to one line, without a space before a comma."""
    return " ".join(p for p in parts if p).replace(" ,", ",")


def caption(scene, seed, leave_out=0.13, noun=None):
    """A caption and the attributes that it states, as (text, frozenset of LABELS' keys).

    `noun` replaces the subject's whole phrase ("<x>"), for prompts with a learned token.
    """
    rng = generator(seed, "caption")
    named = choose_named(scene, rng, leave_out)
    words, said = subject_words(scene.subject, named, rng)
    if noun:
        words, said = noun, {"shape", "colour", "pattern", "colour2", "eyes"}
    said |= named & {"place", "tone", "prop"}
    prop = ""
    if "prop" in named:
        colour = scene.prop_colour if "prop_colour" in named else ""
        prop = pick(rng, PROP_WORDS[scene.prop]).format(colour).replace("  ", " ").replace("a orange", "an orange")
        prop = prop.replace("a umbrella", "an umbrella")
        said |= named & {"prop_colour"}
    place = pick(rng, PLACE_WORDS[scene.place]) if "place" in named else ""
    other = other_words(scene, named, rng) if "other_shape" in named else ""
    if other:
        said |= {"other_shape", "relation"} | (named & {"other_colour"})
    core, leading = arrange(words, prop, place, other, scene.relation, rng)
    show = "style" in named and not (scene.style == "photo" and rng.random() < 0.3)
    said |= {"style"} if show else set()
    text = dress(scene, core, leading, show, rng)
    if "tone" in named:
        text = join([text, pick(rng, TONE_WORDS[scene.tone])])
    return text, frozenset(said)


def arrange(words, prop, place, other, relation, rng):
    """The phrases in one of several orders. Returns them and the text before the style, if any.

    The first part has its article, which `dress` may replace.
    """
    swap = rng.random()
    a = article(words)
    if not other:
        if swap < 0.25 and place:
            return [a, prop], place
        return ([a, place, prop] if swap < 0.4 else [a, prop, place]), ""
    of = pick(rng, RELATION_WORDS[relation])
    back = pick(rng, RELATION_WORDS[OPPOSITE[relation]])
    beside = BESIDE_WORDS[OPPOSITE[relation]]
    orders = (
        ([a, prop, f", {of} {other}," if place else f", {of} {other}", place], ""),
        ([a, prop, f", {of} {other}"], place),
        ([a, f"{of} {other}", f", {place}"] if place and not prop else [a, prop, f"and {beside} {other}", place], ""),
        ([a, prop, place, f", with {other} {beside}"], ""),
        ([other, back, a, prop, place], ""),
        ([other, back, a, prop], place),
    )
    return pick(rng, orders)


def dress(scene, core, leading, show, rng):
    """Put the style before or after the phrases."""
    lead = f"{leading}," if leading else ""
    if not show:
        return join([lead, *core])
    if rng.random() < 0.25:
        return join([lead, *core, pick(rng, SUFFIXES[scene.style])])
    first = core[0].split(" ", 1)[1]
    prefix = pick(rng, PREFIXES[scene.style])
    if prefix.endswith("{x}"):
        opened = prefix.format(x=first)
    else:
        opened = prefix.format(a=core[0], the=f"the {first}")
    return join([lead, opened, *core[1:]])


def vocabulary():
    """Every word that captions use, for the tokenizer."""
    pools = [PREFIXES.values(), SUFFIXES.values(), TONE_WORDS.values(), PLACE_WORDS.values(), PROP_WORDS.values()]
    texts = [text for pool in pools for options in pool for text in options]
    texts += [
        *SHAPES,
        *COLOURS,
        *PATTERNS,
        *SIZES,
        *PROPS,
        *RELATIONS,
        *(w for o in RELATION_WORDS.values() for w in o),
    ]
    texts += [
        *BESIDE_WORDS.values(),
        "half two-tone stripes spots checks with and big eyes little an thing painting in style",
    ]
    bare = "".join(
        c if c.isalpha() else " " for c in " ".join(texts).replace("{a}", "").replace("{the}", "").replace("{x}", "")
    )
    return sorted(set(bare.split()))


# ---------------------------------------------------------------------------------------------------------------------
# 8. Concepts


@dataclass(frozen=True)
class Concept:
    name: str
    initializer: str  # the word that a learned token starts from
    description: str  # the concept in words
    subject: Subject | None = None  # a subject's look, or
    style: str | None = None  # a style's pair of style and tone
    tone: str | None = None


_SUBJECTS = {
    "zebra_star": Subject("star", "white", "striped", "black", True),
    "clown_fish": Subject("fish", "orange", "striped", "white", True),
    "toadstool": Subject("mushroom", "red", "spotted", "white", True),
    "harlequin": Subject("diamond", "purple", "checkered", "yellow", True),
    "two_faced_heart": Subject("heart", "pink", "split", "blue", True),
    "spotted_house": Subject("house", "yellow", "spotted", "purple", False),
    "chess_flower": Subject("flower", "green", "checkered", "pink", True),
    "night_drop": Subject("drop", "blue", "spotted", "orange", True),
    "flag_cross": Subject("cross", "green", "split", "orange", False),
    "bee_circle": Subject("circle", "yellow", "striped", "black", True),
}


@cache
def _concept_looks():
    return frozenset((s.shape, s.colour, s.pattern, s.colour2) for s in _SUBJECTS.values())


def describe(subject):
    """A subject in words: everything except its size, without an article."""
    named = ALL - {"size"} - (set() if subject.eyes else {"eyes"})
    return subject_words(subject, named, generator(0, "describe"))[0]


def _subject_concept(name, subject):
    return Concept(name, subject.shape, describe(subject), subject=subject)


CONCEPTS = {name: _subject_concept(name, subject) for name, subject in _SUBJECTS.items()}
CONCEPTS["blueprint"] = Concept("blueprint", "sketch", "a sketch in blue tones", style="sketch", tone="blue")
CONCEPTS["old_game"] = Concept("old_game", "pixel", "pixel art in sepia tones", style="pixel art", tone="sepia")


def compose_concept(seed):
    """Another held-out subject as a concept, named after its seed."""
    rng = generator(seed, "compose")
    while True:
        colour, colour2 = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        subject = Subject(pick(rng, SHAPES), colour, pick(rng, PATTERNS[1:]), colour2, bool(rng.random() < 0.6))
        if held_out(subject):
            return _subject_concept(f"composed_{seed}", subject)


def concept_scene(concept, seed):
    """A scene with the concept: the subject alone in a place, or the style on a subject."""
    rng = generator(seed, "concept", concept.name)
    if concept.subject is None:
        return replace(sample_scene(seed + 900_000_000), style=concept.style, tone=concept.tone)
    subject = replace(concept.subject, size=pick(rng, ("medium", "large")))
    return Scene(subject, pick(rng, PLACES))


def home(concept, seed=0):
    """The place of all pictures of a concept in a study, drawn from a seed before any method runs."""
    return pick(generator(seed, "home", concept.name), PLACES)


def instance_scenes(concept, count=5, place=None):
    """The scenes and seeds of the concept's pictures, all in one place or each in another place."""
    scenes, places, seed = [], set(), 0
    while len(scenes) < count:
        scene = concept_scene(concept, seed)
        if place is not None:
            scenes.append((replace(scene, place=place), seed))
        elif scene.place not in places or len(places) == len(PLACES):
            places.add(scene.place)
            scenes.append((scene, seed))
        seed += 1
    return scenes


def instance_pictures(concept, count=5, place=None):
    """The concept's pictures of `instance_scenes`."""
    return [render(scene, seed) for scene, seed in instance_scenes(concept, count, place)]


def pictures_of_both(first, second, count=5, place=None):
    """(picture, caption) of two subjects: each alone, and together, in turn the one large and the other small.

    The captions name the words <first> and <second>, for a training of both in one run.
    """
    word = {concept.name: f"<{concept.name}>" for concept in (first, second)}
    found = []
    for concept in (first, second):
        found += [
            (picture, f"a photo of a {word[concept.name]}") for picture in instance_pictures(concept, count, place)
        ]
    scenes = {concept.name: instance_scenes(concept, count, place) for concept in (first, second)}
    for number in range(count):
        large, small = (first, second) if number % 2 == 0 else (second, first)
        (scene, seed), relation = scenes[large.name][number], RELATIONS[number % len(RELATIONS)]
        scene = replace(scene, other=(small.subject.shape, small.subject.colour), relation=relation)
        text = f"a photo of a {word[large.name]} {RELATION_WORDS[relation][0]} a small {word[small.name]}"
        found.append((render_both(scene, small.subject, seed), text))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 9. Command line


def sheet(pictures, texts, columns=8, zoom=2):
    """One image of pictures with their texts below."""
    side, room = SIZE * zoom, 44 if texts else 4
    rows = math.ceil(len(pictures) / columns)
    image = Image.new("RGB", (columns * (side + 4), rows * (side + room)), "white")
    draw = ImageDraw.Draw(image)
    for i, picture in enumerate(pictures):
        x, y = (i % columns) * (side + 4), (i // columns) * (side + room)
        image.paste(picture.resize((side, side), Image.NEAREST), (x + 2, y + 2))
        if texts:
            draw.multiline_text((x + 2, y + side + 3), _wrapped(texts[i], side // 6), fill="black", spacing=0)
    return image


def _wrapped(text, width):
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:4])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", choices=[*CONCEPTS, "all"], help="write this concept's instance pictures")
    parser.add_argument("--compose", type=int, metavar="SEED", help="write another concept, composed from this seed")
    parser.add_argument("--count", type=int, default=5, help="number of instance pictures")
    parser.add_argument(
        "--place", choices=PLACES, help="show all of them in this place, instead of each in another place"
    )
    parser.add_argument(
        "--beside", choices=CONCEPTS, help="write pictures of this concept too, and of both, with captions"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for the instance pictures")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write a sheet of captioned scenes")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the sheet")
    parser.add_argument("--scenes", type=int, default=32, help="number of scenes on the sheet")
    args = parser.parse_args(argv)
    wanted = args.concept or args.compose is not None
    if not wanted and not args.grid:
        parser.error("nothing to do: give --concept NAME, --compose SEED or --grid PNG")
    if wanted and not args.output_dir:
        parser.error("--concept and --compose need --output_dir")
    pair = {args.concept, args.beside}
    if args.beside and (len(pair) < 2 or any(getattr(CONCEPTS.get(name), "subject", None) is None for name in pair)):
        parser.error(
            "--beside needs another concept as --concept, and two subjects, such as clown_fish and zebra_star"
        )
    return args


def write_both(first, second, args):
    """Write `pictures_of_both` with their captions in metadata.jsonl."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, text) in enumerate(pictures_of_both(first, second, args.count, args.place)):
        picture.save(args.output_dir / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (args.output_dir / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.output_dir}: {len(lines)} pictures with captions")


def main(argv=None):
    args = parse_args(argv)
    concepts = list(CONCEPTS.values()) if args.concept == "all" else [CONCEPTS[args.concept]] if args.concept else []
    concepts += [compose_concept(args.compose)] if args.compose is not None else []
    if args.beside:
        write_both(concepts.pop(0), CONCEPTS[args.beside], args)
    for concept in concepts:
        folder = args.output_dir / concept.name if args.concept == "all" else args.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(instance_pictures(concept, args.count, args.place)):
            picture.save(folder / f"{i}.png")
        print(f"{folder}: {concept.name}, in words: {concept.description}; initializer token: {concept.initializer}")
    if args.grid:
        scenes = [(seed, sample_scene(seed)) for seed in range(args.seed, args.seed + args.scenes)]
        pictures = [render(scene, seed) for seed, scene in scenes]
        sheet(pictures, [caption(scene, seed)[0] for seed, scene in scenes]).save(args.grid)


if __name__ == "__main__":
    main()
