"""Trained checkpoints of the tiny model, for tests."""

from collections.abc import Mapping
from pathlib import Path

import tiny_eval
from described_sets import described

from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.description import Description
from emanet_triton.models.protocol import Protocol

CLASSES = ("sea", "sand", "sky")
TRAINED = Description(
    model=tiny_eval.NAME,
    classes=CLASSES,
    protocol=Protocol((48, 24), ratios=(0.5, 1.0)),
    dataset=described(name="Beach", classes=list(CLASSES)).description,
    info={"iteration": 300, "mIoU": 41.25},
)


def write_trained(
    path: Path, trained: Description | Mapping[str, str] = TRAINED, num_classes: int = len(CLASSES)
) -> Path:
    """Write the tiny model's weights with a description, or with other metadata."""
    metadata = trained.metadata() if isinstance(trained, Description) else trained
    path.write_bytes(write_safetensors(tiny_eval.tiny_network(num_classes).state_dict(), metadata))
    return path
