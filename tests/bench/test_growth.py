"""Fits of known data."""

import pytest

from emanet_triton.bench.growth import fit

SIZES = (1, 2, 8, 64)


@pytest.mark.parametrize("exponent", [-1, 0.5, 1, 2])
def test_a_power_law_comes_back(exponent):
    found = fit(SIZES, [3 * size**exponent for size in SIZES])
    assert found.exponent == pytest.approx(exponent)
    assert found.r_squared == pytest.approx(1)
    assert found.points == 4


def test_what_never_changes_has_exponent_0():
    found = fit(SIZES, [5.0] * 4)
    assert (found.exponent, found.r_squared) == (0, 1)


def test_scatter_lowers_r_squared():
    # log2 y = 0, 1, 0, 1 at log2 x = 0, 1, 2, 3: slope 0.2, and 1/5 of the variance explained.
    found = fit((1, 2, 4, 8), (1, 2, 1, 2))
    assert found.exponent == pytest.approx(0.2)
    assert found.r_squared == pytest.approx(0.2)


def test_it_reads_well():
    assert str(fit(SIZES, SIZES)) == "1.00 (R² 1.000, 4 points)"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((1, 2), (1, 2), "at least 3 different sizes, got 2"),
        ((1, 2, 2), (1, 2, 2), "at least 3 different sizes, got 2"),
        ((1, 2, 3), (1, 2), "equally long, got 3 and 2"),
        ((1, 2, 3), (1, 2, 0), "positive and finite"),
        ((1, 2, 3), (1, 2, float("nan")), "positive and finite"),
    ],
)
def test_bad_data(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit(x, y)
