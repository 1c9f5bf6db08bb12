"""Launch a kernel with a tile; where the tile does not fit the GPU, a smaller one takes its place.

The tiles fit the GPUs that their tables name. A smaller GPU, or an untried version of Triton, may
still refuse a tile.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import torch
import triton

from emanet_triton.kernels.relaunch import start
from emanet_triton.kernels.tile import Tile

P = ParamSpec("P")
T = TypeVar("T")

SMALLEST_BLOCK = 16  # the smallest block that ``tl.dot`` takes
BLOCK_NAMES = ("BLOCK_N", "BLOCK_M", "BLOCK_O", "BLOCK_C")

# Replacements of tiles that did not fit, for each device.
_REPLACEMENTS: dict[tuple[torch.device, Tile], Tile] = {}
_LOCK = threading.Lock()  # held while a replacement is written


class TileReplaced(Exception):  # noqa: N818 (the operator starts again: it is not an error)
    """A launch was refused, and a smaller tile is noted in place of the refused tile."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; ``triton.cdiv`` takes microseconds on the host."""
    return -(-a // b)


def launch(
    kernel, tile: Tile, device: torch.device, programs: int, *arguments, **constants
) -> None:
    """Launch ``programs`` programs of a kernel with the block sizes and options of a tile.

    The device must be the current one, and the arguments must be on it.

    Raises:
        TileReplaced: the tile does not fit the device, and a smaller one is noted.
        triton.OutOfResources: no smaller tile is left.
    """
    try:
        start(kernel, (programs,), arguments, {**constants, **tile.keywords()})
    except triton.OutOfResources as error:
        _replace(tile, device, error)
        raise TileReplaced from error


def fitting(tile: Tile, device: torch.device) -> Tile:
    """The tile itself, or the one that takes its place on this device."""
    while (device, tile) in _REPLACEMENTS:
        tile = _REPLACEMENTS[device, tile]
    return tile


def replacements() -> int:
    """How many tiles have been replaced: what was found before another one is out of date."""
    return len(_REPLACEMENTS)


def with_fitting_tiles(operator: Callable[P, T]) -> Callable[P, T]:
    """Run an operator, which asks ``fitting`` for its tiles, again until all of them fit.

    A tile decides how many programs run and how large the workspace is, so it is not enough to
    repeat the launch that failed.
    """

    @functools.wraps(operator)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            try:
                return operator(*args, **kwargs)
            except TileReplaced:
                continue

    return run


def smaller(tile: Tile) -> Tile | None:
    """The tile with one pipeline stage less or, if it has only one, half its longest block."""
    if "PRECISION" not in tile.meta and "P" not in tile.meta:
        return None  # not a product: its block is as long as the data
    if tile.pipeline_stages > 1:
        return replace(tile, pipeline_stages=tile.pipeline_stages - 1)
    blocks = {n: tile.meta[n] for n in BLOCK_NAMES if tile.meta.get(n, 0) > SMALLEST_BLOCK}
    if not blocks:
        return None
    longest = max(blocks, key=blocks.__getitem__)
    return replace(tile, meta={**tile.meta, longest: blocks[longest] // 2})


def _replace(tile: Tile, device: torch.device, error: triton.OutOfResources) -> None:
    replacement = smaller(tile)
    if replacement is None:
        raise error
    with _LOCK:
        is_first = (device, tile.kernel) not in {(d, t.kernel) for d, t in _REPLACEMENTS}
        _REPLACEMENTS[device, tile] = replacement
    if is_first:
        warnings.warn(
            f"{tile.kernel} does not fit {device} with its usual tile: {error.name} required "
            f"{error.required}, available {error.limit}; a smaller, slower tile runs instead",
            stacklevel=2,
        )
