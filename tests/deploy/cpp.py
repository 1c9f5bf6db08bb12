"""The programs of ``examples`` label a picture as ``segment`` does. ``make test-cpp`` runs this."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from emanet_triton import create_model, segment
from emanet_triton.data.scenes.generate import VAL_SEEDS, generate_scene
from emanet_triton.deploy.__main__ import main as export

EXAMPLES = Path(__file__).parents[2] / "examples"
HEIGHT, WIDTH = 128, 256
# Of each program and the file that it gets: the format, the file's name, packages that it needs.
CASES = {
    "aoti": ("aoti", "model.pt2", ()),
    "openvino of onnx": ("onnx", "model.onnx", ("onnxscript", "openvino")),
    "openvino of openvino": ("openvino", "model.xml", ("onnxscript", "openvino")),
    "onnx_labels.py": ("onnx", "model.onnx", ("onnxscript", "onnxruntime")),
}
NEAR_TIE = 1e-3  # labels may differ where the two best probabilities differ by less
BLOCKED = (
    "import runpy, sys; sys.modules['torch'] = sys.modules['emanet_triton'] = None; "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def build(folder):
    """The folder of the compiled programs."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=search)
    assert cmake, "there is no cmake; install it by: make test-cpp"
    packages = filter(None, map(importlib.util.find_spec, ("torch", "openvino")))
    prefixes = ";".join(spec.submodule_search_locations[0] for spec in packages)
    folder = folder / "build"
    run([cmake, "-S", EXAMPLES / "cpp", "-B", folder, f"-DCMAKE_PREFIX_PATH={prefixes}"])
    run([cmake, "--build", folder])
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request, folder):
    """The command that starts a program, and the file for it."""
    to, name, packages = CASES[request.param]
    for package in packages:
        pytest.importorskip(package, reason="install it by: make test-cpp")
    file = folder / name
    if not file.exists():
        write(file, to, "image-to-labels")
    if request.param.endswith(".py"):
        return [sys.executable, "-c", BLOCKED, EXAMPLES / request.param], file
    return [request.getfixturevalue("build") / request.param.split()[0]], file


def write(file: Path, to: str, part: str) -> None:
    size = ["--size", f"{HEIGHT}x{WIDTH}", "--scale", "native", "--device", "cpu"]
    command = ["emanet_demo", "--to", to, "--part", part, "--out", str(file), *size]
    assert export(command) == 0


def run(command, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of which only Python finds Python's packages."""
    python = str(command[0]) == sys.executable
    environment = {name: value for name, value in os.environ.items() if python or name == "PATH"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def ppm(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    return b"P6\n# a comment\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def test_the_labels_are_those_of_segment(case, folder):
    program, file = case
    pixels, _ = generate_scene(VAL_SEEDS[0], HEIGHT, WIDTH)
    (folder / "street.ppm").write_bytes(ppm(pixels))
    done = run([*program, file, folder / "street.ppm", folder / "labels.pgm"])
    labels = cv2.imread(str(folder / "labels.pgm"), cv2.IMREAD_UNCHANGED)

    model = create_model("emanet_demo", pretrained=True)
    native = replace(model.protocol, base_scale=None)
    wanted, probabilities = segment(model, pixels, protocol=native, return_probabilities=True)
    second, best = np.sort(probabilities, axis=0)[-2:]
    clear = best - second > NEAR_TIE
    assert clear.mean() > 0.99
    assert len(np.unique(wanted)) > 3
    np.testing.assert_array_equal(labels[clear], wanted[clear])
    assert "road" in done.stdout


@pytest.mark.parametrize(
    ("file", "picture", "message"),
    [
        ("missing.file", None, r"missing\.file"),
        ("damaged.file", None, r"damaged\.file"),
        (None, "missing.ppm", r"missing\.ppm"),
        (None, "turned.ppm", r"turned\.ppm: expected .*128.*256.*got .*256.*128"),
        (None, "short.ppm", r"short\.ppm|truncated"),
        (None, "header.ppm", r"header\.ppm|header|maxval"),
        (None, "text.ppm", r"text\.ppm"),
    ],
)
def test_an_error_has_one_line(case, folder, file, picture, message):
    program, model = case
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    good = ppm(pixels)
    pictures = {
        "good.ppm": good,
        "turned.ppm": ppm(pixels.transpose(1, 0, 2)),
        "short.ppm": good[:-1],
        "header.ppm": good.replace(b"256 128", b"256 999999999999"),
        "text.ppm": b"no picture",
    }
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    (folder / "damaged.file").write_bytes(model.read_bytes()[:10_000])
    output = folder / "none.pgm"
    arguments = folder / (file or model.name), folder / (picture or "good.ppm"), output
    error = run([*program, *arguments], code=2).stderr
    assert re.search(message, error.splitlines()[-1])
    assert "Traceback" not in error
    assert not output.exists()


def test_a_file_of_another_part_is_refused(build, folder):
    pytest.importorskip("onnxscript", reason="install it by: make test-cpp")
    if not (build / "openvino").exists():
        pytest.skip("openvino is missing; install it by: make test-cpp")
    write(folder / "part.onnx", "onnx", "labels")
    (folder / "good.ppm").write_bytes(ppm(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
    command = [build / "openvino", folder / "part.onnx", folder / "good.ppm", folder / "none.pgm"]
    done = run(command, code=2)
    assert done.stderr.endswith("part.onnx: expected a file of --part image-to-labels\n")
