"""``FusedEMANet`` and ``FusedTTAModel`` for mmsegmentation 1.x."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.models.builder import MODELS
from torch import Tensor

from emanet_triton.inference.prepared import Prepared
from emanet_triton.inference.views import View
from emanet_triton.mmseg.fused import FusedEncoderDecoder

Meta = Mapping[str, Any]  # mmsegmentation's "metainfo" of an image


@MODELS.register_module()
class FusedEMANet(FusedEncoderDecoder):
    """The segmentor for ``model.type``: see ``FusedEncoderDecoder``.

    Args:
        labels_only: ``predict`` returns labels without ``seg_logits``, and computes them without
            logits of the images' size. mmsegmentation's ``SegTTAModel`` needs ``seg_logits``.
    """

    def __init__(self, *args: Any, labels_only: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.labels_only = labels_only

    def encode_decode(self, inputs: Tensor, batch_img_metas: Sequence[Meta]) -> Tensor:
        """Normalised images [B, 3, H, W] → logits [B, num_classes, H, W]."""
        if not self.runs_fused():
            return super().encode_decode(inputs, batch_img_metas)
        return self.decode_head.predict_by_feat(self._low_logits(inputs), batch_img_metas)

    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> Sequence[Any]:
        """Fill ``data_samples`` with the results of normalised images [B, 3, H, W].

        Returns:
            The samples. ``pred_sem_seg`` is int64 [1, H, W]. Without ``labels_only``,
            ``seg_logits`` is float [num_classes, H, W].
        """
        if data_samples is None or not (self.labels_only and self.runs_fused()):
            return super().predict(inputs, data_samples)
        images = _prepared([inputs], [data_samples])
        if images is None:
            return super().predict(inputs, data_samples)
        return _with_labels(data_samples, self.labels_of([inputs], images))


@MODELS.register_module()
class FusedTTAModel(SegTTAModel):
    """Test-time augmentation of a ``FusedEMANet``, for ``tta_model.type``.

    It averages the probabilities of all views as ``SegTTAModel`` does, but without logits of the
    images' size.
    """

    def test_step(self, data: Mapping[str, Any]) -> Sequence[Any]:
        """The samples of the first view with ``pred_sem_seg``, int64 [1, H, W].

        Args:
            data: "inputs" and "data_samples", each a list with an entry for each view.
        """
        model = self.module
        if not (isinstance(model, FusedEMANet) and model.runs_fused()):
            return super().test_step(data)
        views = [
            model.data_preprocessor({"inputs": inputs, "data_samples": samples}, False)
            for inputs, samples in zip(data["inputs"], data["data_samples"], strict=True)
        ]
        inputs, samples = ([view[name] for view in views] for name in ("inputs", "data_samples"))
        images = _prepared(inputs, samples)
        if images is None:
            return super().test_step(data)
        return _with_labels(samples[0], model.labels_of(inputs, images))


def _with_labels(samples: Sequence[Any], labels: Sequence[Tensor]) -> Sequence[Any]:
    for sample, of_image in zip(samples, labels, strict=True):
        sample.set_data({"pred_sem_seg": PixelData(data=of_image[None])})
    return samples


def _prepared(inputs: Sequence[Tensor], samples: Sequence[Sequence[Any]]) -> list[Prepared] | None:
    """How the views of a batch show its images; ``None`` if only mmsegmentation knows.

    Args:
        inputs: for each view a batch [B, 3, H, W].
        samples: for each view the samples of the B images.
    """
    images = []
    for of_image in zip(*samples, strict=True):
        metas = [sample.metainfo for sample in of_image]
        views = [
            _view(meta, tuple(batch.shape[2:])) for meta, batch in zip(metas, inputs, strict=True)
        ]
        known = tuple(view for view in views if view is not None)
        if len(known) < len(views):
            return None
        images.append(Prepared(known, tuple(metas[0]["ori_shape"][:2])))
    return images


def _view(meta: Meta, size: tuple[int, ...]) -> View | None:
    """How an input of (height, width) shows an image; ``None`` if only mmsegmentation knows.

    mmsegmentation enlarges the logits to ``pad_shape``, cuts the padding off, flips and resizes.
    """
    enlarged = tuple(meta.get("pad_shape", meta["img_shape"])[:2])
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    if enlarged != size or left or top:
        return None
    height, width = size
    direction = meta.get("flip_direction") if meta.get("flip") else None
    flipped = direction == "vertical", direction == "horizontal"
    return View((height, width), (height - bottom, width - right), flipped)
