"""The objects of a synthetic scene: buildings, vehicles, people, street furniture.

Each function draws one kind of object, at a place given by x and z in metres (see ``canvas``).
"""

import math

import numpy as np
from numpy.random import Generator

from emanet_triton.data.scenes.canvas import (
    CAMERA,
    DISC,
    LEAFY,
    PLAIN,
    ROUGH,
    Canvas,
    Color,
    between,
    pick,
    shade,
)

FACADES = [(150, 96, 76), (172, 148, 116), (128, 122, 118), (186, 172, 150), (112, 88, 80)]
_GREYS = [(96, 92, 90), (120, 116, 110), (70, 72, 78), (140, 134, 126)]
_PAINTS = [(150, 28, 26), (30, 60, 130), (196, 196, 196), (40, 42, 46), (150, 152, 156)]
_CLOTHES = [(60, 62, 80), (130, 40, 46), (46, 84, 66), (180, 170, 150), (34, 34, 40), (88, 66, 48)]


def building(
    canvas: Canvas, rng: Generator, x: float, z0: float, z1: float, lit: float, _leaves: Color
) -> None:
    height, wall = rng.uniform(6, 15), shade(pick(rng, FACADES), lit)
    ends = between(x, x + math.copysign(12, x))
    canvas.front("building", shade(wall, 0.85), *ends, 0, height, z0)
    canvas.side("building", wall, x, 0, height, z0, z1, ROUGH)
    canvas.side("building", shade(wall, 0.7), x, 0, 0.7, z0, z1)
    bay, glass = rng.uniform(1.8, 3.0), pick(rng, [(46, 54, 66), (84, 100, 118)])
    for y in np.arange(1.1, height - 1.8, rng.uniform(2.7, 3.3)).tolist():
        for z in np.arange(z0 + 0.6, z1 - 1.2, bay).tolist():
            glow = rng.uniform() < 0.06
            color = (230, 200, 130) if glow else glass
            canvas.side("building", shade(wall, 1.2), x, y - 0.12, y + 1.6, z - 0.1, z + 1.2)
            canvas.side("building", color, x, y, y + 1.5, z, z + 1.1, glow=glow)


def wall(
    canvas: Canvas, rng: Generator, x: float, z0: float, z1: float, lit: float, _leaves: Color
) -> None:
    height, color = rng.uniform(2.0, 3.2), shade(pick(rng, _GREYS), lit)
    canvas.front("wall", shade(color, 0.8), *between(x, x * 1.06), 0, height, z0)
    canvas.side("wall", color, x, 0, height, z0, z1, ROUGH)
    canvas.side("wall", shade(color, 1.25), x, height - 0.2, height, z0, z1)
    for y in np.arange(0.5, height - 0.3, 0.5).tolist():
        canvas.side("wall", shade(color, 0.82), x, y, y + 0.06, z0, z1)


def fence(
    canvas: Canvas, rng: Generator, x: float, z0: float, z1: float, lit: float, _leaves: Color
) -> None:
    height = rng.uniform(1.6, 2.4)
    color = shade(pick(rng, [(128, 96, 64), (70, 84, 74), (168, 164, 156)]), lit)
    canvas.side("fence", shade(color, 0.45), x, 0, height, z0, z1)
    for z in np.arange(z0, z1 - 0.2, 0.45).tolist():
        canvas.side("fence", color, x, 0, height + 0.1, z, z + 0.2)
    for y in (0.3, height - 0.4):
        canvas.side("fence", shade(color, 1.1), x, y, y + 0.16, z0, z1)


def hedge(
    canvas: Canvas, rng: Generator, x: float, z0: float, z1: float, lit: float, leaves: Color
) -> None:
    height, color = rng.uniform(1.2, 2.6), shade(leaves, lit)
    canvas.front("vegetation", color, *between(x, x * 1.2), 0, height, z0, LEAFY)
    canvas.side("vegetation", color, x, 0, height, z0, z1, LEAFY)
    for z in np.arange(z0, z1, 0.7).tolist():
        canvas.disc("vegetation", color, x, height, z, rng.uniform(0.4, 0.7), texture=LEAFY)


def tree(canvas: Canvas, rng: Generator, x: float, z: float, leaves: Color, size: float) -> None:
    trunk = pick(rng, [(84, 66, 52)])
    canvas.front("vegetation", trunk, x - 0.16 * size, x + 0.16 * size, 0, 3 * size, z)
    for dx, dy, r in rng.uniform((-1, 2.2, 0.7), (1, 4.4, 1.2), (9, 3)):
        color = shade(leaves, rng.uniform(0.75, 1.2))
        canvas.disc("vegetation", color, x + dx * size, dy * size, z, r * size, texture=LEAFY)


def _box(
    canvas: Canvas,
    name: str,
    color: Color,
    x: float,
    z: float,
    half: float,
    y0: float,
    y1: float,
    length: float,
) -> None:
    """Draw the body of a vehicle: the visible side, a visible roof, and the front or back."""
    inner = x - half if x > half else x + half if x < -half else None
    if inner is not None:
        canvas.side(name, shade(color, 0.72), inner, y0, y1, z, z + length)
    if y1 < CAMERA:
        roof = [(x + dx, y1, dz) for dx, dz in ((-half, z), (half, z))]
        roof += [(x + dx, y1, z + length) for dx in (half, -half)]
        canvas.face(name, shade(color, 1.2), roof)
    canvas.front(name, color, x - half, x + half, y0, y1, z)


def _wheels(canvas: Canvas, name: str, x: float, z: float, half: float, length: float) -> None:
    """Draw the shadow and the wheels of a vehicle."""
    canvas.ground("road", (34, 34, 36), x - half, x + half, z - 0.2, z + length, PLAIN)
    for dz in (0.8 * length, 0.15 * length):
        for dx in (-half, half):
            wheel = [(x + dx * 0.98, 0.36 + 0.36 * s, z + dz + 0.36 * c) for c, s in DISC]
            canvas.face(name, (24, 24, 26), wheel)
    for dx in (-half + 0.2, half - 0.2):
        canvas.front(name, (24, 24, 26), x + dx - 0.14, x + dx + 0.14, 0, 0.5, z)


def _lamps(
    canvas: Canvas, name: str, x: float, z: float, half: float, y: float, rear: bool
) -> None:
    color = (220, 30, 24) if rear else (250, 244, 214)
    for dx in (-half + 0.18, half - 0.18):
        canvas.front(name, color, x + dx - 0.14, x + dx + 0.14, y, y + 0.18, z, glow=True)


def car(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    color = pick(rng, _PAINTS)
    _wheels(canvas, "car", x, z, 0.88, 4.1)
    _box(canvas, "car", color, x, z, 0.9, 0.3, 0.92, 4.1)
    _box(canvas, "car", (40, 50, 60), x, z + 0.6, 0.74, 0.9, 1.42, 2.4)
    canvas.front("car", color, x - 0.78, x + 0.78, 1.4, 1.5, z + 0.6)
    canvas.front("car", (222, 222, 214), x - 0.25, x + 0.25, 0.45, 0.57, z)
    _lamps(canvas, "car", x, z, 0.9, 0.66, x > 0)


def truck(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    cargo, cab = pick(rng, [(176, 168, 150), (96, 112, 92), (150, 120, 84)]), pick(rng, _PAINTS)
    rear, height, length = x > 0, rng.uniform(2.9, 3.5), rng.uniform(5, 8)
    _wheels(canvas, "truck", x, z, 1.15, length)
    if rear:
        _box(canvas, "truck", cab, x, z + length, 1.1, 0.5, 2.3, 1.8)
        _box(canvas, "truck", cargo, x, z, 1.2, 0.8, height, length)
        canvas.front("truck", shade(cargo, 0.6), x - 0.04, x + 0.04, 0.8, height, z)
        canvas.front("truck", (40, 40, 44), x - 1.1, x + 1.1, 0.5, 0.8, z)
    else:
        _box(canvas, "truck", cargo, x, z + 1.8, 1.2, 0.8, height, length)
        _box(canvas, "truck", cab, x, z, 1.1, 0.5, 2.4, 1.7)
        canvas.front("truck", (44, 54, 64), x - 0.95, x + 0.95, 1.4, 2.2, z)
    _lamps(canvas, "truck", x, z, 1.1, 0.55, rear)


def _coach(
    canvas: Canvas,
    name: str,
    color: Color,
    stripe: Color,
    x: float,
    z: float,
    height: float,
    length: float,
    bay: float,
) -> None:
    """Draw a bus or a tram: a long body with rows of windows and a stripe."""
    half = 1.25
    _box(canvas, name, color, x, z, half, 0.35, height, length)
    inner = x - half if x > half else x + half if x < -half else None
    if inner is not None:
        canvas.side(name, shade(stripe, 0.72), inner, 0.35, 1.0, z, z + length)
        for dz in np.arange(0.4, length - bay, bay).tolist():
            canvas.side(name, (40, 50, 62), inner, 1.4, height - 0.6, z + dz, z + dz + bay * 0.84)
    canvas.front(name, stripe, x - half, x + half, 0.35, 1.0, z)


def bus(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    color = pick(rng, [(190, 150, 36), (168, 40, 34), (44, 96, 150)])
    _wheels(canvas, "bus", x, z, 1.2, 9)
    _coach(canvas, "bus", color, shade(color, 0.8), x, z, 3.0, 9, 1.5)
    canvas.front("bus", (44, 54, 66), x - 1.1, x + 1.1, 1.3, 2.4, z)
    canvas.front("bus", (240, 170, 60), x - 0.7, x + 0.7, 2.55, 2.85, z, glow=True)
    _lamps(canvas, "bus", x, z, 1.2, 0.6, x > 0)


def train(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    color, stripe = pick(rng, [(206, 202, 190)]), pick(rng, [(36, 110, 84), (150, 30, 40)])
    _coach(canvas, "train", color, stripe, x, z, 3.4, 24, 2.2)
    canvas.front("train", stripe, x - 1.25, x + 1.25, 3.0, 3.4, z)
    canvas.disc("train", (34, 40, 50), x, 2.0, z, 1.0, 0.8)
    canvas.disc("train", (250, 244, 214), x, 0.7, z, 0.2, glow=True)
    canvas.front("train", (50, 50, 54), x - 0.5, x + 0.5, 3.4, 3.55, z)


def person(
    canvas: Canvas, rng: Generator, x: float, z: float, name: str = "person", lift: float = 0.0
) -> None:
    """Draw a walker, or a rider, who sits ``lift`` metres higher and has bent legs."""
    shirt, trousers, skin = pick(rng, _CLOTHES), pick(rng, _CLOTHES), pick(rng, [(186, 140, 112)])
    flip, stride = rng.choice((-1, 1)), rng.uniform(0.08, 0.3)
    legs = [(-0.2, 0.9), (0.2, 0.9), (stride + 0.2, 0), (stride, 0), (0, 0.6), (-stride, 0)]
    if lift:
        legs = [(-0.25, 0.95), (0.1, 1.05), (0.42, 0.8), (0.3, 0.3), (0.14, 0.3), (0.16, 0.7)]
    body = [(-0.27, 0.85), (0.27, 0.85), (0.31, 1.3), (0.16, 1.5), (-0.16, 1.5), (-0.31, 1.3)]
    canvas.flat(name, trousers, x, z, legs, flip)
    canvas.flat(name, shirt, x, z, [(dx + lift * (y - 0.8) * 2, y + lift) for dx, y in body], flip)
    canvas.disc(name, skin, x + flip * lift * 1.5, 1.64 + lift, z, 0.14, 0.17)
    hair = shade(trousers, 0.6)
    canvas.disc(name, hair, x + flip * lift * 1.5, 1.72 + lift, z, 0.15, 0.11)


def bicycle(canvas: Canvas, rng: Generator, x: float, z: float, ridden: bool) -> None:
    color = pick(rng, [(180, 40, 36), (40, 90, 160), (200, 180, 60), (30, 30, 34)])
    for dx in (-0.62, 0.62):
        canvas.disc("bicycle", (22, 22, 24), x + dx, 0.42, z, 0.44)
        canvas.disc("bicycle", (128, 128, 130), x + dx, 0.42, z, 0.28)
    frame = [(-0.62, 0.36), (-0.3, 0.86), (0.4, 0.9), (0.66, 0.4), (0.5, 0.4), (0.0, 0.3)]
    canvas.flat("bicycle", color, x, z, frame)
    canvas.front("bicycle", (24, 24, 26), x - 0.45, x - 0.15, 0.9, 1.0, z)
    canvas.flat("bicycle", (24, 24, 26), x, z, [(0.3, 0.95), (0.6, 1.0), (0.6, 1.1), (0.3, 1.05)])
    if ridden:
        person(canvas, rng, x - 0.1, z, "rider", 0.12)


def motorcycle(canvas: Canvas, rng: Generator, x: float, z: float, ridden: bool) -> None:
    color = pick(rng, [(170, 30, 26), (34, 64, 140), (60, 62, 66)])
    for dx in (-0.72, 0.72):
        canvas.disc("motorcycle", (20, 20, 22), x + dx, 0.36, z, 0.38)
        canvas.disc("motorcycle", (150, 150, 154), x + dx, 0.36, z, 0.13)
    tail, tank = [(-0.4, 0.25), (-0.95, 0.75), (-0.6, 0.95)], [(0.0, 0.85), (0.3, 1.1)]
    fork = [(0.6, 1.05), (0.8, 0.65), (0.4, 0.25)]
    canvas.flat("motorcycle", color, x, z, tail + tank + fork)
    canvas.flat("motorcycle", (30, 30, 32), x, z, [(-0.8, 0.86), (0, 0.8), (0, 0.98), (-0.7, 1.02)])
    canvas.disc("motorcycle", (250, 240, 200), x + 0.72, 0.92, z, 0.12, glow=True)
    if ridden:
        person(canvas, rng, x - 0.2, z, "rider", 0.15)


def _mast(canvas: Canvas, rng: Generator, x: float, z: float, height: float) -> None:
    color = pick(rng, [(112, 116, 118), (72, 78, 74)])
    canvas.front("pole", color, x - 0.15, x + 0.15, 0, height, z)
    canvas.front("pole", shade(color, 1.3), x - 0.05, x + 0.04, 0, height, z)


def pole(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    _mast(canvas, rng, x, z, 6.5)
    canvas.front("pole", (110, 112, 114), *between(x, x * 0.7), 6.3, 6.5, z)


def traffic_light(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    _mast(canvas, rng, x, z, 3.2)
    canvas.front("traffic light", (30, 32, 32), x - 0.36, x + 0.36, 2.5, 4.3, z)
    lit = rng.integers(3)
    for i, color in enumerate([(250, 60, 40), (250, 180, 40), (70, 240, 120)]):
        glow = i == lit
        y = 4.0 - 0.58 * i
        canvas.disc("traffic light", color if glow else (60, 56, 52), x, y, z, 0.23, glow=glow)


def traffic_sign(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    _mast(canvas, rng, x, z, 2.6)
    kind, y = rng.integers(3), 2.9
    if kind == 0:  # prohibition
        canvas.disc("traffic sign", (196, 30, 34), x, y, z, 0.55)
        canvas.disc("traffic sign", (236, 236, 230), x, y, z, 0.38)
    elif kind == 1:  # warning
        for r, color in ((0.72, (196, 30, 34)), (0.45, (236, 236, 230))):
            triangle = [(-r, y - 0.5 * r), (r, y - 0.5 * r), (0, y + r)]
            canvas.flat("traffic sign", color, x, z, triangle)
    else:  # direction
        canvas.front("traffic sign", (236, 236, 230), x - 0.6, x + 0.6, y - 0.5, y + 0.5, z)
        canvas.front("traffic sign", (24, 76, 170), x - 0.52, x + 0.52, y - 0.42, y + 0.42, z)


def litter_bin(canvas: Canvas, rng: Generator, x: float, z: float) -> None:
    color = pick(rng, _GREYS)
    canvas.front("static", color, x - 0.3, x + 0.3, 0, 0.9, z)
    canvas.front("static", shade(color, 0.6), x - 0.34, x + 0.34, 0.85, 1.0, z)
