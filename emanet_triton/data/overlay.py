"""Predicted classes as pictures: colours, an overlay on the image, a legend."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import IGNORE, Color, Dataset
from emanet_triton.data.public import find_dataset

ALPHA = 0.65  # default opacity of the class colours over the image
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
_MIN_SIDE = 320  # pixels of an overlay's longer side; a smaller one is enlarged so that text fits
_FONT = cv2.FONT_HERSHEY_SIMPLEX

Entry = tuple[str, Color]  # of a legend: a name and its colour


_HIGHEST_LINE = 200  # pixels: the legend of a very wide picture would else need gigabytes


@dataclass(frozen=True)
class Text:
    """Sizes of captions and legend.

    Attributes:
        line: height of a line in pixels.
        scale: OpenCV's font scale.
        thickness: of the strokes in pixels.
    """

    line: int
    scale: float
    thickness: int

    @classmethod
    def for_width(cls, width: int) -> "Text":
        """Text of a size that suits a picture of this width in pixels."""
        line = min(max(20, round(width / 48)), _HIGHEST_LINE)
        return cls(line, scale=line / 42, thickness=max(1, line // 20))


def class_names(dataset: Dataset | str = CITYSCAPES) -> tuple[str, ...]:
    """The names of a data set's classes, in the order of the labels.

    ``dataset`` may be a name of ``list_models``, such as "ade20k"; another name is an InputError.
    """
    return tuple(each.name for each in find_dataset(dataset).classes)


def palette(dataset: Dataset | str = CITYSCAPES) -> np.ndarray:
    """The colours of a data set's classes, uint8 RGB [classes, 3], in the order of the labels.

    ``dataset`` may be a name of ``list_models``, such as "ade20k"; another name is an InputError.
    """
    return np.array([each.color for each in find_dataset(dataset).classes], np.uint8)


def colored(
    labels: np.ndarray, dataset: Dataset = CITYSCAPES, classes: Collection[str] | None = None
) -> np.ndarray:
    """The colours of labels, and black where a label is no class or is not shown.

    Args:
        labels: uint8 class indices [H, W].
        dataset: whose classes the labels are.
        classes: the names of the classes to show; by default all.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        ValueError: a name is no class of the data set.
    """
    shown = _shown(dataset, classes)
    return paint(labels, palette(dataset) * shown[:, None])


def paint(labels: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """uint8 labels [H, W] in the colours of ``colors``, uint8 [classes, 3]; others are black."""
    table = np.zeros((2**8, 3), np.uint8)
    table[: len(colors)] = colors
    return np.take(table, labels, axis=0)


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    dataset: Dataset | str = CITYSCAPES,
    *,
    alpha: float = ALPHA,
    legend: bool = True,
    classes: Collection[str] | None = None,
) -> np.ndarray:
    """Paint the classes over the image; pixels without a shown class keep their own colour.

    With a legend, an image of fewer than 320 pixels in width and height is enlarged by a whole
    number.

    Args:
        image: uint8 RGB [H, W, 3].
        labels: uint8 class indices [H, W], as ``segment`` returns them.
        dataset: whose classes the labels are: a data set, or its name such as "ade20k".
        alpha: opacity of the colours, 0 to 1.
        legend: name the classes that are in the picture below it.
        classes: the names of the classes to paint; by default all.

    Returns:
        uint8 RGB: [H, W, 3], and with a legend higher and perhaps enlarged.

    Raises:
        InputError: there is no data set of this name.
        ValueError: an array has another shape or dtype, the sizes differ, ``alpha`` is out of
            range, a name is no class, or a label below 255 is none.
    """
    dataset = find_dataset(dataset)
    _check(image, "image", (3,))
    _check(labels, "labels", ())
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels {labels.shape} differ in size from the image {image.shape}")
    if (largest := labels[labels != IGNORE].max(initial=0)) >= len(dataset.classes):
        raise ValueError(
            f"labels hold {largest}, but {dataset.name} has {len(dataset.classes)} classes; give "
            "the data set of the labels: overlay(image, labels, dataset)"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0 to 1, got {alpha}")
    table = np.zeros(2**8, np.uint8)
    shown = _shown(dataset, classes)
    table[: len(shown)] = shown
    painted = cv2.addWeighted(colored(labels, dataset, classes), alpha, image, 1 - alpha, 0)
    mask = np.take(table, labels)
    if not mask.all():
        painted = np.where(mask[:, :, None], painted, image)
    if not legend:
        return painted
    there = np.bincount(labels.ravel(), minlength=len(shown))[: len(shown)] > 0
    entries = legend_entries(dataset, classes)
    names = {each.name for each, is_there in zip(dataset.classes, there, strict=True) if is_there}
    return with_legend(painted, [entry for entry in entries if entry[0] in names])


def legend_entries(dataset: Dataset, classes: Collection[str] | None = None) -> list[Entry]:
    """Name and colour of the classes, or of those with these names, in the order of the labels."""
    return [(c.name, c.color) for c in dataset.classes if classes is None or c.name in classes]


def with_legend(picture: np.ndarray, entries: Sequence[Entry]) -> np.ndarray:
    """The picture, uint8 RGB [H, W, 3], above a legend; without entries the picture alone."""
    if not entries:
        return picture
    picture = enlarge(picture, max(1, -(-_MIN_SIDE // max(picture.shape[:2]))))
    width = picture.shape[1]
    return stack(picture, draw_legend(entries, width, Text.for_width(width)))


def enlarge(picture: np.ndarray, zoom: int) -> np.ndarray:
    """Every pixel ``zoom`` times as wide and high, so that it keeps its colour."""
    return picture if zoom == 1 else picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_legend(entries: Sequence[Entry], width: int, text: Text) -> np.ndarray:
    """A swatch and a name for each entry, in as many columns as fit into the width."""
    swatch = text.line
    widths = [cv2.getTextSize(name, _FONT, text.scale, text.thickness)[0][0] for name, _ in entries]
    cell = max(widths) + 2 * swatch + swatch // 2
    columns = max(1, width // cell)
    rows = -(-len(entries) // columns)
    pitch = round(1.4 * text.line)
    legend = np.full((rows * pitch + text.line // 2, max(width, cell), 3), 255, np.uint8)
    for i, (name, color) in enumerate(entries):
        x, y = i % columns * cell + swatch // 4, i // columns * pitch + text.line // 4
        cv2.rectangle(legend, (x, y), (x + swatch, y + swatch), color, cv2.FILLED)
        write(legend, name, x + swatch + swatch // 3, y, text)
    return legend


def write(canvas: np.ndarray, words: str, x: int, y: int, text: Text) -> None:
    """Write a line of black text onto the canvas; (x, y) is its top left corner."""
    baseline = y + round(0.75 * text.line)
    cv2.putText(canvas, words, (x, baseline), _FONT, text.scale, BLACK, text.thickness, cv2.LINE_AA)


def stack(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Put one picture above the other, and fill up the narrower one with white on its right."""
    width = max(upper.shape[1], lower.shape[1])
    filled = [
        cv2.copyMakeBorder(part, 0, 0, 0, width - part.shape[1], cv2.BORDER_CONSTANT, value=WHITE)
        for part in (upper, lower)
    ]
    return np.concatenate(filled)


def _check(array: object, name: str, channels: tuple[int, ...]) -> None:
    """Raise ValueError if this is no uint8 array [H, W, *channels]."""
    if isinstance(array, np.ndarray):
        if array.dtype == np.uint8 and array.shape == (*array.shape[:2], *channels):
            return
        found = f"{array.dtype} {list(array.shape)}"
    else:
        found = f"a {type(array).__name__}"
    wanted = ", ".join(["H", "W", *map(str, channels)])
    raise ValueError(f"{name} must be a NumPy array, uint8 [{wanted}], got {found}")


def _shown(dataset: Dataset, names: Collection[str] | None) -> np.ndarray:
    """Whether each class of the data set is shown, bool [classes]."""
    known = class_names(dataset)
    if unknown := set(names or ()) - set(known):
        raise ValueError(
            f"no class of {dataset.name}: {', '.join(sorted(unknown))}; expected some of: "
            + ", ".join(known)
        )
    return np.array([names is None or name in names for name in known])
