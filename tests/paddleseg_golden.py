"""The vectors that PaddleSeg computed, and the rule that made its weights.

``golden/other/paddleseg_*.json`` lists (key, shape, dtype) of every entry of PaddleSeg's state
dict in its order. The ``.npz`` beside it holds a normalised input ``x`` and PaddleSeg's ``logits``
before they are resized.
"""

import json
from pathlib import Path

import numpy as np

from tests.golden_data import make_tensor

FOLDER = Path(__file__).parent / "golden" / "other"
_KINDS = {  # PaddleSeg's parts of names, and the names by which ``make_tensor`` knows the kind
    "conv2._batch_norm.": "bn3.",
    "_batch_norm.": "bn.",
    "bn._mean": "bn.running_mean",
    "bn3._mean": "bn3.running_mean",
    "_variance": "running_var",
    "emau.mu": "ema_module.bases",
}


def paddleseg_weights(name: str) -> dict[str, np.ndarray]:
    """The weights with which PaddleSeg computed ``golden/other/<name>.npz``, by its own keys."""
    keys = json.loads((FOLDER / f"{name}.json").read_text())
    return {key: paddleseg_array(key, shape) for key, shape, _ in keys}


def paddleseg_array(key: str, shape: list[int]) -> np.ndarray:
    """One entry of a PaddleSeg state dict: ``make_tensor`` with seed 0 for the renamed key."""
    for theirs, ours in _KINDS.items():
        key = key.replace(theirs, ours)
    return make_tensor(key, shape, seed=0).numpy()
