"""Overlays: image, prediction, label and error side by side with a class legend.

Only the functions that draw import torchvision: the import takes a second and 90 MB, and few
evaluations draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
import torch

from emanet_triton.data.dataset import IGNORE, Class, Color

_ALPHA = 0.65  # opacity of the class colours over the image
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_MIN_PANEL = 320  # pixels of a panel's longer side; a smaller image is enlarged so that text fits
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class _Text:
    """Sizes of captions and legend.

    Attributes:
        line: height of a line in pixels.
        scale: OpenCV's font scale.
        thickness: of the strokes in pixels.
    """

    line: int
    scale: float
    thickness: int


def overlay(
    image: np.ndarray, prediction: np.ndarray, label: np.ndarray | None, classes: Sequence[Class]
) -> np.ndarray:
    """Draw image and prediction side by side; below them label and error if there is a label.

    The error panel is pale grey where the prediction is right, nearly black where the label is
    ignored, and has ``wrong_color`` elsewhere. The legend names the classes in the prediction and
    the label. An image of fewer than 320 pixels in width and height is enlarged.

    Args:
        image: uint8 RGB [H, W, 3].
        prediction: uint8 train ids [H, W].
        label: uint8 train ids [H, W] with ``IGNORE``, or None.
        classes: of the data set, in the order of the train ids.

    Returns:
        uint8 RGB [H', W', 3].

    Raises:
        ValueError: the sizes differ.
    """
    from torchvision.utils import make_grid

    if any(ids is not None and ids.shape != image.shape[:2] for ids in (prediction, label)):
        raise ValueError(f"prediction or label differs in size from the image {image.shape}")
    panels = {"image": image, "prediction": _paint(image, prediction, classes)}
    legend = [(c.name, c.color) for i, c in enumerate(classes) if _holds(i, prediction, label)]
    if label is not None:
        wrong = wrong_color(classes)
        panels["label"] = _paint(image, label, classes)
        panels["error"] = _paint_errors(image, prediction, label, wrong)
        legend += [("ignored", _BLACK), ("wrong", wrong)]

    # Enlarged by a whole number, so that every pixel keeps its colour.
    zoom = max(1, -(-_MIN_PANEL // max(image.shape[:2])))
    line = max(20, round(zoom * image.shape[1] / 48))
    text = _Text(line, scale=line / 42, thickness=max(1, line // 20))
    captioned = [_caption(_enlarge(panel, zoom), name, text) for name, panel in panels.items()]
    grid = make_grid([_tensor(panel) for panel in captioned], nrow=2, padding=4, pad_value=255)
    return _stack(_array(grid), _legend(legend, grid.shape[2], text))


def wrong_color(classes: Sequence[Class]) -> Color:
    """The colour of wrong pixels: of 24 colours the farthest from the colours of all classes.

    None of the 24 colours is grey, because right pixels are grey.
    """
    levels = 0, 128, 255
    colors = [(r, g, b) for r, g, b in product(levels, repeat=3) if not r == g == b]
    return max(colors, key=lambda color: min(math.dist(color, c.color) for c in classes))


def _holds(train_id: int, *maps: np.ndarray | None) -> bool:
    return any(ids is not None and (ids == train_id).any() for ids in maps)


def _paint(image: np.ndarray, ids: np.ndarray, classes: Sequence[Class]) -> np.ndarray:
    """The image, covered with the colours of its classes, and with black where it has no class."""
    palette = np.zeros((2**8, 3), np.uint8)
    palette[: len(classes)] = [c.color for c in classes]
    return cv2.addWeighted(palette[ids], _ALPHA, image, 1 - _ALPHA, 0)


def _paint_errors(
    image: np.ndarray, prediction: np.ndarray, label: np.ndarray, color: Color
) -> np.ndarray:
    """The image in pale grey, coloured where it is wrong and nearly black where it is ignored."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    from torchvision.utils import draw_segmentation_masks

    ignored = label == IGNORE
    wrong = (prediction != label) & ~ignored
    masks = torch.from_numpy(np.stack([wrong, ignored]))
    pale = _tensor(128 + grey // 2)
    return _array(draw_segmentation_masks(pale, masks, alpha=0.85, colors=[color, _BLACK]))


def _enlarge(panel: np.ndarray, zoom: int) -> np.ndarray:
    return panel.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _caption(panel: np.ndarray, name: str, text: _Text) -> np.ndarray:
    bar = np.full((text.line, panel.shape[1], 3), 255, np.uint8)
    _write(bar, name, text.line // 4, 0, text)
    return np.concatenate([bar, panel])


def _legend(entries: list[tuple[str, Color]], width: int, text: _Text) -> np.ndarray:
    """Draw a swatch and a name for each entry, in as many columns as fit into the width."""
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
        _write(legend, name, x + swatch + swatch // 3, y, text)
    return legend


def _write(canvas: np.ndarray, words: str, x: int, y: int, text: _Text) -> None:
    """Write a line of black text onto the canvas; (x, y) is its top left corner."""
    baseline = y + round(0.75 * text.line)
    cv2.putText(
        canvas, words, (x, baseline), _FONT, text.scale, _BLACK, text.thickness, cv2.LINE_AA
    )


def _stack(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Put one picture above the other, and fill up the narrower one with white on its right."""
    width = max(upper.shape[1], lower.shape[1])
    filled = [
        cv2.copyMakeBorder(part, 0, 0, 0, width - part.shape[1], cv2.BORDER_CONSTANT, value=_WHITE)
        for part in (upper, lower)
    ]
    return np.concatenate(filled)


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _array(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
