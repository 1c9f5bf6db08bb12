import pytest
import torch

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv import cpu_choice, onednn
from emanet_triton.kernels.conv.cpu_choice import NEVER, WINOGRAD_FROM, takes_winograd

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Give the CPU another capability, and oneDNN both dtypes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EMANET_TRITON_CONV_SEARCH", raising=False)
    monkeypatch.setattr(onednn, "has_onednn", lambda dtype: dtype in (FP32, BF16))
    choice._cache.cache_clear()
    yield lambda name: monkeypatch.setattr(cpu_choice, "cpu_capability", lambda: name)
    choice._cache.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Winograd's algorithm is the faster one; yields what was measured."""
    names = []

    def seconds(name, key, device, run):
        names.append((name, key))
        assert run().isfinite().all()
        return {"onednn": 2.0, "winograd": 1.0}[name]

    monkeypatch.setattr(choice, "_seconds", seconds)
    return names


def weight(outputs, channels, dtype=FP32, kernel=3, device="cpu"):
    return torch.empty(outputs, channels, kernel, kernel, dtype=dtype, device=device)


@pytest.mark.parametrize(("capability", "dtype"), WINOGRAD_FROM)
def test_a_known_cpu_measures_nothing(on, measured, capability, dtype):
    on(capability)
    least = WINOGRAD_FROM[capability, dtype]
    if least != NEVER:
        assert takes_winograd(weight(least, least, dtype))
        assert not takes_winograd(weight(least - 1, least, dtype))
        assert not takes_winograd(weight(least, least - 1, dtype))
    else:
        assert not takes_winograd(weight(768, 2048, dtype))
    assert measured == []


def test_a_dtype_that_onednn_lacks_takes_the_rule_of_float32(on, measured):
    on("amx")
    assert takes_winograd(weight(256, 256, torch.float16))
    assert not takes_winograd(weight(256, 256, BF16))


def test_only_3x3_on_a_cpu_with_onednn(on, measured, monkeypatch):
    on("avx2")
    assert not takes_winograd(weight(512, 512, kernel=1))
    assert not takes_winograd(weight(512, 512, device="meta"))
    monkeypatch.setattr(cpu_choice, "has_onednn", lambda dtype: False)
    assert not takes_winograd(weight(512, 512))


def test_an_unknown_cpu_measures_once(on, measured, monkeypatch):
    on("arm")
    assert takes_winograd(weight(130, 140))
    assert [name for name, _ in measured] == ["onednn", "winograd"]
    choice._cache.cache_clear()  # as in another process
    assert takes_winograd(weight(130, 140))
    assert len(measured) == 2
    assert not takes_winograd(weight(127, 512))
    assert len(measured) == 2


def test_a_cpu_is_measured_whatever_the_default_device_is(on, measured):
    on("arm")
    with torch.device("meta"):
        assert takes_winograd(weight(130, 140))
    assert len(measured) == 2


def test_wide_convolutions_are_measured_at_fewer_channels(on, measured, monkeypatch):
    on("default")
    monkeypatch.setattr(cpu_choice, "MEASURED_TO", 150)
    assert takes_winograd(weight(768, 2048))
    assert takes_winograd(weight(160, 170))
    assert len(measured) == 2
    assert "150 to 150 channels" in measured[0][1]


def test_nothing_is_measured_if_measuring_is_switched_off(on, measured, monkeypatch):
    on("arm")
    with choice.without_measuring():
        assert not takes_winograd(weight(130, 140))
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    choice._cache.cache_clear()
    assert not takes_winograd(weight(130, 140))
    assert measured == []


def test_the_clock_of_a_cpu_is_the_least_time(on):
    on("arm")
    calls = []
    seconds = choice._seconds(
        "onednn", "a convolution", torch.device("cpu"), lambda: calls.append(1)
    )
    assert 0 < seconds < 1
    assert len(calls) == 1 + choice.CPU_ROUNDS
