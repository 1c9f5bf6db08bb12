"""``examples/onnx_labels.py`` with a stand-in for ONNX Runtime; ``cpp.py`` has the real one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "onnx_labels.py"
# A network whose labels are the numbers of the brightest channels, for pictures of 4x6 pixels.
STAND_IN = """
import types

class InferenceSession:
    def __init__(self, model, providers):
        self.shape = [4, 6, 3] if model == "single" else ["batch", "height", "width", 3]

    def get_modelmeta(self):
        text = '{"part": "image-to-labels", "classes": ["red", "green", "blue"]}'
        return types.SimpleNamespace(custom_metadata_map={"emanet_triton_export": text})

    def get_inputs(self):
        return [types.SimpleNamespace(name="images", shape=self.shape)]

    def run(self, outputs, inputs):
        assert inputs["images"].ndim == len(self.shape)
        return [inputs["images"].argmax(-1).astype("uint8")]
"""


def run(
    folder: Path, model: str, pixels: np.ndarray, labels: str = "labels.png"
) -> subprocess.CompletedProcess[str]:
    (folder / "onnxruntime.py").write_text(STAND_IN)
    if model != "nope.onnx":
        (folder / model).touch()
    Image.fromarray(pixels).save(folder / "street.png")
    command = [sys.executable, str(SCRIPT), model, "street.png", labels]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("model", "size", "name"),
    [("single", (4, 6), "labels.png"), ("all sizes", (5, 3), "labels.jpg")],
)
def test_it_writes_the_labels(model, size, name, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    done = run(tmp_path, model, pixels, name)
    assert done.returncode == 0, done.stderr
    labels = np.asarray(Image.open(tmp_path / name))
    np.testing.assert_array_equal(labels, pixels.argmax(-1))
    assert f"green: {np.mean(labels == 1):.1%}\n" in done.stdout


def test_a_missing_file_is_one_message(tmp_path):
    done = run(tmp_path, "nope.onnx", np.zeros((4, 6, 3), np.uint8))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "onnx_labels.py: error: nope.onnx: no such file"


def test_the_picture_is_not_replaced(tmp_path):
    done = run(tmp_path, "single", np.zeros((4, 6, 3), np.uint8), "./street.png")
    assert done.returncode == 2
    message = "street.png: is to be read; expected another file for the labels"
    assert done.stderr.splitlines()[-1] == f"onnx_labels.py: error: {message}"


def test_a_picture_of_another_size_is_refused(tmp_path):
    done = run(tmp_path, "single", np.zeros((6, 4, 3), np.uint8))
    assert done.returncode == 2
    message = "street.png: expected pixels [4, 6, 3], got (6, 4, 3)"
    assert done.stderr.splitlines()[-1] == f"onnx_labels.py: error: {message}"
    assert not (tmp_path / "labels.png").exists()


def test_a_picture_of_16_bits_is_refused(tmp_path):
    done = run(tmp_path, "single", np.full((4, 6), 256, np.uint16))
    assert done.returncode == 2
    message = "street.png: expected 8 bits for each value, got mode I"  # or I;16
    assert done.stderr.splitlines()[-1].startswith(f"onnx_labels.py: error: {message}")
