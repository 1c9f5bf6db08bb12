"""Tests of the name that a CPU's instructions get."""

import platform

import pytest
import torch

from emanet_triton.kernels.device import CPU_QUERIES, cpu_capability


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
