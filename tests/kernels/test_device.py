"""What a CPU can do: the name of its instructions, and the dtypes that oneDNN multiplies."""

import platform
from pathlib import Path

import pytest
import torch

from emanet_triton.heap import LARGE_PAGES
from emanet_triton.kernels import device
from emanet_triton.kernels.conv.onednn import compute_dtype
from emanet_triton.kernels.conv.tiles import has_boxes
from emanet_triton.kernels.device import (
    CPU_QUERIES,
    DTYPE_NAMES,
    DTYPES,
    cpu_capability,
    cpu_family,
    cpu_name,
    has_gluon,
    has_onednn,
    processor_name,
)
from emanet_triton.kernels.em.tiles import has_one_pass
from emanet_triton.kernels.products import onednn_beats_mkl
from emanet_triton.kernels.tile import ARCHS

CPU = torch.device("cpu")
CORE = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel name\t: AMD EPYC\n\n"


@pytest.fixture(autouse=True)
def fresh():
    """The functions look at the CPU anew, in this test and after it."""
    for look in (cpu_capability, cpu_family):
        look.cache_clear()
    yield
    for look in (cpu_capability, cpu_family):
        look.cache_clear()


def pretend_cpuinfo(monkeypatch, text):
    monkeypatch.setattr(Path, "read_text", lambda path: text)


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
    for name in "OMP_WAIT_POLICY", LARGE_PAGES:
        monkeypatch.delenv(name, raising=False)
    assert cpu_name().endswith(" cores, AVX512-BF16")
    monkeypatch.setenv(LARGE_PAGES, "1")
    assert cpu_name().endswith(" cores, AVX512-BF16")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert cpu_name().endswith(" cores, AVX512-BF16, OMP_WAIT_POLICY=passive")
    monkeypatch.setenv(LARGE_PAGES, "0")
    assert cpu_name().endswith(f", OMP_WAIT_POLICY=passive, {LARGE_PAGES}=0")


@pytest.mark.parametrize("family", [25, 26])
def test_processors_of_one_name_differ_in_their_family(monkeypatch, family):
    pretend_cpuinfo(monkeypatch, CORE.format(0, family) + CORE.format(1, family))
    assert cpu_family() == ("AuthenticAMD", family)
    assert processor_name() == f"AMD EPYC, family {family}, 2 cores"


def test_a_processor_without_a_family(monkeypatch):
    pretend_cpuinfo(monkeypatch, "processor\t: 0\nCPU implementer\t: 0x41\n")
    assert cpu_family() is None
    assert "family" not in processor_name()


@pytest.mark.parametrize(
    ("device", "family", "vectors", "mkl", "beaten"),
    [
        (CPU, 26, "AVX512", True, True),
        (CPU, 25, "AVX512", True, False),  # its units are as wide as MKL's vectors
        (CPU, 26, "AVX2", True, False),
        (CPU, 26, "AVX512", False, False),
        (torch.device("meta"), 26, "AVX512", True, False),
    ],
)
def test_who_multiplies_float32_faster(monkeypatch, device, family, vectors, mkl, beaten):
    if not has_onednn(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    pretend(monkeypatch, vectors=vectors)
    pretend_cpuinfo(monkeypatch, CORE.format(0, family))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert onednn_beats_mkl(device) == beaten


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gluon_is_where_its_kernels_have_tiles(arch, dtype, monkeypatch):
    monkeypatch.setattr(device, "gpu_arch", lambda device: arch)
    has_tiles = has_one_pass(arch, DTYPE_NAMES[dtype]), has_boxes(arch, DTYPE_NAMES[dtype])
    assert {has_gluon(torch.device("cuda", 0), dtype)} == set(has_tiles)
    assert not has_gluon(CPU, dtype)
    monkeypatch.setattr(device, "HAS_TRITON", False)
    assert not has_gluon(torch.device("cuda", 0), dtype)
