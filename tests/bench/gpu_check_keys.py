"""A program: whether planned launches have the keys of real ones. Triton's interpreter is off.

It prints the kernels of every call, and ends with an error where a key differs.
"""

from unittest import mock

import torch

from emanet_triton.bench.gpu_check import meta
from emanet_triton.bench.gpu_check.conv_cases import with_dtype
from emanet_triton.bench.gpu_check.families import small_calls
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.walk import OperatorCall
from emanet_triton.kernels.conv import implicit_gemm as conv_triton

GPU = Gpu.of_arch("sm_90")


def with_memory(values):
    """Within, launches are on these tensors, which have addresses as real ones have."""
    return mock.patch.object(OperatorCall, "values", lambda self, device="meta": values)


def real_kernels(call, values=None):
    with with_memory(values or call.values("cpu")):
        return meta.kernels_of(Launch(call), GPU)


def check_keys():
    calls = small_calls()
    for call in [*calls, *(with_dtype(call, torch.float16) for call in calls)]:
        planned = meta.kernels_of(Launch(call), GPU)
        assert planned == real_kernels(call), call
        print("kernels:", *(name for name, _ in planned))


def check_that_an_address_matters(call):
    """Else the comparison of keys would say nothing."""
    values = call.values("cpu")
    bias = torch.empty(len(values[2]) + 1, dtype=values[2].dtype)[1:]
    values[2] = bias
    assert meta.kernels_of(Launch(call), GPU) != real_kernels(call, values)


def check_cache(call):
    """What was compiled for the meta device is found by a real launch."""
    launch = Launch(call)
    assert meta.compile_kernels(launch, GPU, {("conv_rows", "another key")}) == ([], [])
    ((first,), _) = meta.compile_kernels(launch, GPU)
    for kernel in (conv_triton.conv_rows, conv_triton.conv_pointers, conv_triton.conv_taps):
        kernel.device_caches.clear()  # as in a new process
    with with_memory(call.values("cpu")):
        ((again,), (compiled,)) = meta.compile_kernels(launch, GPU)
    assert (first.hit, first.error, again.hit, again.error) == (False, "", True, "")
    print("found again:", compiled.metadata.name, compiled.metadata.target.arch)


if __name__ == "__main__":
    check_keys()
    check_that_an_address_matters(small_calls()[0])
    check_cache(small_calls()[0])
