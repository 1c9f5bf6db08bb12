"""What Gluon kernels for Hopper GPUs share: names of Gluon, functions, tensor descriptors."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from emanet_triton.kernels.checks import fitted

# Triton 3.9 has new names for the first two, Triton 3.7 for the third.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def arrive_together(bar, pred=True):
    """One thread arrives at an mbarrier for all warps of its role, once they have met.

    Triton itself puts a barrier before an arrival today, but promises none.
    """
    barrier()
    mbarrier.arrive(bar, pred=pred)


@gluon.jit
def columns(b, j: gl.constexpr, WIDTH: gl.constexpr):
    """Columns ``j * WIDTH`` to ``(j + 1) * WIDTH`` of a tile in registers, without moving them."""
    if b.shape[1] > WIDTH:
        HALF: gl.constexpr = b.shape[1] // 2
        low, high = gl.split(b.reshape([b.shape[0], 2, HALF]).permute([0, 2, 1]))
        b = columns(low, j, WIDTH) if j < HALF // WIDTH else columns(high, j - HALF // WIDTH, WIDTH)
    return b


_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def described(tensor: Tensor, *block: int) -> TensorDescriptor:
    """What a kernel loads and stores blocks of a tensor by.

    A tensor that does not fit one is copied. So one that the kernel writes must fit, as a new
    contiguous one in rows of whole 16 bytes does.
    """
    tensor = fitted(tensor)
    return TensorDescriptor.from_tensor(tensor, list(block), _layout(block, tensor.dtype))


@functools.cache
def _layout(block: Sequence[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _ELEMENTS[dtype])
