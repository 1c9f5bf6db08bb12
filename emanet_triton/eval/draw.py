"""Image, prediction, label and error side by side with a class legend.

Only the functions that draw import torchvision: the import takes a second and 90 MB, and few
evaluations draw.
"""

import math
from collections.abc import Sequence
from itertools import product

import cv2
import numpy as np
import torch

from emanet_triton.data.dataset import IGNORE, Class, Color
from emanet_triton.data.overlay import ALPHA, BLACK, Text, draw_legend, enlarge, paint, stack, write

_MIN_PANEL = 320  # pixels of a panel's longer side; a smaller image is enlarged so that text fits


def side_by_side(
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
        legend += [("ignored", BLACK), ("wrong", wrong)]

    # Enlarged by a whole number, so that every pixel keeps its colour.
    zoom = max(1, -(-_MIN_PANEL // max(image.shape[:2])))
    text = Text.for_width(zoom * image.shape[1])
    captioned = [_caption(enlarge(panel, zoom), name, text) for name, panel in panels.items()]
    grid = make_grid([_tensor(panel) for panel in captioned], nrow=2, padding=4, pad_value=255)
    return stack(_array(grid), draw_legend(legend, grid.shape[2], text))


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
    colors = np.array([c.color for c in classes], np.uint8)
    return cv2.addWeighted(paint(ids, colors), ALPHA, image, 1 - ALPHA, 0)


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
    return _array(draw_segmentation_masks(pale, masks, alpha=0.85, colors=[color, BLACK]))


def _caption(panel: np.ndarray, name: str, text: Text) -> np.ndarray:
    bar = np.full((text.line, panel.shape[1], 3), 255, np.uint8)
    write(bar, name, text.line // 4, 0, text)
    return np.concatenate([bar, panel])


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def _array(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
