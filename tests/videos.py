"""Videos for tests."""

from pathlib import Path

import cv2
import numpy as np


def write_video(path: Path, frames: list[np.ndarray], rate: float) -> None:
    """Write RGB frames as a video."""
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
