"""Networks with the features of other projects in files of other programs."""

import pytest
from small_networks import VARIANTS, small_model
from torch_version import needs_free_sizes

from emanet_triton import export
from emanet_triton.errors import InputError
from emanet_triton.models.protocol import Protocol


def mixture():
    model = small_model(VARIANTS["tiny mixture"])
    model.protocol = Protocol((128, 64))
    return model


@pytest.mark.parametrize(
    ("to", "file", "options"),
    [
        pytest.param("onnx", "logits.onnx", {}, id="onnx"),
        pytest.param(
            "torch", "logits.pt2", {"operators": "own"}, id="own operators", marks=needs_free_sizes
        ),
    ],
)
def test_logits_of_all_sizes(tmp_path, to, file, options):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    exported = export(mixture(), tmp_path / file, to=to, dynamic=True, **options)
    compared = [(check.batch, check.size, check.passed) for check in exported.checks]
    assert compared == [(1, (64, 128), True), (2, (33, 63), True), (3, (42, 32), True)]


def test_a_side_has_at_least_two_logits(tmp_path):
    with pytest.raises(InputError) as raised:
        export(mixture(), tmp_path / "logits.pt2", to="torch", size=(31, 64))
    assert str(raised.value) == "a size of 31x64 pixels is too small; expected at least 32"
