"""Labels of prepared inputs against the plain sequence of operations at full size."""

import pytest
import torch
from torch.nn import functional as F

from emanet_triton.errors import InputError
from emanet_triton.inference import reference
from emanet_triton.inference.prepared import Prepared, prepared_labels
from emanet_triton.inference.views import View
from emanet_triton.models.protocol import Protocol

WHOLE = Protocol(None)
SLIDE = Protocol(None, "slide", crop=(33, 41), stride=(20, 25), align_corners=True)
SIZE = (50, 77)  # of the images


class Blocks(torch.nn.Module):
    """Logits of 5 classes from the mean colours of 8x8 pixels."""

    def forward(self, images):
        low = F.avg_pool2d(images, 8, ceil_mode=True)
        weight = torch.randn(5, 3, 1, 1, generator=torch.manual_seed(0))
        return F.conv2d(low, 10 * weight)


def full_size(inputs, view, protocol):
    """Probabilities [B, C, H, W] of a view by cutting the padding off, resizing and flipping."""
    logits = reference.view_logits(Blocks(), inputs, view.size, protocol)
    shown = logits[:, :, : view.shown[0], : view.shown[1]]
    resized = F.interpolate(
        shown, SIZE, mode="bilinear", align_corners=protocol.align_corners
    ).softmax(1)
    return resized.flip([axis for axis, flip in zip((2, 3), view.flipped, strict=True) if flip])


@pytest.mark.parametrize("protocol", [WHOLE, SLIDE], ids=["whole", "slide"])
@pytest.mark.parametrize(
    "views",
    [
        (View((40, 64), (40, 64)),),
        (View((40, 64), (37, 60), (True, False)),),
        (
            View((40, 64), (40, 64)),
            View((40, 64), (40, 50), (False, True)),
            View((71, 90), (71, 90)),
        ),
    ],
    ids=["plain", "padded", "several"],
)
def test_labels(views, protocol):
    generator = torch.manual_seed(1)
    inputs = [torch.randn(2, 3, *view.size, generator=generator) for view in views]
    got = prepared_labels(Blocks(), inputs, [Prepared(views, SIZE)] * 2, protocol)
    pairs = zip(inputs, views, strict=True)
    want = torch.stack([full_size(*pair, protocol) for pair in pairs]).mean(0)
    best, second = want.topk(2, dim=1).values.unbind(1)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99 and len(want.argmax(1).unique()) == 5
    assert torch.equal(torch.stack(got)[clear], want.argmax(1)[clear].to(torch.uint8))


def test_images_of_a_batch_may_differ():
    views = View((40, 64), (40, 64)), View((40, 64), (30, 60), (False, True))
    images = [Prepared((views[0],), (80, 90)), Prepared((views[1],), (31, 61))]
    inputs = torch.randn(2, 3, 40, 64, generator=torch.manual_seed(1))
    together = prepared_labels(Blocks(), [inputs], images, WHOLE)
    for i, image in enumerate(images):
        (alone,) = prepared_labels(Blocks(), [inputs[i : i + 1]], [image], WHOLE)
        assert torch.equal(together[i], alone) and alone.shape == image.size


def test_logits_that_are_not_finite():
    image = Prepared((View((16, 16), (16, 16)),), (16, 16))
    with pytest.raises(InputError, match="the logits of the network are not finite"):
        prepared_labels(Blocks(), [torch.full((1, 3, 16, 16), float("inf"))], [image], WHOLE)
