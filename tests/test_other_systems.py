"""The package without the modules and functions that only POSIX systems or only Linux have."""

import subprocess
import sys

# The child process loses this before it imports the package: Windows lacks it, macOS a part of it.
CHILD = """
import importlib, os, pkgutil, signal, sys
import cv2, filelock, numpy, tabulate, torch, torchvision, tqdm

for name in ("fcntl", "grp", "pwd", "resource", "termios", "triton", "tty"):
    sys.modules[name] = None  # an import of it fails
for module, names in (
    (os, "fchmod getuid geteuid killpg mkfifo pread sched_getaffinity setsid uname"),
    (os, "O_CLOEXEC O_NOCTTY O_NOFOLLOW O_NONBLOCK"),
    (signal, "SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 pthread_sigmask"),
):
    for name in names.split():
        delattr(module, name)

import emanet_triton

model = emanet_triton.create_model("emanet_demo", pretrained=True)
print(emanet_triton.segment(model, numpy.zeros((40, 72, 3), numpy.uint8)).shape)

for module in pkgutil.walk_packages(emanet_triton.__path__, "emanet_triton."):
    # The kernels need Triton, the benchmark measures on Linux, and the two others need packages.
    inner = module.name.split(".")[1]
    if inner not in ("kernels", "bench", "mmseg", "hub"):
        importlib.import_module(module.name)

from emanet_triton import command
from emanet_triton.eval.__main__ import main

command.run(lambda: main(["--limit", "1", "--threads", "1"]))
"""


def test_segment_and_an_evaluation_without_posix_and_linux():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(40, 72)\n")
    assert "This was a demonstration" in done.stdout
