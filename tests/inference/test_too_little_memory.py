"""Where memory does not suffice, the work goes on in smaller pieces or ends in a message."""

import subprocess
import sys

import pytest
import torch
from tiny_models import random_image, tiny_model

from emanet_triton import segment
from emanet_triton.errors import InputError
from emanet_triton.inference import predictor as inference
from emanet_triton.inference.predictor import Predictor
from emanet_triton.kernels.out_of_memory import MemoryWatch


class LimitedMemory(torch.nn.Module):
    """A model that runs out of memory above ``limit`` inputs."""

    def __init__(self, limit: int, error: Exception, **protocol) -> None:
        super().__init__()
        self.model, self.limit, self.error = tiny_model(**protocol), limit, error
        self.protocol = self.model.protocol
        self.batches = []

    def forward(self, inputs):
        self.batches.append(len(inputs))
        if len(inputs) > self.limit:
            raise self.error
        return self.model(inputs)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    OSError(12, "Cannot allocate memory"),
]


NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.mark.parametrize(
    "error", OUT_OF_MEMORY, ids=["cuda", "cpu", "cublas", "runtime", "mapping"]
)
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    model = LimitedMemory(2, error)
    images = [random_image(16, 24, i) for i in range(9)]
    predictor = Predictor(model, model.protocol, batch_size=8)
    with pytest.warns(UserWarning, match="out of memory on cpu; going on with batch size") as seen:
        got = list(predictor(images))
    assert [str(w.message)[-1] for w in seen] == ["4", "2"]
    assert model.batches == [8, 4, 2, 2, 2, 2, 1]
    for labels, want in zip(got, Predictor(model.model, model.protocol)(images), strict=True):
        assert (labels == want).float().mean() > 0.99


def test_cudnn_without_an_engine_halves_the_batch_where_memory_ran_out(monkeypatch):
    monkeypatch.setattr(MemoryWatch, "_is_short", lambda watch: True)
    model = LimitedMemory(2, NO_ENGINE)
    images = [random_image(16, 24, i) for i in range(4)]
    with pytest.warns(UserWarning, match="out of memory on cpu; going on with batch size 2"):
        assert len(list(Predictor(model, model.protocol, batch_size=4)(images))) == 4
    assert model.batches == [4, 2, 2]


def test_cudnn_without_an_engine_is_an_error_where_there_is_memory():
    model = LimitedMemory(2, NO_ENGINE)
    predictor = Predictor(model, model.protocol, batch_size=4)
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        list(predictor([random_image(16, 24, i) for i in range(4)]))


def test_out_of_memory_with_the_windows_of_one_image():
    windowed = {"mode": "slide", "crop": (33, 33), "stride": (16, 16)}
    model = LimitedMemory(2, OUT_OF_MEMORY[0], **windowed)
    image = random_image(32, 64)
    predictor = Predictor(model, model.protocol, batch_size=32)
    with pytest.warns(UserWarning, match="going on with batch size") as seen:
        (labels,) = predictor([image])
    assert [str(w.message)[-2:].strip() for w in seen] == ["1"]
    assert model.batches == [3, 1, 1, 1]
    want = segment(model.model, image)
    assert (labels.numpy() == want).mean() > 0.99


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
def test_out_of_memory_in_the_resampling_goes_on_in_blocks_of_rows(monkeypatch, probabilities):
    model, image = tiny_model(), random_image(37, 50)
    predictor = Predictor(model, model.protocol)
    want = predictor.results([image], probabilities=probabilities)
    name = "resample_probabilities" if probabilities else "resample_labels"
    resample = getattr(inference, name)

    def limited(logits, rows, columns, **how):
        if rows.index.shape[2] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return resample(logits, rows, columns, **how)

    monkeypatch.setattr(inference, name, limited)
    with pytest.warns(UserWarning, match="of 37 rows at once") as seen:
        got = predictor.results([image], probabilities=probabilities)
    assert [str(w.message) for w in seen] == [
        f"out of memory on cpu; going on with {rows} of 37 rows at once" for rows in (19, 10)
    ]
    assert len(got) == len(want)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_out_of_memory_at_batch_one_is_an_input_error():
    model = LimitedMemory(0, OUT_OF_MEMORY[0])
    with pytest.raises(InputError, match="out of memory on cpu with an image of 24x16 pixels"):
        list(Predictor(model, model.model.protocol)([random_image(16, 24)]))


def test_other_runtime_errors_are_not_taken_for_memory():
    model = LimitedMemory(0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(Predictor(model, model.model.protocol, batch_size=2)([random_image(16, 24)]))


# A limit of a process's memory that is real.
CODE = """
import resource, sys
import numpy as np
import torch
from emanet_triton import create_model, segment
from emanet_triton.errors import InputError
from emanet_triton.models.protocol import Protocol

torch.set_num_threads(2)
model = create_model("emanet_r50-d8_512x1024_80k_cityscapes")
image = np.zeros((256, 512, 3), np.uint8)
segment(model, image[:64, :64], protocol=Protocol(base_scale=(64, 64)))  # the libraries are loaded
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
try:
    segment(model, image, protocol=Protocol(base_scale=(512, 256)))
except InputError as error:
    print(error)
"""


MESSAGE = (
    "out of memory on cpu with an image of 512x256 pixels at batch size 1; a smaller image, "
    "another device or half precision is needed\n"
)


@pytest.mark.parametrize("megabytes", [20, 40, 80])
def test_a_limit_of_memory_ends_in_a_message(megabytes):
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, MESSAGE, "")
