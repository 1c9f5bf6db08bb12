"""``FusedEMANet`` for mmsegmentation 1.x."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.structures import PixelData
from mmseg.models.builder import MODELS
from torch import Tensor

from emanet_triton.inference.prepared import Prepared
from emanet_triton.inference.taps import View
from emanet_triton.mmseg.fused import FusedEncoderDecoder

Meta = Mapping[str, Any]  # mmsegmentation's "metainfo" of an image


@MODELS.register_module()
class FusedEMANet(FusedEncoderDecoder):
    """The segmentor for ``model.type``: see ``FusedEncoderDecoder``.

    Args:
        labels_only: ``predict`` returns labels without ``seg_logits``, and computes them without
            logits of the images' size. Test-time augmentation needs ``seg_logits``.
    """

    def __init__(self, *args: Any, labels_only: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.labels_only = labels_only

    def encode_decode(self, inputs: Tensor, batch_img_metas: Sequence[Meta]) -> Tensor:
        """Normalised images [B, 3, H, W] → logits [B, num_classes, H, W]."""
        if not self._runs_fused():
            return super().encode_decode(inputs, batch_img_metas)
        return self.decode_head.predict_by_feat(self._low_logits(inputs), batch_img_metas)

    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> Sequence[Any]:
        """Fill ``data_samples`` with the results of normalised images [B, 3, H, W].

        Returns:
            The samples. ``pred_sem_seg`` is int64 [1, H, W]. Without ``labels_only``,
            ``seg_logits`` is float [num_classes, H, W].
        """
        if data_samples is None or not (self.labels_only and self._runs_fused()):
            return super().predict(inputs, data_samples)
        height, width = inputs.shape[2:]
        found = [_prepared(sample.metainfo, (height, width)) for sample in data_samples]
        images = [image for image in found if image is not None]
        if len(images) < len(found):
            return super().predict(inputs, data_samples)
        for sample, labels in zip(data_samples, self._labels([inputs], images), strict=True):
            sample.set_data({"pred_sem_seg": PixelData(data=labels[None])})
        return data_samples


def _prepared(meta: Meta, size: tuple[int, int]) -> Prepared | None:
    """How an input of ``size`` shows an image; ``None`` if only mmsegmentation knows.

    mmsegmentation enlarges the logits to ``pad_shape``, cuts the padding off, flips and resizes.
    """
    enlarged = tuple(meta.get("pad_shape", meta["img_shape"])[:2])
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    if enlarged != size or left or top:
        return None
    shown = size[0] - bottom, size[1] - right
    direction = meta.get("flip_direction") if meta.get("flip") else None
    flipped = direction == "vertical", direction == "horizontal"
    return Prepared((View(size, shown, flipped),), tuple(meta["ori_shape"][:2]))
