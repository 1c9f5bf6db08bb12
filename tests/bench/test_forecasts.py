"""Each forecast belongs to cases that exist."""

from emanet_triton.bench.forecasts import FORECASTS, forecast
from emanet_triton.bench.options import Selection
from emanet_triton.bench.suites import SUITES


def test_each_forecast_has_a_case_on_a_gpu():
    names = {
        suite: [(c.name, c.providers) for c in SUITES[suite].cases(Selection("cuda"))]
        for suite in dict.fromkeys(suite for suite, _ in FORECASTS)
    }
    for (suite, provider), known in FORECASTS.items():
        found = [
            forecast(suite, n, provider) for n, providers in names[suite] if provider in providers
        ]
        assert sorted(filter(None, found)) == sorted(known.values()), suite


def test_a_forecast_needs_the_whole_words():
    assert forecast("em", "block B=1 N=32768 bf16 channels-last", "triton") == "0.15-0.17"
    assert forecast("em", "block B=1 N=32768 bf16x channels-last", "triton") == ""
    assert forecast("em", "block B=1 N=32768 bf16 channels-last spread", "triton") == ""
    assert forecast("em", "block B=1 N=32768 bf16 channels-last", "mmseg") == ""
    assert forecast("model", "r50 whole 1024x2048 from=device", "fused-bf16") == "6-6.6"
    assert forecast("toy", "first", "plain") == ""
