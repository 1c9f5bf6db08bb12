"""The step for TensorRT, with ONNX Runtime in the place of ``trtexec``."""

import os
import sys

import pytest

from emanet_triton.bench.gpu_check.tensorrt import main
from emanet_triton.errors import InputError

FAKE = """#!{python}
import json, sys
import numpy as np, onnxruntime
given = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:] if "=" in argument)
assert "--noTF32" in sys.argv
name, path = given["loadInputs"].split(":")
session = onnxruntime.InferenceSession(given["onnx"])
shape = session.get_inputs()[0].shape
(logits,) = session.run(None, {{name: np.fromfile(path, np.float32).reshape(shape)}})
out = [{{"name": "logits", "dimensions": "1x2", "values": logits.ravel().tolist()}}]
open(given["exportOutput"], "w").write(json.dumps(out))
print("[I] GPU Compute Time: min = 1 ms")
sys.exit({code})
"""


@pytest.fixture
def trtexec(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def install(code=0):
        program = tmp_path / "bin" / "trtexec"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE.format(python=sys.executable, code=code))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return install


def test_right_logits(tmp_path, trtexec, capsys):
    trtexec()
    arguments = ["--tiny", "--rehearse", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    time, comparison, *_ = said.splitlines()
    assert time == "GPU Compute Time: min = 1 ms"
    assert comparison.startswith("1 image of 64x128: logits, relative error ")


def test_a_failure_is_reported(tmp_path, trtexec):
    trtexec(code=1)
    with pytest.raises(InputError, match=r"trtexec failed: .*GPU Compute Time"):
        main(["--tiny", "--rehearse", "--out", str(tmp_path)])
    assert "GPU Compute Time" in (tmp_path / "trtexec.txt").read_text()
