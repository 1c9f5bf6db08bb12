"""What a CPU can do: the name of its instructions, and the dtypes that oneDNN multiplies."""

import platform

import pytest
import torch

from emanet_triton.kernels.conv.onednn import compute_dtype
from emanet_triton.kernels.device import CPU_QUERIES, cpu_capability, cpu_name, has_onednn


@pytest.fixture(autouse=True)
def fresh():
    """The function looks at the CPU anew, in this test and after it."""
    cpu_capability.cache_clear()
    yield
    cpu_capability.cache_clear()


def pretend(monkeypatch, machine="x86_64", vectors="AVX512", **answers):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    for name, query in CPU_QUERIES.items():
        monkeypatch.setattr(torch.cpu, query, lambda name=name: answers.get(name, False))


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ({"amx": True, "avx512_bf16": True}, "amx"),
        ({"avx512_bf16": True}, "avx512_bf16"),
        ({}, "avx512"),
        ({"vectors": "AVX2", "avx512_bf16": True}, "avx2"),  # PyTorch was told to use AVX2
        ({"vectors": "DEFAULT"}, "default"),
        ({"vectors": "Z VECTOR", "machine": "s390x"}, "default"),
        ({"vectors": "SVE256", "machine": "aarch64"}, "arm"),
        ({"vectors": "DEFAULT", "machine": "arm64"}, "arm"),
    ],
)
def test_the_capability_is_named(monkeypatch, cpu, name):
    pretend(monkeypatch, **cpu)
    assert cpu_capability() == name


def test_a_pytorch_without_the_queries_names_the_vectors(monkeypatch):
    pretend(monkeypatch)
    for query in CPU_QUERIES.values():
        monkeypatch.delattr(torch.cpu, query)
    assert cpu_capability() == "avx512"


@pytest.mark.parametrize("vectors", ["AVX2", "AVX512"])
def test_bfloat16_needs_its_own_instructions(monkeypatch, vectors):
    pretend(monkeypatch, vectors=vectors)
    supported = vectors == "AVX512"  # oneDNN imitates it there
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert not has_onednn(torch.bfloat16)
    assert compute_dtype(torch.bfloat16) == torch.float32


def test_the_instructions_of_a_processor_tell_machines_apart(monkeypatch):
    pretend(monkeypatch, avx512_bf16=True)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert cpu_name().endswith(" cores, AVX512-BF16")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert cpu_name().endswith(" cores, AVX512-BF16, OMP_WAIT_POLICY=passive")
