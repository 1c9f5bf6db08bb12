"""The versions of the software on which results depend."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import torch

from emanet_triton._version import __version__

ROOT = Path(__file__).parents[1]  # the repository's folder
COMMIT = "COMMIT"
ABSENT = "absent"


def versions() -> dict[str, str]:
    """The version of this package, of Python, and of each package that computes."""
    return {
        "emanet_triton": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": package_version("torchvision"),  # importing it takes a second and 90 MB
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def package_version(name: str) -> str:
    """The version of an installed package, without importing it, or "absent"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def commit() -> str:
    """The commit of this package's repository, or "unknown".

    In a copy of the repository without its history, the file ``COMMIT`` in its root names it. A
    repository around an installed package, such as one with a virtual environment in it, is not
    this package's.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    try:
        said = subprocess.check_output(
            command, cwd=ROOT, env=alone, text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        file = ROOT / COMMIT
        said = file.read_text() if file.is_file() else "unknown"
    return said.strip()
