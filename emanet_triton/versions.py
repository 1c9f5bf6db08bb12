"""The versions of the software on which results depend."""

import platform
from importlib import metadata

import cv2
import numpy as np
import torch

from emanet_triton._version import __version__


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
        return "absent"
