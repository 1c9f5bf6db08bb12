"""What the page says about a result: areas of classes, the time, notes on models, as HTML."""

from dataclasses import dataclass
from html import escape

import numpy as np

from emanet_triton.data.dataset import Color, Dataset
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import find_entry, model_info
from emanet_triton.web.segmenter import Result

DEMO_NOTE = "emanet_demo was trained on drawn street scenes and is useless on photos."


@dataclass(frozen=True)
class Area:
    """A class in a picture: its name, its colour, and its share of the pixels in percent."""

    name: str
    color: Color
    percent: float


def areas(labels: np.ndarray, dataset: Dataset) -> list[Area]:
    """The classes in labels, uint8 [H, W], the largest first; equal ones in the data set's order.

    Labels that are no class are left out.
    """
    counts = np.bincount(labels.ravel(), minlength=len(dataset.classes))
    found = [
        Area(each.name, each.color, 100 * int(count) / labels.size)
        for each, count in zip(dataset.classes, counts, strict=False)  # 255 is no class
        if count
    ]
    return sorted(found, key=lambda area: -area.percent)


def area_list(found: list[Area]) -> str:
    """A list with the colour, the name and the percentage of each class, as HTML."""
    items = [
        f'<li><i style="background: rgb{area.color}"></i>'
        f"<span>{escape(area.name)}</span><b>{_percent(area.percent)} %</b></li>"
        for area in found
    ]
    return f"<ul>{''.join(items)}</ul>"


def _percent(percent: float) -> str:
    return f"{percent:.1f}" if percent >= 0.05 else "&lt; 0.1"


def summary(result: Result, device: str) -> str:
    """The time of a result, and what was computed, as HTML."""
    height, width = result.labels.shape
    chosen = result.choice
    views = "ms+flip" if chosen.ms_flip else "single view"
    size = "own size" if chosen.own_size else "protocol's size"
    details = f"{chosen.model}, {chosen.precision}, {views}, {size}, {result.network} network"
    return (
        f"<p><b>{result.seconds:.3f} s</b> for {width}×{height} pixels on {escape(device)}<br>"
        f"<small>{escape(details)}</small></p>"
    )


def problem(message: str) -> str:
    """A message of an error, as HTML."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


def model_note(name: str) -> str:
    """What the page says about a model of the zoo."""
    if name == DEMO:
        return DEMO_NOTE
    info = model_info(name)
    if info.project is None or info.path is None:
        return ""
    text = f"The classes of {find_entry(name).dataset.name}; published by {info.project.project}. "
    if info.url is None:
        return text + f"The file has no address: save it as {info.path.name} in torch's hub cache."
    return text + "The checkpoint is downloaded when the model is first used."
