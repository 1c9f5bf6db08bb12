"""What the tests of exports share: networks, protocols, and pictures with their labels."""

from dataclasses import replace

import numpy as np
import torch
from small_networks import TINY, small_model

from emanet_triton.deploy.verify import example_image, labels_check, wanted_labels
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.protocol import Protocol

WHOLE = Protocol((128, 64))
SLIDE = Protocol((129, 65), mode="slide", crop=(49, 49), stride=(33, 33), align_corners=True)
PROTOCOLS = {"whole": WHOLE, "slide": SLIDE}
# The protocols of other projects, with small sizes.
DIRECT = Protocol((128, 64), version="sssegmentation", direct=True)
PADDED = Protocol(
    (100, 60),
    align_corners=True,
    version="paddleseg",
    pad_size=(72, 50),
    pad_step=8,
    final_align_corners=False,
)
PADDED_SLIDE = replace(SLIDE, pad_size=(70, 60))
OTHERS = {"direct": DIRECT, "padded": PADDED, "padded-slide": PADDED_SLIDE}


def tiny(protocol=WHOLE):
    model = small_model(TINY)
    model.protocol = protocol
    return model


def pictures(batch, size):
    """uint8 RGB [batch, height, width, 3]."""
    return torch.from_numpy(np.stack([example_image(size, seed) for seed in range(batch)]))


def check_labels(model, protocol, images, labels):
    predictor = Predictor(model, protocol)
    return labels_check(labels, [wanted_labels(predictor, each) for each in images.numpy()], "fp32")


def wrong_labels(model, protocol, images, labels):
    """How many labels are wrong although the two classes are no near-tie."""
    return check_labels(model, protocol, images, labels).beyond
