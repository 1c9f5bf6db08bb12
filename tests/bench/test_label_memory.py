"""The memory of labels of 150 classes, measured in a process of its own."""

import torch

from emanet_triton.bench.case import Case
from emanet_triton.bench.memory import peak_in_child
from emanet_triton.bench.options import Selection
from emanet_triton.inference.taps import tap_tables
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.entries import ZOO

SIZE = (1024, 2048)
CLASSES = 150
FULL = 4e-6 * CLASSES * SIZE[0] * SIZE[1]  # MB of float32 logits of the image's size: 1258


def cases(selection):
    """Labels of one 1024x2048 image by the protocol of sssegmentation's models of Cityscapes."""
    size = (64, 128) if selection.tiny else SIZE
    protocol = ZOO["emanet_resnet50os8_cityscapes"].protocol
    shared = {}

    def prepare():
        torch.manual_seed(0)
        shared["logits"] = torch.randn(1, CLASSES, 128 * 256)
        shared["taps"] = tap_tables(protocol, size, False, torch.device("cpu"))

    def make():
        return lambda: resample_labels(shared["logits"], *shared["taps"])

    yield Case(
        suite="post",
        name="labels",
        providers={"torch": make},
        baseline="torch",
        error=lambda got: 0.0,
        bound=0.0,
        prepare=prepare,
    )


def test_labels_of_150_classes_take_a_fraction_of_full_size_logits():
    peak = peak_in_child(cases, Selection(threads=2), "labels", "torch")
    assert 2 < peak < FULL / 15
