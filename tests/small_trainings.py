"""Trainings of some small iterations, on scenes that take no time to draw."""

from emanet_triton.data.png import write_png
from emanet_triton.data.scenes.generate import generate_scene


def write_small_scenes(root, train=6, val=2, size=(64, 128)):
    """Scenes in Cityscapes layout, small enough for a training of some iterations."""
    for split, count, first in (("train", train, 0), ("val", val, 10**6)):
        for i in range(count):
            image, label_ids = generate_scene(first + i, *size)
            for tree, kind, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", label_ids),
            ):
                path = root / tree / split / "town" / f"town_000000_{i:06d}_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, pixels)
    return root


def options(data, **changed):
    """The command's arguments. A value of ``None`` leaves an option out, ``True`` is a flag."""
    usual = {
        "data": data,
        "model": "emanet_demo",
        "init": "emanet_demo",
        "iterations": 4,
        "batch-size": 2,
        "crop": "32x64",
        "scale": "128x64",
        "lr": 0.001,
        "log-every": 2,
        "val-every": 2,
        "save-every": 1,
        "keep-every": 100,
        "workers": 0,
        "threads": 1,
    }
    arguments = []
    for name, value in (usual | {k.replace("_", "-"): v for k, v in changed.items()}).items():
        if value is not None:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments
