"""EMANet inside mmsegmentation 0.x and 1.x. A configuration imports this package:

    custom_imports = dict(imports=["emanet_triton.mmseg"], allow_failed_imports=False)

The import registers these classes:

- ``EMAHead`` takes the place of mmsegmentation's. Its EM iterations are this package's operator;
  all else stays mmsegmentation's.
- ``FusedEMANet`` is a segmentor for ``model.type``. Testing runs the fused network; training is
  that of mmsegmentation's ``EncoderDecoder``.
- ``FusedTTAModel`` for ``tta_model.type``, in 1.x only: its test-time augmentation.

Raises:
    ImportError: mmsegmentation, or the mmcv or mmengine that it needs, is not installed.
"""

try:
    from mmseg.models import EncoderDecoder
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("mmseg", "mmcv", "mmengine"):
        raise
    raise ImportError(
        "emanet_triton.mmseg works inside mmsegmentation 0.x or 1.x, which is not installed here: "
        f"there is no module {error.name}"
    ) from None

from emanet_triton.mmseg.head import EMAHead

if hasattr(EncoderDecoder, "predict"):
    from emanet_triton.mmseg.version_1 import FusedEMANet
else:
    from emanet_triton.mmseg.version_0 import FusedEMANet  # type: ignore[assignment]

__all__ = ["EMAHead", "FusedEMANet"]
