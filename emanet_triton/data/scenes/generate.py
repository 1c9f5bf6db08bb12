"""Synthetic street scenes in Cityscapes layout, for a demonstration that needs no download."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emanet_triton.cache_folder import cache_folder
from emanet_triton.command import Parser, answer, program, run
from emanet_triton.data.dataset import visible
from emanet_triton.data.png import write_png
from emanet_triton.data.scenes import objects
from emanet_triton.data.scenes.canvas import (
    DISC,
    LEAFY,
    UNIT,
    Canvas,
    Color,
    between,
    photograph,
    pick,
    shade,
)
from emanet_triton.errors import InputError
from emanet_triton.files import remove_leftovers, temporary_beside

VERSION = 1  # of the demonstration set; increase it when the pixels change
DEMO_COUNT = 40
CITY, TREES = "synthetic", ("leftImg8bit", "gtFine")
TRAIN_SEEDS = range(10**6)
VAL_SEEDS = range(10**6, 2 * 10**6)
_SPLIT_SEEDS = {"train": TRAIN_SEEDS, "val": VAL_SEEDS}


def generate_scene(seed: int, height: int = 256, width: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Draw the street scene of a seed.

    Args:
        seed: at least 0; no seed is in both ``TRAIN_SEEDS`` and ``VAL_SEEDS``.
        height, width: of the image in pixels.

    Returns:
        The image, uint8 RGB [H, W, 3], and its Cityscapes label ids, uint8 [H, W]. The labels
        are the same on every machine.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    canvas = Canvas(rng, height, width)
    _draw_street(canvas, rng)
    return photograph(canvas, rng), canvas.labels()


def write_scenes(root: Path, split: str, count: int, seed: int = 0) -> None:
    """Write scenes as a Cityscapes split of one city, ``synthetic``.

    Args:
        root: the folder that gets ``leftImg8bit`` and ``gtFine``.
        split: ``"train"`` or ``"val"``; no scene is in both.
        count: number of scenes.
        seed: of the first scene, counted from the first seed of the split.

    Raises:
        InputError: an argument is out of range, the folder holds other data, which would be
            evaluated together with the scenes, or a file cannot be written.
    """
    if split not in _SPLIT_SEEDS or count < 1 or seed < 0:
        raise InputError(
            f"split '{split}', count {count}, seed {seed}: expected one of "
            f"{', '.join(_SPLIT_SEEDS)}, at least 1 scene and a seed of at least 0"
        )
    _refuse_other_data(root)
    folders = [root / tree / split / CITY for tree in TREES]
    for folder in folders:
        _make_folder(folder)
    for i, scene_seed in enumerate(_SPLIT_SEEDS[split][seed : seed + count]):
        image, label_ids = generate_scene(scene_seed)
        name = f"{CITY}_000000_{i:06d}"
        write_png(folders[0] / f"{name}_leftImg8bit.png", image)
        write_png(folders[1] / f"{name}_gtFine_labelIds.png", label_ids)


def demo_dataset() -> Path:
    """The root of the held-out demonstration set; the first call makes it in ``cache_folder()``.

    The set appears there whole or not at all, even if two processes make it at the same time.

    Raises:
        InputError: the cache cannot be written.
    """
    cache = cache_folder()
    root = cache / f"scenes-v{VERSION}"
    if root.is_dir():
        return root
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_leftovers(cache)
        temporary = temporary_beside(root)
        temporary.mkdir()
    except OSError as error:
        raise InputError(
            f"{cache}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a writable "
            "folder"
        ) from error
    try:
        write_scenes(temporary, "val", DEMO_COUNT)
        temporary.rename(root)
    except OSError:
        if not root.is_dir():  # otherwise another process has just made the same set
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _refuse_other_data(root: Path) -> None:
    """Raise InputError if the folders hold anything that ``write_scenes`` does not write."""
    try:
        other = next(_other_data(root), None)
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error})") from None
    if other:
        raise InputError(
            f"{root}: holds other data ({other}); expected a folder of its own for generated scenes"
        )


def _other_data(root: Path) -> Iterator[Path]:
    """Files of other data, and folders of other cities. Hidden files are no data."""
    ours = re.compile(rf"{CITY}_000000_\d{{6,}}_(leftImg8bit|gtFine_labelIds)\.png")
    splits = [split for tree in TREES for split in _inside(root / tree)]
    for city in (city for split in splits for city in _inside(split)):
        yield from (file for file in _inside(city) if not ours.fullmatch(file.name))
        if city.name != CITY:
            yield city


def _inside(folder: Path) -> Iterator[Path]:
    return visible(folder) if folder.is_dir() else iter(())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error


_Draw = Callable[..., None]  # a function of ``objects``


class _Thing(NamedTuple):
    """An object of a scene. A scene is drawn in the order of ``depth``, the farthest first."""

    depth: float
    draw: _Draw
    x: float
    z: float
    rest: tuple = ()


def _draw_street(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw a whole scene, from far to near."""
    season = rng.uniform()  # from spring green to dry yellow
    leaves = (52 + 62 * season, 92 - 10 * season, 36 - 6 * season)
    grass = (84 + 70 * season, 122 + 4 * season, 54 + 6 * season)
    _draw_backdrop(canvas, rng, leaves)
    road, walk = rng.uniform(3.6, 5.2, 2), rng.uniform(2.2, 3.4, 2)
    asphalt, paving = pick(rng, [(84, 84, 88)], 0.15), pick(rng, [(132, 126, 122)], 0.1)
    canvas.ground("terrain", grass, -60, 60, texture=LEAFY)
    edges = []
    for flip, half, width in zip((-1, 1), road, walk, strict=True):
        canvas.ground("sidewalk", paving, flip * half, flip * (half + width))
        for z in np.arange(2.0, 30.0, 1.5).tolist():
            x = between(flip * half, flip * (half + width))
            canvas.ground("sidewalk", shade(paving, 0.88), *x, z, z + 0.06)
        edges.append(half + width)
    canvas.ground("road", asphalt, -road[0], road[1])
    for flip, half in zip((-1, 1), road, strict=True):
        canvas.ground("sidewalk", shade(paving, 1.25), flip * half, flip * (half + 0.22))
    middle = (road[1] - road[0]) / 2
    for z in np.arange(rng.uniform(1.5, 4), 50, 5).tolist():
        canvas.ground("road", (205, 205, 200), middle - 0.08, middle + 0.08, z, z + 2.4)
    if rng.uniform() < 0.3:
        z = rng.uniform(5, 9)
        for x in np.arange(-road[0] + 0.4, road[1] - 0.5, 1.0).tolist():
            canvas.ground("road", (205, 205, 200), x, x + 0.5, z, z + 2.5)
    things = []
    for flip, edge in zip((-1, 1), edges, strict=True):
        things += _frontage(rng, flip, edge, leaves)
    things += _traffic(canvas, rng, road) + _kerbside(rng, road, walk, leaves)
    for thing in sorted(things, key=lambda thing: -thing.depth):
        thing.draw(canvas, rng, thing.x, thing.z, *thing.rest)
    _draw_border(canvas, rng)


def _draw_backdrop(canvas: Canvas, rng: np.random.Generator, leaves: Color) -> None:
    """Sky with clouds, and a far skyline of buildings and trees."""
    right = canvas.index.shape[1] / canvas.scale
    sky = pick(rng, [(124, 164, 216), (178, 186, 196), (196, 200, 204)], 0.1)
    for i in range(16):
        top = canvas.horizon * i / 16
        box = [(-9, top), (right + 9, top), (right + 9, UNIT), (-9, UNIT)]
        canvas.pixels("sky", shade(sky, 0.9 + 0.2 * i / 16), box)
    for _ in range(rng.integers(0, 6)):
        x, y, w = rng.uniform(0, right), rng.uniform(4, 80), rng.uniform(18, 50)
        for dx, dy, r in rng.uniform((-1, -0.2, 0.2), (1, 0.2, 0.6), (5, 3)):
            points = [(x + w * (dx + r * c), y + w * (dy + 0.35 * r * s)) for c, s in DISC]
            canvas.pixels("sky", shade(sky, 1.18), points)
    for x in np.arange(-80.0, 80.0, 8.0).tolist():
        if rng.uniform() < 0.55:
            color = pick(rng, objects.FACADES)
            canvas.front("building", color, x, x + 9, 0, rng.uniform(6, 24), 88)
        else:
            canvas.disc("vegetation", leaves, x, 2, 86, 6, rng.uniform(4, 9), LEAFY)


def _frontage(rng: np.random.Generator, flip: int, edge: float, leaves: Color) -> list[_Thing]:
    """The buildings, walls, fences and plants along one side of the street."""
    things, z = [], rng.uniform(3.0, 6.0)
    verge = rng.uniform(1.5, 3.5) if rng.uniform() < 0.7 else 0.0
    lit = rng.uniform(0.6, 1.05)  # the sun lights the whole side
    low = (objects.wall, objects.fence)
    walls = np.array([objects.building, *low, objects.hedge, *low], object)
    kinds = list(rng.permutation(walls))
    while z < 60:
        kind = kinds.pop() if kinds else objects.building
        length = rng.uniform(7, 12) if kind is objects.building else rng.uniform(5, 8)
        x = flip * (edge + verge + rng.uniform(0, 0.6))
        things.append(_Thing(z + length, kind, x, z, (z + length, lit, leaves)))
        z += length + rng.choice([0.0, 0.0, 2.5])
    for _ in range(3):  # behind walls and fences
        z = rng.uniform(12, 45)
        x = flip * (edge + verge + rng.uniform(4, 14))
        if rng.uniform() < 0.6:
            things.append(_Thing(z + 20, objects.tree, x, z, (leaves, rng.uniform(1.2, 2.0))))
        else:
            x += flip * 4
            things.append(_Thing(z + 20, objects.building, x, z, (z + 10, lit, leaves)))
    return things


def _traffic(canvas: Canvas, rng: np.random.Generator, road: np.ndarray) -> list[_Thing]:
    """Vehicles and riders on the road, parked cars, and a tram beside or on it."""
    things, left, right = [], -road[0], road[1]
    middle = (left + right) / 2
    for lane in ((left + middle) / 2, (middle + right) / 2):
        z = rng.uniform(7, 16)
        while z < 45:
            kind = (objects.car, objects.truck, objects.bus)[rng.choice(3, p=(0.35, 0.4, 0.25))]
            things.append(_Thing(z, kind, lane + rng.uniform(-0.3, 0.3), z))
            z += rng.uniform(9, 20) + (0 if kind is objects.car else 4)
    for x in (left + 1.0, right - 1.0):
        for z in np.arange(rng.uniform(4, 8), 30, 5.6).tolist():
            if rng.uniform() < 0.5:
                things.append(_Thing(z, objects.car, x, z))
    if rng.uniform() < 0.6:
        flip = rng.choice((-1, 1))
        x, z = flip * rng.uniform(1.6, 3.4) + middle, rng.uniform(8, 18)
        for rail in (x - 0.7, x + 0.7):
            canvas.ground("rail track", (112, 104, 98), rail - 0.07, rail + 0.07)
        things = [t for t in things if t.x * flip < middle * flip or t.z < z - 6]
        things.append(_Thing(z, objects.train, x, z))
    for bike in (objects.bicycle, objects.motorcycle):
        if rng.uniform() < 0.85:
            z = rng.uniform(4.5, 8)
            x = rng.uniform(max(left, -z * 0.8) + 0.5, min(right, z * 0.8) - 0.5)
            things.append(_Thing(z, bike, x, z, (True,)))
    return things


def _kerbside(
    rng: np.random.Generator, road: np.ndarray, walk: np.ndarray, leaves: Color
) -> list[_Thing]:
    """People, parked bikes, poles, lights, signs, trees and bins on both sidewalks."""
    things = []
    for flip, half, width in zip((-1, 1), road, walk, strict=True):
        depths = list(rng.uniform(6.5, 11, 5) + rng.permutation(5) * 2.2)
        furniture = (objects.pole, objects.traffic_light, objects.traffic_sign)
        kinds: tuple[_Draw, ...] = (*furniture, objects.tree, objects.litter_bin)
        for kind, z in zip(kinds, depths, strict=True):
            x = flip * (half + rng.uniform(0.2, 0.6))
            if kind is objects.tree:
                x += flip * width
                things.append(_Thing(z, kind, x, z, (leaves, rng.uniform(0.7, 1.1))))
            else:
                things.append(_Thing(z, kind, x, z))
        for kind, chance in ((objects.bicycle, 0.6), (objects.motorcycle, 0.5)):
            if rng.uniform() < chance:
                z = rng.uniform(6, 12)
                x = flip * (half + rng.uniform(0.6, width))
                things.append(_Thing(z, kind, x, z, (False,)))
        for z in rng.uniform(5, 18, rng.integers(1, 5)):
            x = flip * (half + rng.uniform(0.4, width))
            things.append(_Thing(z, objects.person, x, z))
    return things


def _draw_border(canvas: Canvas, rng: np.random.Generator) -> None:
    """Draw the camera car's bonnet and the border of the image; neither has a class."""
    right = canvas.index.shape[1] / canvas.scale
    if rng.uniform() < 0.5:
        top = rng.uniform(236, 248)
        bonnet = [(right * (0.5 + 0.46 * c), 262 - (262 - top) * s) for c, s in DISC[:9]]
        canvas.pixels("ego vehicle", pick(rng, [(30, 32, 36), (90, 92, 96)]), bonnet, z=1.0)
    for x in (0, right - 1.5):
        box = [(x, 0), (x + 1.5, 0), (x + 1.5, UNIT), (x, UNIT)]
        canvas.pixels("out of roi", (20, 20, 20), box, z=1.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 if the input cannot be used."""
    return answer(lambda: _main(arguments))


def _main(given: list[str] | None) -> int:
    parser = Parser(
        prog=program("data.scenes.generate"),
        description="Write synthetic scenes in Cityscapes layout.",
    )
    parser.add_argument("out", type=Path, help="the folder that gets leftImg8bit and gtFine")
    parser.add_argument("--split", choices=_SPLIT_SEEDS, default="val")
    parser.add_argument("--count", type=int, default=DEMO_COUNT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    write_scenes(arguments.out, arguments.split, arguments.count, arguments.seed)
    return 0


if __name__ == "__main__":
    run(main)
