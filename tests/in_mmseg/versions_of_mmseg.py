"""One way to use mmsegmentation 0.x and 1.x in tests."""

import copy
from pathlib import Path

import golden_data
import mmseg
import numpy as np
import torch
from mmseg import apis
from mmseg.models import EncoderDecoder
from mmseg.models.builder import MODELS
from mmseg.models.decode_heads import ema_head
from torch import nn
from torch.nn import functional as F

VERSION_1 = hasattr(EncoderDecoder, "predict")
if VERSION_1:
    from mmengine import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData  # noqa: F401  # for the tests
    from mmseg.structures import SegDataSample

    init_default_scope("mmseg")
else:
    from mmcv import Config

SHIPPED = Path(mmseg.__file__).parent / ".mim"
NAME = (
    "emanet_{depth}-d8_4xb2-80k_cityscapes-{crop}.py"
    if VERSION_1
    else "emanet_{depth}-d8_{crop}_80k_cityscapes.py"
)
PUBLISHED = {
    f"{depth}-{crop}": SHIPPED / "configs" / "emanet" / NAME.format(depth=depth, crop=crop)
    for depth in ("r50", "r101")
    for crop in ("512x1024", "769x769")
}
IMPORTS = 'custom_imports = dict(imports=["emanet_triton.mmseg"], allow_failed_imports=False)'
# A network of few channels on small images, with windows of 65x65 if it has windows.
SMALL = {
    "model.backbone.base_channels": 8,
    "model.backbone.stem_channels": 8,
    "model.decode_head.in_channels": 256,
    "model.decode_head.channels": 16,
    "model.decode_head.ema_channels": 16,
    "model.decode_head.num_bases": 8,
    "model.auxiliary_head.in_channels": 128,
    "model.auxiliary_head.channels": 16,
}
NORM = {
    f"model.{part}.norm_cfg.type": "BN" for part in ("backbone", "decode_head", "auxiliary_head")
}
WINDOWS = {"model.test_cfg.crop_size": (65, 65), "model.test_cfg.stride": (43, 43)}


def options_of(name: str) -> dict:
    """Options that make a published configuration small; SyncBN becomes BN."""
    return SMALL | NORM | (WINDOWS if "769" in name else {})


def config_of(name: str = "r50-512x1024", **options) -> Config:
    """A published configuration, made small. ``options`` are fields of ``model``."""
    config = Config.fromfile(str(PUBLISHED[name]))
    config.merge_from_dict(options_of(name))
    config.merge_from_dict({f"model.{field}": value for field, value in options.items()})
    config.model.pretrained = None
    return config


def build(config: Config) -> nn.Module:
    """The segmentor of a configuration, from seed 0, in evaluation mode."""
    torch.manual_seed(0)
    return MODELS.build(copy.deepcopy(config.model)).eval()


def reference_of(config: Config) -> Config:
    """The configuration with mmsegmentation's own segmentor and head."""
    config = copy.deepcopy(config)
    config.model.type = "EncoderDecoder"
    config.model.decode_head.type = ema_head.EMAHead
    for option in ("precision", "labels_only"):
        config.model.pop(option, None)
    return config


def pair_of(config: Config) -> tuple[nn.Module, nn.Module]:
    """mmsegmentation's own segmentor and ``FusedEMANet`` with the same lively weights."""
    reference = enliven(build(reference_of(config)))
    config = copy.deepcopy(config)
    config.model.type = "FusedEMANet"
    fused = build(config)
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def images_of(batch: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Normalised images [batch, 3, *size] with areas of many colours."""
    few = torch.randn(batch, 3, 5, 8, generator=torch.manual_seed(seed))
    return F.interpolate(few, size, mode="bicubic")


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network random weights and fitting statistics. It predicts many classes, clearly."""
    state = {
        key: golden_data.make_tensor(key, list(value.shape), seed)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    features = model.backbone(images_of(4, (64, 96), seed=9))
    classifier, logits = model.decode_head.conv_seg, model.decode_head(features)
    logits -= classifier.bias[:, None, None]
    scale = 5 / logits.std((0, 2, 3)).mean()
    classifier.weight *= scale
    classifier.bias.copy_(-scale * logits.mean((0, 2, 3)))
    return model


def metas_of(
    batch: int, size: tuple[int, int], image: tuple[int, int], flip: str = "", pad=(0, 0)
) -> list[dict]:
    """What the pipeline says of a batch of inputs of ``size``, ``pad`` of it padding.

    ``image`` is the size of the images, all as (height, width).
    """
    shown = size[0] - pad[0], size[1] - pad[1]
    meta = {
        "ori_shape": image if VERSION_1 else (*image, 3),
        "img_shape": shown if VERSION_1 else (*shown, 3),
        "pad_shape": size if VERSION_1 else (*size, 3),
        "flip": bool(flip),
        "flip_direction": flip or None,
        "padding_size": [0, pad[1], 0, pad[0]],
    }
    return [dict(meta) for _ in range(batch)]


@torch.no_grad()
def encoded(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the inputs' size."""
    size = tuple(inputs.shape[2:])
    return model.encode_decode(inputs, metas_of(len(inputs), size, size))


@torch.no_grad()
def tested(model: nn.Module, inputs: list[torch.Tensor], metas: list[list[dict]]) -> np.ndarray:
    """The labels [B, H, W] of a batch in one or, in 0.x, several views."""
    if not VERSION_1:
        return np.stack(model(inputs, metas, return_loss=False))
    (inputs,), (metas,) = inputs, metas
    samples = [SegDataSample(metainfo=meta) for meta in metas]
    return np.stack([s.pred_sem_seg.data[0] for s in model(inputs, samples, mode="predict")])


def recorded(model: nn.Module, run) -> tuple[object, torch.Tensor]:
    """The result of ``run()`` and the model's probabilities [B, C, H, W], averaged over views."""
    found = []
    name = "predict" if VERSION_1 else "inference"
    original = getattr(model, name)

    def record(*args):
        result = original(*args)
        if VERSION_1:
            found.append(torch.stack([sample.seg_logits.data for sample in result]).softmax(1))
        else:
            found.append(result.clone())
        return result

    setattr(model, name, record)
    try:
        return run(), torch.stack(found).mean(0)
    finally:
        delattr(model, name)


def assert_labels(got, want, probabilities: torch.Tensor) -> None:
    """Labels are equal where the two best probabilities differ by more than 1e-3."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    best, second = probabilities.topk(2, dim=1).values.unbind(1)
    clear = (best - second > 1e-3).numpy()
    assert clear.mean() > 0.9 and len(np.unique(want)) > 2
    np.testing.assert_array_equal(got[clear], want[clear])


def load(config: Config, checkpoint: Path) -> nn.Module:
    """The segmentor of a configuration, made and loaded by mmsegmentation."""
    start = apis.init_model if VERSION_1 else apis.init_segmentor
    return start(copy.deepcopy(config), str(checkpoint), device="cpu")


def segment(model: nn.Module, picture: Path) -> np.ndarray:
    """The labels [H, W] of a picture, by mmsegmentation's pipeline."""
    if VERSION_1:
        return np.asarray(apis.inference_model(model, str(picture)).pred_sem_seg.data[0])
    return apis.inference_segmentor(model, str(picture))[0]
