"""The models of the zoo: a literal table of networks, protocols, files and published figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emanet_triton.data.ade20k import ADE20K
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Dataset
from emanet_triton.data.voc import VOC2012
from emanet_triton.models.checkpoint_files.layouts import MMSEGMENTATION, project_of
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.network import RGB, Network
from emanet_triton.models.protocol import Protocol


@dataclass(frozen=True)
class Source:
    """A project that published checkpoints.

    Attributes:
        project: its name.
        url: its page.
        code_license: SPDX identifier of its code's licence.
        weights_license: the same for its weights; ``None`` if the project does not say it.
    """

    project: str
    url: str
    code_license: str
    weights_license: str | None = None


@dataclass(frozen=True)
class Published:
    """What a project reports for a checkpoint, on the data set's validation images.

    Attributes:
        miou: mIoU in percent with one view.
        miou_ms_flip: mIoU in percent with several scales, each also mirrored.
        miou_flip: mIoU in percent with one scale, plain and mirrored.
        miou_test: mIoU in percent on the test images, with one view.
        memory_gb: training memory in GB per GPU, for 2 images of the crop size.
        fps: images of 2048x1024 pixels per second on a V100, batch size 1, float32.
        note: what else must be known about the figures.
    """

    miou: float
    miou_ms_flip: float | None = None
    miou_flip: float | None = None
    miou_test: float | None = None
    memory_gb: float | None = None
    fps: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ZooEntry:
    """One model: its network, its protocol and its checkpoint file.

    Attributes:
        architecture: sizes of the network.
        protocol: how the checkpoint is evaluated.
        source: key of the project in ``SOURCES``; ``None`` if no project published the model.
        file: the checkpoint's file name; ``None`` if the zoo has no checkpoint of the model.
        sha256: first hex digits of the file's SHA-256; ``None`` if nobody has published them.
        url: where the file is published; ``None`` if it has no address.
        md5_url: where the file's MD5 is published; ``None`` if it is not.
        published: the reported figures; ``None`` if nothing was published.
        network: the class of the network. It is called with the architecture, the protocol and a
            number of classes, and its method ``fused_form`` makes the fused network.
        dataset: the data set whose classes the model has.
        crop: (height, width) of training samples in pixels (mmseg ``crop_size``).
    """

    architecture: Any
    protocol: Protocol
    source: str | None = None
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    md5_url: str | None = None
    published: Published | None = None
    network: type[Network] = EMANet
    dataset: Dataset = CITYSCAPES
    crop: tuple[int, int] = (512, 1024)

    @property
    def packaged(self) -> Path | None:
        """The file inside this package; ``None`` if it is not in the package."""
        path = WEIGHTS / self.file if self.file else None
        return path if path is not None and path.exists() else None


PACKAGE = "emanet_triton"  # the source of the models that come with this package

SOURCES = {
    "mmseg": Source(
        project_of(MMSEGMENTATION),
        "https://github.com/open-mmlab/mmsegmentation",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
    ),
    "bdd100k": Source(
        "BDD100K Model Zoo",
        "https://github.com/SysCV/bdd100k-models",
        code_license="Apache-2.0",
    ),
    "sssegmentation": Source(
        project_of("sssegmentation"),
        "https://github.com/SegmentationBLWX/sssegmentation",
        code_license="Apache-2.0",
    ),
    "official": Source(
        project_of("official"),
        "https://github.com/XiaLiPKU/EMANet",
        code_license="GPL-3.0-only",
    ),
    "paddleseg": Source(
        project_of("paddleseg"),
        "https://github.com/PaddlePaddle/PaddleSeg",
        code_license="Apache-2.0",
    ),
    PACKAGE: Source(
        "emanet_triton",
        "this package",
        code_license="Apache-2.0",
        weights_license="Apache-2.0",
    ),
}

WEIGHTS = Path(__file__).parent / "weights"  # files of models inside this package
_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)
_HALF: RGB = (127.5, 127.5, 127.5)

_WINDOWS: dict[str, Any] = {
    "mode": "slide",
    "crop": (769, 769),
    "stride": (513, 513),
    "align_corners": True,
}
_WHOLE = Protocol(base_scale=(2048, 1024))
_SLIDE = Protocol(base_scale=(2049, 1025), **_WINDOWS)
_BDD100K_WHOLE = Protocol(base_scale=(1280, 720))
_BDD100K_SLIDE = Protocol(base_scale=(1281, 721), **_WINDOWS)


def _mmseg(
    model: str, digits: str, blocks: tuple[int, int, int, int], published: Published
) -> dict[str, ZooEntry]:
    windows = "769x769" in model
    file = f"{model}_20200901_100301-{digits}.pth"
    url = f"https://download.openmmlab.com/mmsegmentation/v0.5/emanet/{model}/{file}"
    return {
        model: ZooEntry(
            source="mmseg",
            architecture=Architecture(blocks),
            protocol=_SLIDE if windows else _WHOLE,
            file=file,
            sha256=digits,
            url=url,
            published=published,
            crop=(769, 769) if windows else (512, 1024),
        )
    }


def _bdd100k(model: str, miou: float, miou_test: float) -> dict[str, ZooEntry]:
    windows, drivable = "769x769" in model, "drivable" in model
    task = "drivable" if drivable else "sem_seg"
    url = f"https://dl.cv.ethz.ch/bdd100k/{task}/models/{model}"
    return {
        model: ZooEntry(
            source="bdd100k",
            architecture=Architecture(_R50),
            protocol=_BDD100K_SLIDE if windows else _BDD100K_WHOLE,
            file=f"{model}.pth",
            url=f"{url}.pth",
            md5_url=f"{url}.md5",
            published=Published(miou, miou_test=miou_test),
            dataset=BDD100K_DRIVABLE if drivable else BDD100K,
            crop=(769, 769) if windows else (512, 1024),
        )
    }


def _sssegmentation(dataset: str, miou: dict[str, float]) -> dict[str, ZooEntry]:
    """The four networks of a data set, by depth and output stride."""
    cityscapes = dataset == "cityscapes"
    protocol = Protocol(
        base_scale=(2048, 1024) if cityscapes else (2048, 512),
        direct=True,
        average="logits",
        scaling="input",
        version="sssegmentation",
    )
    entries = {}
    for backbone, figure in miou.items():
        wide: dict[str, Any] = {"head_channels": 512, "layout": "sssegmentation"}
        if backbone.endswith("os16"):
            wide |= {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
        model = f"emanet_{backbone}_{dataset}"
        entries[model] = ZooEntry(
            source="sssegmentation",
            architecture=Architecture(_R101 if "101" in backbone else _R50, **wide),
            protocol=protocol,
            file=f"{model}.pth",
            url="https://github.com/SegmentationBLWX/modelstore/releases/download/ssseg_emanet/"
            f"{model}.pth",
            published=Published(figure),
            dataset={"voc": VOC2012, "ade20k": ADE20K, "cityscapes": CITYSCAPES}[dataset],
            crop=(512, 1024) if cityscapes else (512, 512),
        )
    return entries


def _paddleseg(
    model: str, blocks: tuple[int, int, int, int], published: Published
) -> dict[str, ZooEntry]:
    voc = "voc12" in model
    folder = "pascal_voc12" if voc else "cityscapes"
    return {
        model: ZooEntry(
            source="paddleseg",
            architecture=Architecture(
                blocks,
                contract_dilation=False,
                avg_down=True,
                out_relu=True,
                mean=_HALF,
                std=_HALF,
                layout="paddleseg",
            ),
            protocol=Protocol(
                base_scale=None,
                align_corners=voc,
                final_align_corners=False,
                average="logits",
                scaling="rounded",
                ratios=(0.75, 1.0, 1.25),
                pad_size=(512, 512) if voc else None,
                version="paddleseg",
            ),
            file=f"{model}.pdparams",
            url=f"https://bj.bcebos.com/paddleseg/dygraph/{folder}/{model}/model.pdparams",
            published=published,
            dataset=VOC2012 if voc else CITYSCAPES,
            crop=(512, 512) if voc else (512, 1024),
        )
    }


OFFICIAL = "emanet_r101_voc_official"  # the one model of the authors' code
DEMO = "emanet_demo"  # a small model, trained by demo/train.py on generated street scenes

ZOO: dict[str, ZooEntry] = {
    **_mmseg(
        "emanet_r50-d8_512x1024_80k_cityscapes",
        "c43fcef1",
        _R50,
        Published(miou=77.59, miou_ms_flip=79.44, memory_gb=5.4, fps=4.58),
    ),
    **_mmseg(
        "emanet_r101-d8_512x1024_80k_cityscapes",
        "2d970745",
        _R101,
        Published(miou=79.10, miou_ms_flip=81.21, memory_gb=6.2, fps=2.87),
    ),
    **_mmseg(
        "emanet_r50-d8_769x769_80k_cityscapes",
        "16f8de52",
        _R50,
        Published(miou=79.33, miou_ms_flip=80.49, memory_gb=8.9, fps=1.97),
    ),
    **_mmseg(
        "emanet_r101-d8_769x769_80k_cityscapes",
        "47a324ce",
        _R101,
        Published(miou=79.62, miou_ms_flip=81.00, memory_gb=10.1, fps=1.22),
    ),
    **_bdd100k("emanet_r50-d8_769x769_40k_sem_seg_bdd100k", 62.05, 54.52),
    **_bdd100k("emanet_r50-d8_769x769_80k_sem_seg_bdd100k", 62.30, 55.46),
    **_bdd100k("emanet_r50-d8_512x1024_40k_drivable_bdd100k", 81.64, 81.16),
    **_bdd100k("emanet_r50-d8_769x769_40k_drivable_bdd100k", 82.18, 81.36),
    **_bdd100k("emanet_r50-d8_769x769_80k_drivable_bdd100k", 83.14, 82.55),
    **_sssegmentation(
        "voc",
        {
            "resnet50os8": 75.29,
            "resnet50os16": 74.86,
            "resnet101os8": 76.43,
            "resnet101os16": 76.19,
        },
    ),
    **_sssegmentation(
        "ade20k",
        {
            "resnet50os8": 41.77,
            "resnet50os16": 41.46,
            "resnet101os8": 44.39,
            "resnet101os16": 43.97,
        },
    ),
    **_sssegmentation(
        "cityscapes",
        {
            "resnet50os8": 77.96,
            "resnet50os16": 76.73,
            "resnet101os8": 79.54,
            "resnet101os16": 77.54,
        },
    ),
    OFFICIAL: ZooEntry(
        source="official",
        architecture=Architecture(
            _R101,
            multi_grid=(1, 2, 4),
            stem_channels=(64, 64, 128),
            concat_input=False,
            norm_shift=1e-6,
            layout="official",
        ),
        protocol=Protocol(base_scale=None, align_corners=True, pad_step=8, version="official"),
        file=f"{OFFICIAL}.pth",
        published=Published(
            miou=80.51, note="mIoU by the author's word; the project's page says 80.99"
        ),
        dataset=VOC2012,
        crop=(513, 513),
    ),
    **_paddleseg(
        "emanet_resnet50_os8_cityscapes_1024x512_80k",
        _R50,
        Published(miou=79.05, miou_flip=79.34, miou_ms_flip=80.82),
    ),
    **_paddleseg(
        "emanet_resnet101_os8_cityscapes_1024x512_80k",
        _R101,
        Published(miou=80.00, miou_flip=80.23, miou_ms_flip=80.76),
    ),
    **_paddleseg(
        "emanet_resnet50_os8_voc12aug_512x512_40k",
        _R50,
        Published(miou=78.60, miou_flip=78.90, miou_ms_flip=79.55),
    ),
    **_paddleseg(
        "emanet_resnet101_os8_voc12aug_512x512_40k",
        _R101,
        Published(miou=79.47, miou_flip=79.97, miou_ms_flip=80.51),
    ),
    DEMO: ZooEntry(
        source=PACKAGE,
        architecture=Architecture(
            blocks=(1, 1, 1, 1), base_channels=12, ema_channels=64, num_bases=32, head_channels=48
        ),
        protocol=Protocol(base_scale=(512, 256)),
        file="emanet_demo.pth",
        sha256="6bb262a4",
        crop=(192, 384),
    ),
}
