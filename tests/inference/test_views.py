"""Properties of resize sizes and of window placement."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emanet_triton.inference.views import cover_count, rescaled, view_sizes
from emanet_triton.models.protocol import Protocol, windows

SIDE = st.integers(1, 4000)


@settings(deadline=None)  # a busy machine is no bug
@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE))
def test_rescaled_fits_the_target_and_keeps_the_ratio(size, target):
    height, width = rescaled(size, target)
    assert min(width, height) >= 1
    assert max(width, height) <= max(target)
    assert min(width, height) <= min(target)
    factor = min(max(target) / max(size), min(target) / min(size))
    for got, side in zip((height, width), size, strict=True):
        assert got == max(int(np.floor(side * factor + 0.5)), 1)


@settings(deadline=None)  # a busy machine is no bug
@given(st.tuples(SIDE, SIDE))
def test_rescaled_to_its_own_size_is_itself(size):
    assert rescaled(size, size) == size


@settings(deadline=None)  # a busy machine is no bug
@given(SIDE, st.integers(1, 900), st.data())
def test_windows_cover_an_axis_without_gaps_and_without_a_window_too_many(length, crop, data):
    stride = data.draw(st.integers(1, crop))
    spans = windows(length, crop, stride)
    assert all(end - begin == min(crop, length) for begin, end in spans)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(b[0] - a[0] <= stride for a, b in itertools.pairwise(spans))
    assert all(a[0] < b[0] for a, b in itertools.pairwise(spans))
    if len(spans) > 1:
        assert (len(spans) - 2) * stride + crop < length


@settings(deadline=None)  # a busy machine is no bug
@given(SIDE, st.integers(1, 900), st.data())
def test_cover_count_adds_up(length, crop, data):
    spans = windows(length, crop, data.draw(st.integers(1, crop)))
    count = cover_count(length, spans)
    assert count.min() >= 1
    assert count.sum() == len(spans) * min(crop, length)


def test_cityscapes_under_the_769_protocol():
    assert windows(1025, 769, 513) == [(0, 769), (256, 1025)]
    assert windows(2049, 769, 513) == [(0, 769), (513, 1282), (1026, 1795), (1280, 2049)]


@pytest.mark.parametrize(
    ("version", "base", "want"),
    [
        ("mmseg-0.x", (2048, 1024), [(512, 1024), (768, 1536), (1024, 2048), (1280, 2560)]),
        ("mmseg-0.x", (2049, 1025), [(512, 1024), (768, 1536), (1025, 2049), (1281, 2561)]),
        ("mmseg-1.x", (2049, 1025), [(512, 1024), (768, 1536), (1024, 2048), (1280, 2560)]),
    ],
    ids=["512x1024", "769x769", "769x769-1.x"],
)
def test_scales_of_a_cityscapes_image(version, base, want):
    protocol = Protocol(base, ratios=(0.5, 0.75, 1.0, 1.25), version=version)
    assert view_sizes(protocol, (1024, 2048), ms_flip=True) == want
    single = view_sizes(protocol, (1024, 2048), ms_flip=False)
    assert single == [base[::-1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "tile"}, "mode must be 'whole' or 'slide', got 'tile'"),
        ({"mode": "slide"}, "needs crop and stride"),
        ({"crop": (9, 9), "stride": (9, 9)}, "takes no crop"),
        ({"mode": "slide", "crop": (9, 9), "stride": (10, 9)}, "leaves gaps"),
        ({"ratios": ()}, "ratios must be above 0 and at most 16"),
        ({"ratios": (0.5, -1.0)}, "ratios must be above 0"),
        ({"ratios": (float("nan"),)}, "ratios must be above 0"),
        ({"ratios": (1.0, float("inf"))}, "ratios must be above 0"),
        ({"base_scale": (0, 32)}, "sizes must be 1 to 65536 pixels"),
        ({"version": "mmseg-2.x"}, "version must be one of mmseg-0.x, mmseg-1.x"),
        ({"average": "labels"}, "average must be one of probabilities, logits, got 'labels'"),
        (
            {"scaling": "output"},
            "scaling must be one of image, input, rounded, previous, got 'output'",
        ),
        ({"pad_size": (10**30, 9)}, "sizes must be 1 to 65536"),
        ({"pad_step": 0}, "sizes must be 1 to 65536 pixels"),
        ({"pad_step": 10**18}, "sizes must be 1 to 65536 pixels"),
        ({"direct": True, "pad_step": 8}, "direct resizes logits once"),
        ({"direct": True, "final_align_corners": False}, "direct resizes logits once"),
        ({"direct": True, "mode": "slide", "crop": (9, 9), "stride": (9, 9)}, "takes no windows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_protocols(arguments, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**({"base_scale": (64, 32)} | arguments))


@pytest.mark.parametrize(
    ("padding", "size", "want"),
    [
        ({"pad_step": 8}, (9, 16), (9, 17)),
        ({"pad_step": 8}, (1, 2), (1, 9)),
        ({"pad_size": (512, 512)}, (375, 500), (512, 512)),
        ({"pad_size": (512, 256)}, (513, 255), (513, 256)),
        ({"pad_size": (20, 20), "pad_step": 8}, (3, 30), (25, 33)),
    ],
)
def test_padded_sizes(padding, size, want):
    assert view_sizes(Protocol(None, **padding), size, False) == [want]


@pytest.mark.parametrize("size", [(360, 480), (1, 1), (1023, 77)])
def test_without_a_base_scale_an_image_keeps_its_own_size(size):
    protocol = Protocol(base_scale=None)
    assert view_sizes(protocol, size, False) == [size]
    same = Protocol(base_scale=size[::-1])
    assert view_sizes(protocol, size, True) == view_sizes(same, size, True)
