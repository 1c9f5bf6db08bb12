"""The composed maps against the plain sequence of operations, in float64."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from emanet_triton.inference import reference
from emanet_triton.inference.taps import AxisMap, resize_map, tap_tables, view_maps
from emanet_triton.inference.views import View
from emanet_triton.kernels.resample.op import resample_probabilities
from emanet_triton.models.protocol import Protocol, window_grid

WHOLE = Protocol((2048, 1024))
SLIDE = Protocol((2049, 1025), "slide", (769, 769), (513, 513), align_corners=True)
SMALL_SLIDE = Protocol((161, 97), "slide", (65, 65), (43, 43), align_corners=True)

# protocol, size of the network's input, size of the image; (height, width)
VIEWS = {
    "whole": (WHOLE, (64, 96), (64, 96)),
    "whole-up": (WHOLE, (48, 64), (101, 150)),
    "whole-down": (WHOLE, (112, 168), (64, 96)),
    "whole-corners": (Protocol((161, 97), align_corners=True), (97, 161), (96, 160)),
    "slide": (SMALL_SLIDE, (97, 161), (96, 160)),
    "slide-up": (SMALL_SLIDE, (49, 81), (96, 160)),
    "slide-down": (SMALL_SLIDE, (170, 282), (96, 160)),
    "slide-halves": (Protocol((64, 32), "slide", (33, 31), (10, 7)), (58, 97), (41, 70)),
    "one-pixel": (SMALL_SLIDE, (1, 1), (1, 1)),
    "one-row": (SMALL_SLIDE, (1, 161), (1, 90)),
    "to-one-pixel": (WHOLE, (24, 40), (1, 1)),
    "from-one-pixel": (WHOLE, (1, 1), (5, 9)),
}


def network(images: int, classes: int, dtype: torch.dtype = torch.float64):
    """A network of stride 8 whose logits are random, and the list of logits that it has given."""
    generator, given = torch.Generator().manual_seed(0), []

    def forward(inputs):
        height, width = (-(-side // 8) for side in inputs.shape[2:])
        shape = len(inputs), classes, height, width
        given.append(torch.randn(shape, generator=generator, dtype=dtype))
        return given[-1]

    return forward, given


def dense(axis: AxisMap, n_in: int) -> torch.Tensor:
    """The map as a matrix, float64 [n_out, n_in]."""
    matrix = torch.zeros(axis.index.shape[1], n_in, dtype=torch.float64)
    return matrix.scatter_add_(1, torch.tensor(axis.index.T), torch.tensor(axis.weight.T))


@pytest.mark.parametrize("align_corners", [False, True], ids=["halves", "corners"])
@pytest.mark.parametrize(
    ("n_in", "n_out"),
    [(1, 1), (1, 9), (9, 1), (2, 3), (13, 13), (97, 769), (769, 97), (128, 1024), (449, 2048)],
    ids=lambda n: str(n),
)
def test_one_resize(n_in, n_out, align_corners):
    x = torch.randn(1, 1, 1, n_in, dtype=torch.float64, generator=torch.manual_seed(0))
    want = F.interpolate(x, (1, n_out), mode="bilinear", align_corners=align_corners)
    got = dense(resize_map(n_in, n_out, align_corners), n_in) @ x.flatten()
    torch.testing.assert_close(got, want.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VIEWS)
def test_composed_view(name):
    protocol, scale, size = VIEWS[name]
    forward, given = network(1, 3)
    inputs = torch.zeros(1, 3, *scale)
    want = reference.view_logits(forward, inputs, size, protocol)
    rows, columns = window_grid(protocol, scale)
    height, width = given[0].shape[2:]
    mosaic = given[0].unflatten(0, (len(rows), len(columns))).permute(2, 0, 3, 1, 4)
    mosaic = mosaic.reshape(3, len(rows) * height, len(columns) * width)
    row, column = view_maps(protocol, View(scale, scale), size)
    got = dense(row, mosaic.shape[1]) @ mosaic @ dense(column, mosaic.shape[2]).T
    torch.testing.assert_close(got[None], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("protocol", "ms_flip", "row_taps", "column_taps"),
    [(WHOLE, False, 2, 2), (WHOLE, True, 3, 3), (SLIDE, False, 4, 6)],
    ids=["whole", "whole-ms-flip", "slide"],
)
def test_taps_at_cityscapes_size(protocol, ms_flip, row_taps, column_taps):
    size = (1024, 2048)
    rows, columns = tap_tables(protocol, size, ms_flip, torch.device("cpu"))
    views = 12 if ms_flip else 1
    assert rows.index.shape == rows.weight.shape == (views, row_taps, 1024)
    assert columns.index.shape == columns.weight.shape == (views, column_taps, 2048)
    for taps in (rows, columns):
        torch.testing.assert_close(taps.weight.sum(1), torch.ones(views, taps.index.shape[2]))
        assert taps.weight.min() >= 0


@pytest.mark.parametrize("images", [1, 2], ids=["one-image", "two-images"])
@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize(
    ("protocol", "size"),
    [
        (Protocol((64, 32)), (30, 50)),
        (Protocol((64, 32), version="mmseg-1.x"), (41, 70)),
        (Protocol((65, 33), "slide", (25, 25), (15, 15), align_corners=True), (31, 50)),
        (Protocol((64, 32), "slide", (33, 31), (20, 20)), (40, 3)),
    ],
    ids=["whole", "whole-1.x", "slide-corners", "slide-halves"],
)
def test_tables_address_what_the_network_gave(protocol, size, ms_flip, images):
    pictures = [np.zeros((*size, 3), np.uint8)] * images
    forward, given = network(images, 5, torch.float32)
    want = reference.probabilities(forward, pictures, protocol, ms_flip)
    views = [x.unflatten(0, (-1, images)).permute(1, 2, 0, 3, 4).flatten(2) for x in given]
    tables = tap_tables(protocol, size, ms_flip, torch.device("cpu"))
    _, got = resample_probabilities(torch.cat(views, 2), *tables)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
