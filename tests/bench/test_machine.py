"""The name and the rates of a machine."""

import pytest
import torch

from emanet_triton.bench import machine as of_machine
from emanet_triton.bench.machine import check_device, measure_machine
from emanet_triton.errors import InputError
from emanet_triton.kernels.device import cpu_name
from emanet_triton.versions import ABSENT


def test_the_machine_is_named_and_measured():
    machine = measure_machine("cpu", ["fp32", "bf16"], tiny=True)
    assert machine.device == cpu_name()
    assert machine.threads == torch.get_num_threads()
    assert (machine.torch, machine.driver) == (torch.__version__, "")
    assert list(machine.matmul_tflop_s) == ["fp32", "bf16"]
    assert min(machine.copy_gb_s, *machine.matmul_tflop_s.values()) > 0
    assert machine.noise >= 0
    assert machine.device in str(machine)


def test_the_versions_of_runtimes_are_said(monkeypatch):
    installed = {"openvino": "2026.4.1", "torch-tensorrt": "2.11", "another": "1"}
    monkeypatch.setattr(of_machine, "package_version", lambda name: installed.get(name, ABSENT))
    machine = measure_machine("cpu", ["fp32"], tiny=True)
    assert machine.runtimes == "openvino 2026.4.1, torch-tensorrt 2.11"
    assert str(machine).endswith(f"%; {machine.runtimes}")
    monkeypatch.setattr(of_machine, "package_version", lambda _: ABSENT)
    assert measure_machine("cpu", ["fp32"], tiny=True).runtimes == ""


@pytest.mark.parametrize(("rate", "said"), [(9e18, 9e6), (1.0, None)])
def test_the_ceiling_is_the_faster_of_product_and_convolution(monkeypatch, rate, said):
    monkeypatch.setattr(of_machine, "_conv_rate", lambda *_: rate)
    found = measure_machine("cpu", ["fp32"], tiny=True).matmul_tflop_s["fp32"]
    assert found == said or (said is None and found > 1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(InputError, match="PyTorch finds no GPU"):
        check_device("cuda")
