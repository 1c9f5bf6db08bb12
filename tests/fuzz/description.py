"""TOML files that describe a data set, whole and damaged, and lists of names."""

import json
from pathlib import Path
from random import Random
from typing import Any

from emanet_triton.data.description import dataset_from, open_dataset
from emanet_triton.errors import InputError, one_line

KEYS = ("name", "root", "images", "labels", "ignored", "classes", "splits", "ids", "color", "x")
VALUES = (0, -1, 255, 65535, 65536, 2**70, 1.5, float("nan"), True, "", "..", "/", "{name}", "a\0")
LISTS = ([], [[]], [0], ["a", "a"], [{}], {}, {"train": "val.txt"}, {"a": {}}, [255, 255, 0])
LINES = ("a", "a", "", "..", "/", "b/c", " ", "a\r", "\x1b[2J", "x" * 5000, "ö", "{name}", "*")


def attempt(seed: int, folder: Path) -> str:
    rng = Random(seed)
    content = _content(rng)
    whole = rng.random() < 0.3
    if not whole:
        for _ in range(rng.randint(0, 2)):
            _change(rng, content)
    data = "".join(f"{key} = {_toml(value)}\n" for key, value in content.items()).encode()
    if not whole and rng.random() < 0.5:
        data = _damaged(rng, data)
    path = folder / "file.toml"
    path.write_bytes(data)
    (folder / "val.txt").write_bytes(_list(rng))
    try:
        dataset, _ = open_dataset(path)  # its root may be a folder with millions of files
    except InputError as error:
        assert not whole, f"refused: {error}"
        assert one_line(str(error)) == str(error)
        return "refused"
    description = dataset.description
    if whole:
        assert {key: description[key] for key in content} == content
    _check(description)
    assert dataset_from(json.loads(json.dumps(description))).description == description
    for split in ("val", "train", ".."):
        try:
            samples = dataset.find_samples(folder, split)
        except InputError:
            continue
        names = [sample.name for sample in samples]
        assert len(set(names)) == len(names)
    return "right"


def _content(rng: Random) -> dict[str, Any]:
    """A description without any default."""
    ids = rng.sample(range(2**16), 40)
    classes = [
        {
            "name": f"class {i}",
            "color": [rng.randrange(256) for _ in range(3)],
            "ids": [ids.pop() for _ in range(rng.randint(1, 3))],
        }
        for i in range(rng.randint(1, 9))
    ]
    return {
        "name": rng.choice(("x", "große Straße", "a'b\"c\\")),
        "images": rng.choice(("{name}.jpg", "i/{split}/{name}.png", "{name}/{name}.png")),
        "labels": rng.choice(("{name}.png", "l [x]/{split}/{name}_ids.png", "{name}_{split}")),
        "ignored": [ids.pop() for _ in range(rng.randint(0, 3))],
        "classes": classes,
        "splits": rng.choice(({}, {"val": "val.txt"}, {"a b": "lists/a b.txt"})),
    }


def _change(rng: Random, content: dict[str, Any]) -> None:
    """Change, add or remove one value, also one inside a class."""
    table = rng.choice((content, content, content["classes"][0])) if content.get("classes") else {}
    if not isinstance(table, dict):
        return
    key = rng.choice(KEYS)
    if rng.random() < 0.3:
        table.pop(key, None)
    else:
        table[key] = rng.choice((*VALUES, *LISTS))
    if not isinstance(content.get("classes"), list):
        content.pop("classes", None)


def _damaged(rng: Random, data: bytes) -> bytes:
    kind = rng.randrange(4)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:place] + rng.randbytes(rng.randrange(9)) + data[place + rng.randrange(9) :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data + rng.choice((b"x = " + b"[" * 10**5, b"a." * 10**4 + b"a = 1", b"#" * 2**21))
    return data + data


def _list(rng: Random) -> bytes:
    text = "\n".join(rng.choice(LINES) for _ in range(rng.randrange(5))).encode()
    return text + rng.choice((b"", b"\n", b"\xff", b"\0"))


def _toml(value: Any) -> str:
    """A JSON value in TOML; both write strings, numbers and lists in the same way."""
    if isinstance(value, dict):
        items = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return "nan" if value != value else json.dumps(value)


def _check(description: dict[str, Any]) -> None:
    classes = description["classes"]
    names = [each["name"] for each in classes]
    assert 1 <= len(names) <= 255 and len(set(names)) == len(names)
    ids = [*description["ignored"], *(number for each in classes for number in each["ids"])]
    assert len(set(ids)) == len(ids)
    assert all(type(number) is int and 0 <= number < 2**16 for number in ids)
    assert all(each["ids"] and len(each["color"]) == 3 for each in classes)
    for pattern in (description["images"], description["labels"]):
        assert "{name}" in pattern and ".." not in pattern.split("/") and pattern[0] != "/"
