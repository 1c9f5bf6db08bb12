"""The canvas of a synthetic scene: flat faces of a simple world, and the image of them.

World coordinates are in metres: X to the right of the camera, Y above the road, Z ahead. Faces are
painted from far to near into one index image. A table has a row for each face: label id, colour,
texture and distance. ``photograph`` adds light, haze and the effects of a camera.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from emanet_triton.data.cityscapes import CLASSES

Color = tuple[float, float, float]
Points = Sequence[tuple[float, ...]]

PLAIN, ROUGH, LEAFY = range(3)  # textures
CAMERA = 1.6  # metres above the road
UNIT = 256  # height in pixels for which scenes are composed; other heights are scaled
DISC = [(math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)]

_IDS = {c.name: c.label_id for c in CLASSES} | {
    "ego vehicle": 1,
    "out of roi": 3,
    "static": 4,
    "rail track": 10,
}
_SUPERSAMPLING = 2
_FOCAL = 256.0  # pixels
_NEAR, _FAR = 1.4, 90.0  # metres
_SKY = 120.0  # metres of haze before the sky
_FROM_ROW = 0.0  # stands for the distance of a face on the ground, which varies by row
_COARSE, _FINE = 24, 5  # sizes of texture spots, in pixels of the supersampled image
# Strength of the coarse and of the fine spots of each texture.
_TEXTURE = np.array([(0.0, 0.02), (0.16, 0.06), (0.22, 0.3)], np.float32)


class Canvas:
    """An index image, into which faces are painted from far to near, and the table of faces."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.scale = _SUPERSAMPLING * height / UNIT
        self.index = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.int32)
        self.horizon = rng.uniform(96, 118)
        self.vanishing = UNIT * width / height * rng.uniform(0.36, 0.64)
        self.rows: list[tuple[int, float, float, float, int, float, bool]] = []

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Project a point of the world, in metres, to pixels of the unit image."""
        return self.vanishing + _FOCAL * x / z, self.horizon + _FOCAL * (CAMERA - y) / z

    def pixels(
        self,
        name: str,
        color: Color,
        points: Points,
        texture: int = PLAIN,
        z: float = math.inf,
        glow: bool = False,
    ) -> None:
        """Paint a polygon given in pixels of the unit image; ``glow`` is for lamps."""
        self.rows.append((_IDS[name], *color, texture, z, glow))
        polygon = np.floor(np.array(points) * self.scale + 0.5).astype(np.int32)
        cv2.fillPoly(self.index, [polygon], len(self.rows) - 1)

    def face(
        self, name: str, color: Color, points: Points, texture: int = PLAIN, glow: bool = False
    ) -> None:
        """Paint a polygon of the world, [(X, Y, Z), ...]; every Z must be positive."""
        z = sum(p[2] for p in points) / len(points)
        self.pixels(name, color, [self.project(*p) for p in points], texture, z, glow)

    def ground(
        self,
        name: str,
        color: Color,
        x0: float,
        x1: float,
        z0: float = _NEAR,
        z1: float = _FAR,
        texture: int = ROUGH,
    ) -> None:
        """Paint a rectangle of the ground."""
        points = [(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)]
        self.pixels(name, color, [self.project(*p) for p in points], texture, _FROM_ROW)

    def side(
        self,
        name: str,
        color: Color,
        x: float,
        y0: float,
        y1: float,
        z0: float,
        z1: float,
        texture: int = PLAIN,
        glow: bool = False,
    ) -> None:
        """Paint an upright rectangle along the street."""
        self.face(name, color, [(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], texture, glow)

    def front(
        self,
        name: str,
        color: Color,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        z: float,
        texture: int = PLAIN,
        glow: bool = False,
    ) -> None:
        """Paint a rectangle that faces the camera."""
        self.face(name, color, [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], texture, glow)

    def flat(
        self, name: str, color: Color, x: float, z: float, outline: Points, flip: int = 1
    ) -> None:
        """Paint an outline [(X, Y), ...] relative to (x, 0), facing the camera."""
        self.face(name, color, [(x + flip * dx, y, z) for dx, y in outline])

    def disc(
        self,
        name: str,
        color: Color,
        x: float,
        y: float,
        z: float,
        rx: float,
        ry: float | None = None,
        texture: int = PLAIN,
        glow: bool = False,
    ) -> None:
        """Paint an ellipse that faces the camera; a circle without ``ry``."""
        points = [(x + c * rx, y + s * (ry or rx), z) for c, s in DISC]
        self.face(name, color, points, texture, glow)

    def labels(self) -> np.ndarray:
        """Label ids, uint8 [H, W]."""
        table = np.array([row[0] for row in self.rows], np.uint8)
        return table[self.index[::_SUPERSAMPLING, ::_SUPERSAMPLING]]


def shade(color: Color, factor: float) -> Color:
    """The colour, brighter by a factor."""
    red, green, blue = color
    return red * factor, green * factor, blue * factor


def between(a: float, b: float) -> tuple[float, float]:
    """The smaller and the larger number."""
    return (a, b) if a <= b else (b, a)


def pick(rng: np.random.Generator, colors: Sequence[Color], spread: float = 0.12) -> Color:
    """Pick one of the colours, and vary its brightness and, a little, its hue."""
    color = colors[int(rng.integers(len(colors)))]
    factors = rng.uniform(1 - spread, 1 + spread) * rng.uniform(0.95, 1.05, 3)
    red, green, blue = (float(c * f) for c, f in zip(color, factors, strict=True))
    return red, green, blue


def photograph(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The canvas as a camera sees it, uint8 RGB [H, W, 3]."""
    table = np.array(canvas.rows, np.float32)
    image: np.ndarray = table[:, 1:4][canvas.index] / 255
    image *= _texture(canvas, table[:, 4], rng)
    # Exposure and colour range from noon to dusk and street lamps.
    warmth, tint = rng.uniform(-0.42, 0.42), rng.uniform(-0.16, 0.16)
    exposure = 2 ** rng.uniform(-1.6, 0.7)
    light = exposure * np.array([1 + warmth, 1 + tint, 1 - warmth], np.float32)
    image *= np.where(table[:, 6:] > 0, np.float32(1), light)[canvas.index]
    # Haze thickens exponentially with distance.
    density = rng.uniform(0, 0.05) * rng.uniform()
    clear = np.exp(-density * _distance(canvas, table[:, 5]))[..., None].astype(np.float32)
    image = image * clear + (1 - clear) * 0.75 * light
    # The camera adds contrast, blur, pixels and noise.
    image = np.clip(image, 0, None) ** np.float32(rng.uniform(0.8, 1.25))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.4))
    height, width = (size // _SUPERSAMPLING for size in canvas.index.shape)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) * 255
    image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(1, 6)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _texture(canvas: Canvas, kinds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Factors near 1 with which textures change the colours, float32 [2H, 2W, 1]."""
    coarse, fine = (_noise(rng, canvas.index.shape, cell) for cell in (_COARSE, _FINE))
    strength = _TEXTURE[kinds.astype(int)][canvas.index]
    return (1 + strength[..., 0] * coarse + strength[..., 1] * fine)[..., None]


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise in [-1, 1], float32 of the given shape, with spots of ``cell`` pixels."""
    height, width = shape
    grid = rng.uniform(-1, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)


def _distance(canvas: Canvas, distances: np.ndarray) -> np.ndarray:
    """The distance of each pixel from the camera in metres, float32 [2H, 2W]."""
    below = (np.arange(canvas.index.shape[0]) + 0.5) / canvas.scale - canvas.horizon
    ground = (_FOCAL * CAMERA / np.maximum(below, 1)).astype(np.float32)
    distance = distances[canvas.index]
    distance = np.where(distance == _FROM_ROW, ground[:, None], distance)
    return np.minimum(distance, _SKY)
