"""The normalisation of pixels by Triton: the bits of PyTorch's operations."""

import pytest
import torch
from device import DEVICE, DTYPES

from emanet_triton.inference import inputs
from emanet_triton.kernels import pixels as kernels
from emanet_triton.kernels.device import triton_kernels
from emanet_triton.models.network import Network

FORMS = ((Network.mean, Network.std), ((0.1, 127.5, 255.0), (1.0, 127.5, 3e-2)))


def plain(images: torch.Tensor, mean, std, dtype: torch.dtype) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    return ((images.float() - mean) / std).to(dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=("network", "other"))
def test_it_equals_pytorch(form, dtype):
    """All bytes in every channel, in several programs that begin with each of the channels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 57, 41, 3), dtype=torch.uint8, generator=generator)
    images[0, :32, :8] = torch.arange(256, dtype=torch.uint8).view(32, 8, 1)
    assert images.numel() > 3 * kernels.BLOCK
    with triton_kernels("pixels", images.to(DEVICE)) as module:
        got = module.normalise(images.to(DEVICE), *form, dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.cpu(), plain(images, *form, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (0, 4, 5, 3), (1, 3, 0, 3)])
def test_few_pixels_or_none(shape):
    images = torch.full(shape, 7, dtype=torch.uint8, device=DEVICE)
    got = kernels.normalise(images, *FORMS[0], torch.float32)
    torch.testing.assert_close(got.cpu(), plain(images.cpu(), *FORMS[0], got.dtype), rtol=0, atol=0)


def test_pixels_that_are_not_contiguous():
    images = torch.arange(2 * 6 * 5 * 3, dtype=torch.uint8, device=DEVICE).view(2, 6, 5, 3)
    images = images.flip(2)[:, ::2]
    got = kernels.normalise(images, *FORMS[0], torch.float32)
    torch.testing.assert_close(got.cpu(), plain(images.cpu(), *FORMS[0], got.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_inputs_of_a_network_come_from_it(dtype, monkeypatch):
    """A GPU takes it by itself; here the choice of the backend is replaced."""
    images = torch.arange(2 * 6 * 5 * 3, dtype=torch.uint8, device=DEVICE).view(2, 6, 5, 3)
    calls = []
    monkeypatch.setattr(inputs, "auto_backend", lambda on_gpu: "triton")
    monkeypatch.setattr(
        kernels, "normalise", lambda *given, f=kernels.normalise: calls.append(given) or f(*given)
    )
    got = inputs.normalise(images, None, dtype)
    assert len(calls) == 1
    want = plain(images.cpu(), Network.mean, Network.std, dtype)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)
