"""Recognise errors that mean that memory ran out, whatever their types and messages."""

import errno
import re

import torch

# Messages of PyTorch's allocators, the CUDA and HIP runtimes, cuBLAS, cuDNN and MIOpen. The last
# line has the messages of the C library, C++ and oneDNN. oneDNN says only "could not create a
# primitive" when memory runs out; "primitive descriptor" means that it cannot compute the operation
# at all.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|alloc_?failed|allocation_failed"
    r"|cannot allocate memory|bad_alloc|could not create a (primitive(?! descriptor)|memory)",
    re.IGNORECASE,
)
# Messages of cuDNN when it finds no engine: it skips engines that lack memory. The first use of
# cuDNN or cuBLAS makes a handle, which needs memory too.
_REFUSED = re.compile(
    r"unable to find an engine|unable to find a valid cuDNN algorithm|no valid (engine|execution)"
    r"|CUDNN_STATUS_|CUBLAS_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)
SPARE_BYTES = 2**28  # if less memory is free on a device, CUDA's libraries may fail


class MemoryWatch:
    """Tells whether a device has run out of memory since the watch began, even if no error says so.

    Args:
        device: any device; only a CUDA device is ever found short of memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._failures = self._failed_allocations()

    def explains(self, error: BaseException) -> bool:
        """Whether ``error`` was raised for lack of memory."""
        return is_out_of_memory(error) or (is_refused(error) and self._is_short())

    def _is_short(self) -> bool:
        """Whether an allocation has failed, or too little memory is left for other libraries."""
        if self._device.type != "cuda":
            return False
        if self._failed_allocations() > self._failures:
            return True
        try:
            free, _ = torch.cuda.mem_get_info(self._device)
        except RuntimeError:  # the context is lost: the error says more
            return False
        return free < SPARE_BYTES

    def _failed_allocations(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_stats_as_nested_dict(self._device).get("num_ooms", 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, by its type or in its words, that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):  # for example from mmap
        return error.errno == errno.ENOMEM
    if type(error).__module__ == "cv2":
        return "Insufficient memory" in str(error)
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_refused(error: BaseException) -> bool:
    """Whether cuDNN or cuBLAS cannot do something: not at all, or not without more memory."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return _REFUSED.search(str(error)) is not None
