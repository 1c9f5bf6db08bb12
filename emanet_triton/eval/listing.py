"""The table of all models, as ``python -m emanet_triton.eval --list`` prints it."""

from collections.abc import Sequence

from tabulate import tabulate

from emanet_triton.models.entries import SOURCES
from emanet_triton.models.zoo import ZOO, find_entry, model_info

_HEADERS = (
    "model",
    "source",
    "data set",
    "backbone",
    "inference",
    "mIoU",
    "flip",
    "ms+flip",
    "test",
)


def models_table(names: Sequence[str]) -> str:
    """One row for each of these models, with its published mIoU in percent.

    *flip* averages an image and its mirror image, *ms+flip* several scales of both; *test* is on
    the test images.
    """
    return tabulate(
        [_row(name) for name in names],
        _HEADERS,
        tablefmt="github",
        disable_numparse=True,
        colalign=(*("left",) * 5, *("right",) * 4),
    )


def notes(names: Sequence[str]) -> str:
    """A line for each of these models whose published figures have a note."""
    published = ((name, ZOO[name].published) for name in names)
    return "\n".join(f"{name}: {p.note}" for name, p in published if p and p.note)


def sources_table(names: Sequence[str]) -> str:
    """One row for each project of these models: its address and its licences."""
    listed = {ZOO[name].source for name in names}
    rows = [
        (key, source.url, source.code_license, source.weights_license or "not stated")
        for key, source in SOURCES.items()
        if key in listed
    ]
    return tabulate(rows, ("source", "project", "code", "weights"), tablefmt="github")


def _row(name: str) -> tuple[str, ...]:
    info, entry = model_info(name), find_entry(name)
    found = info.published
    figures: tuple[float | None, ...] = (None,) * 4
    if found:
        figures = found.miou, found.miou_flip, found.miou_ms_flip, found.miou_test
    backbone = f"R{info.depth}-D{info.stride}" if info.depth else "-"
    return (
        name,
        entry.source or "-",
        entry.dataset.name,
        backbone,
        info.protocol.mode,
        *(_shown(figure) for figure in figures),
    )


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"
