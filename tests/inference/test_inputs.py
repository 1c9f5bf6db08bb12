"""Images are resized where the device reads them, and are copied while it computes."""

from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from device import DEVICE, NATIVE

from emanet_triton.inference import inputs

SIZES = {"smaller": (7, 9), "larger": (50, 33), "the same": (20, 30)}


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_images_are_resized_as_one_by_one(images, size):
    resized = inputs.resize_to_device(images, size, torch.device(DEVICE))
    assert resized.device.type == DEVICE
    one_by_one = [cv2.resize(i, size[::-1], interpolation=cv2.INTER_LINEAR) for i in images]
    np.testing.assert_array_equal(resized.cpu(), np.stack(one_by_one))


def test_views_of_images_are_resized_as_their_copies(images):
    views = [images[0][:, ::-1], images[1][::-1, :, ::-1], images[2][::2].repeat(2, axis=0)]
    views[2].flags.writeable = False
    got, want = (
        inputs.resize_to_device(each, (11, 40), torch.device("cpu"))
        for each in (views, [np.ascontiguousarray(view).copy() for view in views])
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_opencv_writes_to_the_tensor_itself(images, size):
    with mock.patch.object(cv2, "resize", wraps=cv2.resize) as resize:
        resized = inputs.resize_to_device(images, size, torch.device("cpu"))
        written = [call.kwargs["dst"] for call in resize.call_args_list]
        rows = [cv2.resize(i, size[::-1], dst=w) for i, w in zip(images, written, strict=True)]
    assert all(row is w for row, w in zip(rows, written, strict=True))  # no copy of OpenCV's own
    places = [w.__array_interface__["data"][0] for w in written]
    assert places == [one.data_ptr() for one in resized]


WRONG = {
    "float32": np.zeros((4, 5, 3), np.float32),
    "int16": np.zeros((4, 5, 3), np.int16),
    "grey": np.zeros((4, 5), np.uint8),
    "one channel": np.zeros((4, 5, 1), np.uint8),
    "RGBA": np.zeros((4, 5, 4), np.uint8),
}


@pytest.mark.parametrize("image", WRONG.values(), ids=WRONG)
def test_an_image_that_opencv_would_not_write_to_the_tensor_is_refused(images, image):
    with pytest.raises(ValueError, match=r"must be uint8 RGB \[H, W, 3\], got"):
        inputs.resize_to_device([images[0], image], (4, 5), torch.device("cpu"))


def test_nothing_is_copied_from_a_cpu_to_itself():
    tensor = torch.zeros(3)
    assert inputs.to_device(tensor, torch.device("cpu")) is tensor


def test_a_copy_runs_on_its_own_stream_and_is_waited_for():
    gpu = torch.device("cuda", 5)
    calls = mock.MagicMock()
    calls.current_stream.return_value.device = gpu
    tensor, current = calls.tensor, calls.current_stream.return_value
    with (
        mock.patch.object(torch.cuda, "current_stream", calls.current_stream),
        mock.patch.object(torch.cuda, "stream", calls.stream),
        mock.patch.object(inputs, "_copy_stream", calls.copy_stream),
    ):
        copied = inputs.to_device(tensor, torch.device("cuda"))
    copies = calls.copy_stream.return_value
    assert copied is tensor.pin_memory.return_value.to.return_value
    assert calls.mock_calls == [
        mock.call.current_stream(torch.device("cuda")),
        mock.call.copy_stream(gpu),
        mock.call.stream(copies),
        mock.call.stream().__enter__(),
        mock.call.tensor.pin_memory(),
        mock.call.tensor.pin_memory().to(gpu, non_blocking=True),
        mock.call.stream().__exit__(None, None, None),
        mock.call.current_stream().wait_stream(copies),
        mock.call.tensor.pin_memory().to().record_stream(current),
    ]


@pytest.mark.skipif(not NATIVE, reason="copies to a GPU")
def test_a_gpu_copies_while_it_computes():
    device = torch.device(DEVICE)
    tensor = torch.arange(1000, dtype=torch.uint8)
    inputs.to_device(tensor, device)  # makes the stream
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles of the current stream: about a second
    copied = inputs.to_device(tensor, device)
    inputs._copy_stream(device).synchronize()
    assert not torch.cuda.current_stream().query()  # still asleep, and the copy is there
    assert torch.equal(copied.cpu(), tensor)


@pytest.mark.skipif(not NATIVE, reason="copies to a GPU")
def test_copies_do_not_overwrite_what_is_still_read():
    device = torch.device(DEVICE)
    tensors = [torch.full((1 << 20,), i, dtype=torch.uint8) for i in range(50)]
    results = []
    torch.cuda._sleep(200_000_000)
    for tensor in tensors:
        results.append(inputs.to_device(tensor, device) + 1)  # the copy is freed at once
    assert all(torch.equal(r.cpu(), t + 1) for r, t in zip(results, tensors, strict=True))


@pytest.mark.skipif(not NATIVE, reason="copies to a GPU")
def test_what_reads_a_copy_waits_for_it():
    device = torch.device(DEVICE)
    tensor = torch.arange(1 << 20).to(torch.uint8)
    inputs.to_device(tensor, device)
    current = torch.cuda.current_stream()
    with torch.cuda.stream(inputs._copy_stream(current.device)):
        torch.cuda._sleep(500_000_000)
    read = inputs.to_device(tensor, device) + 1
    assert torch.equal(read.cpu(), tensor + 1)
