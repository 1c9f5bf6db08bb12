"""``FusedEMANet`` for mmsegmentation 0.x."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmseg.models.builder import MODELS
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.inference.prepared import Prepared
from emanet_triton.inference.views import View
from emanet_triton.mmseg.fused import FusedEncoderDecoder

Metas = Sequence[Mapping[str, Any]]  # mmsegmentation's "img_metas" of a batch


@MODELS.register_module()
class FusedEMANet(FusedEncoderDecoder):
    """The segmentor for ``model.type``: see ``FusedEncoderDecoder``.

    ``simple_test`` and ``aug_test`` compute labels without logits of the images' size.
    """

    def encode_decode(self, img: Tensor, img_metas: Metas | None) -> Tensor:
        """Normalised images [B, 3, H, W] → logits [B, num_classes, H, W]."""
        if not self.runs_fused():
            return super().encode_decode(img, img_metas)
        return F.interpolate(
            self._low_logits(img), img.shape[2:], mode="bilinear", align_corners=self.align_corners
        )

    def simple_test(self, img: Tensor, img_meta: Metas, rescale: bool = True) -> list[np.ndarray]:
        """Labels, int64 [H, W], of a batch [B, 3, h, w] of normalised images."""
        if not self.runs_fused():
            return super().simple_test(img, img_meta, rescale)
        return self._test([img], [img_meta], rescale)

    def aug_test(
        self, imgs: Sequence[Tensor], img_metas: Sequence[Metas], rescale: bool = True
    ) -> list[np.ndarray]:
        """Labels, int64 [H, W], by the mean probabilities of several views [B, 3, h, w]."""
        if not (rescale and self.runs_fused()):
            return super().aug_test(imgs, img_metas, rescale)
        return self._test(imgs, img_metas, rescale)

    def _test(
        self, inputs: Sequence[Tensor], metas: Sequence[Metas], rescale: bool
    ) -> list[np.ndarray]:
        images = []
        for of_image in zip(*metas, strict=True):
            views = tuple(map(_view, inputs, of_image, [rescale] * len(inputs)))
            size = tuple(of_image[0]["ori_shape"][:2]) if rescale else views[0].size
            images.append(Prepared(views, size))
        return [labels.cpu().numpy() for labels in self.labels_of(inputs, images)]


def _view(inputs: Tensor, meta: Mapping[str, Any], rescale: bool) -> View:
    """How a batch [B, 3, h, w] shows an image. Padding is cut off only before a resize."""
    height, width = inputs.shape[2:]
    shown = tuple(meta["img_shape"][:2]) if rescale else (height, width)
    direction = meta["flip_direction"] if meta["flip"] else None
    return View((height, width), shown, (direction == "vertical", direction == "horizontal"))
