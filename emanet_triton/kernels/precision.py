"""How a GPU multiplies float32: exactly, or rounded to TF32."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def cuda_fp32(precision: str) -> Iterator[None]:
    """Within, cuDNN's convolutions and cuBLAS's products are ``"ieee"`` or ``"tf32"``.

    PyTorch lets cuDNN round to TF32 unless told otherwise. A setting of the process, put back at
    the end.
    """
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, earlier in zip(settings, before, strict=True):
            setting.fp32_precision = earlier
