"""Pascal VOC 2012, semantic segmentation: 21 classes, the background among them."""

from pathlib import Path

from emanet_triton.data.dataset import Class, Color, Found, visible
from emanet_triton.data.labelled import Ids, labelled_pictures
from emanet_triton.data.layout import Layout

_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
_IMAGES, _LABELS, _LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"


def voc_color(index: int) -> Color:
    """The colour of a class in Pascal VOC, by the index of the class, 0 to 255."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    red, green, blue = channels
    return red, green, blue


def find_files(root: Path, split: str) -> Found:
    """The images and labels of a split, see ``Dataset.find_files``.

    Images lie at ``JPEGImages/<name>.jpg``, labels at ``SegmentationClass/<name>.png``.
    ``ImageSets/Segmentation/<split>.txt`` lists the names.
    """
    folder = root / _LISTS
    if not folder.is_dir():
        return {}, {}, [f"{folder} is missing{_nearer(root)}"]
    lists = {path.stem: f"{_LISTS}/{path.name}" for path in visible(folder) if _is_list(path)}
    if split not in lists:
        known = ", ".join(sorted(lists)) or "nothing"
        return {}, {}, [f"{folder} has no list '{split}.txt', it has: {known}"]
    layout = Layout(f"{_IMAGES}/{{name}}.jpg", f"{_LABELS}/{{name}}.png", lists)
    return layout.find_files(root, split)


def _is_list(path: Path) -> bool:
    return path.suffix == ".txt"


def _nearer(root: Path) -> str:
    """Names the folder that was probably meant: the archive holds ``VOCdevkit/VOC2012``."""
    for inside in ("VOC2012", "VOCdevkit/VOC2012"):
        if (root / inside / _LISTS).is_dir():
            return f"; expected {root / inside} as the root"
    return ""


CLASSES = tuple(Class(name, voc_color(index)) for index, name in enumerate(_NAMES))
VOC2012 = labelled_pictures(
    "Pascal VOC 2012",
    CLASSES,
    (_IMAGES, _LABELS, _LISTS),
    find_files,
    Ids.counted(len(CLASSES)),  # 255 are the borders of objects, and objects that are hard to see
    published_on=("val", 1449),
)
