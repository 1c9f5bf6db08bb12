"""Errors that mean that memory ran out, and errors that do not."""

import errno

import cv2
import numpy as np
import pytest
import torch

from emanet_triton.kernels import out_of_memory
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_out_of_memory, is_refused

GPU = torch.device("cuda", 0)
GIGABYTE = 2**30


def _of(call):
    """The error that a call raises."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("expected an error")


OUT_OF_MEMORY = {
    "pytorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    "cuda-runtime": RuntimeError("CUDA error: out of memory"),
    "beside-pytorch": RuntimeError("CUDA ran out of memory outside PyTorch's allocator. If ..."),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "hip": RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "miopen": RuntimeError("miopenStatusAllocFailed"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    "python": MemoryError(),
    "numpy": _of(lambda: np.empty(2**60, np.uint8)),
    "mapping": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "shared": RuntimeError("unable to mmap 8192 bytes from file </x>: Cannot allocate memory (12)"),
    "c++": RuntimeError("std::bad_alloc"),
    "onednn": RuntimeError("could not create a primitive"),
    "onednn-memory": RuntimeError("could not create a memory object"),
    "opencv": _of(lambda: cv2.copyMakeBorder(np.zeros((1, 1), np.uint8), 0, 2**30, 0, 2**30, 0)),
}
REFUSED = {
    "get": RuntimeError("GET was unable to find an engine to execute this computation"),
    "find": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "v7": RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    "frontend": RuntimeError("[cudnn_frontend] Error: No valid execution plans built."),
    "configs": RuntimeError("No valid engine configs for ConvFwd_"),
    "status": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear ..."),
    "handle": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
}
OTHER = {
    "shape": RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    "shared-memory": RuntimeError("out of resource: shared memory, Required: 110592"),
    "illegal": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "onednn": RuntimeError("could not create a primitive descriptor for the convolution forward"),
    "type": TypeError("out of memory"),
    "file": FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "shared": RuntimeError("unable to mmap 8192 bytes from file </x>: No such device (19)"),
    "opencv": _of(lambda: cv2.blur(np.zeros((3, 3), np.uint8), (0, 0))),
}


def by_id(errors):
    return pytest.mark.parametrize("error", errors.values(), ids=errors)


@by_id(OUT_OF_MEMORY)
def test_out_of_memory(error):
    assert is_out_of_memory(error)
    assert not is_refused(error)
    assert MemoryWatch(torch.device("cpu")).explains(error)


@by_id(REFUSED)
def test_refused(error):
    assert is_refused(error)
    assert not is_out_of_memory(error)
    assert not MemoryWatch(torch.device("cpu")).explains(error)


@by_id(OTHER)
def test_other_errors(error):
    assert not is_out_of_memory(error)
    assert not is_refused(error)


@pytest.fixture
def device(monkeypatch):
    """A GPU with plenty of memory, on which no allocation has failed."""
    state = {"num_ooms": 3, "free": 9 * GIGABYTE}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: state)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 80 * GIGABYTE))
    return state


def test_a_refusal_without_a_failed_allocation_is_no_lack_of_memory(device):
    assert not MemoryWatch(GPU).explains(REFUSED["get"])


def test_a_refusal_of_a_lost_context_is_no_lack_of_memory(device, monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert not MemoryWatch(GPU).explains(REFUSED["get"])


def test_a_refusal_after_a_failed_allocation_is_a_lack_of_memory(device):
    watch = MemoryWatch(GPU)
    device["num_ooms"] += 1  # cuDNN asked for a workspace, and PyTorch passed over the failure
    assert watch.explains(REFUSED["get"])
    assert not watch.explains(OTHER["shape"])
    assert not MemoryWatch(GPU).explains(REFUSED["get"])


def test_a_refusal_where_nothing_is_left_for_the_libraries_is_a_lack_of_memory(device):
    device["free"] = out_of_memory.SPARE_BYTES - 1
    assert MemoryWatch(GPU).explains(REFUSED["get"])
    assert not MemoryWatch(GPU).explains(OTHER["shape"])
