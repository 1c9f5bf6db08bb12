"""R50's exported logits in TensorRT: NVIDIA's ``trtexec`` builds, runs and times the ONNX file.

python -m emanet_triton.bench.gpu_check.tensorrt --out DIR
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from emanet_triton.bench.gpu_check.own import StepParser, run_main
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.command import say
from emanet_triton.deploy.export import export
from emanet_triton.deploy.verify import example_image, logits_check
from emanet_triton.errors import InputError
from emanet_triton.inference.inputs import normalise
from emanet_triton.models.fused import fuse

TIMES = "GPU Compute Time"  # the beginning of trtexec's line with the times


def main(arguments: Sequence[str]) -> int:
    """Export, run and compare; return 1 if the logits are wrong.

    Raises:
        InputError: there is no ``trtexec``, or it fails.
    """
    options = StepParser("tensorrt", (__doc__ or "").splitlines()[0]).parse(arguments)
    if shutil.which("trtexec") is None:
        raise InputError("trtexec, which comes with TensorRT, is not installed here")
    device = "cpu" if options.rehearse else "cuda"
    size = (64, 128) if options.tiny else (512, 1024)
    protocol = make_protocol("whole", size, options.tiny)
    model = make_network("r50", protocol, options.tiny).to(device)
    file = options.out / "r50.onnx"
    export(model, file, to="onnx", size=size, check=False, overwrite=True)
    images = normalise(torch.from_numpy(example_image(size, seed=0))[None].to(device), model)
    images = images.contiguous()
    got = _logits(file, images)
    with torch.no_grad():
        wanted = fuse(model)(images).cpu()
    check = logits_check(got.view_as(wanted), wanted, 1, size, "fp32")
    say(str(check))
    return int(not check.passed)


def _logits(file: Path, images: Tensor) -> Tensor:
    """What TensorRT computes, in one row.

    Raises:
        InputError: ``trtexec`` fails.
    """
    given, found = file.with_name("images.bin"), file.with_name("logits.json")
    images.cpu().numpy().tofile(given)
    command = [
        "trtexec",
        f"--onnx={file}",
        "--noTF32",
        f"--loadInputs=images:{given}",
        f"--exportOutput={found}",
    ]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    file.with_name("trtexec.txt").write_text(done.stdout)
    if done.returncode:
        raise InputError(f"trtexec failed: {done.stdout[-300:]}")
    for line in done.stdout.splitlines():
        if TIMES in line:
            say(line[line.index(TIMES) :])
    (output,) = (each for each in json.loads(found.read_text()) if each["name"] == "logits")
    return torch.tensor(output["values"], dtype=torch.float32)


if __name__ == "__main__":
    run_main(main)
