"""The model zoo: a literal table of all models, and ``create_model``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Dataset
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.description import description_in
from emanet_triton.models.download import download, hub_file
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.loading import load_into
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol


@dataclass(frozen=True)
class Published:
    """What mmsegmentation's model zoo reports for a checkpoint on Cityscapes val.

    Attributes:
        miou: mIoU in percent with one view.
        miou_ms_flip: mIoU in percent with six scales, each also mirrored.
        memory_gb: training memory in GB per GPU, for 2 images of the crop size.
        fps: images of 2048x1024 pixels per second on a V100, batch size 1, float32.
    """

    miou: float
    miou_ms_flip: float
    memory_gb: float
    fps: float


@dataclass(frozen=True)
class ZooEntry:
    """One model: its network, its protocol and its checkpoint file.

    Attributes:
        architecture: sizes of the network.
        protocol: how the checkpoint is evaluated.
        file: the checkpoint's file name; ``None`` if the zoo has no checkpoint of the model.
        sha256: the first eight hex digits of the file's SHA-256.
        url: where the file is published; ``None`` for a file inside this package.
        published: the reported figures; ``None`` if nothing was published.
        network: the class of the network. It is called with the architecture, the protocol and a
            number of classes, and its method ``fused_form`` makes the fused network.
        dataset: the data set whose classes the model has.
        crop: (height, width) of training samples in pixels (mmseg ``crop_size``).
    """

    architecture: Any
    protocol: Protocol
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    published: Published | None = None
    network: type[Network] = EMANet
    dataset: Dataset = CITYSCAPES
    crop: tuple[int, int] = (512, 1024)


_R50 = Architecture(blocks=(3, 4, 6, 3))
_R101 = Architecture(blocks=(3, 4, 23, 3))
_TINY = Architecture(
    blocks=(1, 1, 1, 1), base_channels=12, ema_channels=64, num_bases=32, head_channels=48
)
_WHOLE = Protocol(base_scale=(2048, 1024))
_SLIDE = Protocol(
    base_scale=(2049, 1025), mode="slide", crop=(769, 769), stride=(513, 513), align_corners=True
)
_WEIGHTS = Path(__file__).parent / "weights"
_URL = "https://download.openmmlab.com/mmsegmentation/v0.5/emanet"

DEMO = "emanet_demo"  # a small model, trained by demo/train.py on generated street scenes

ZOO: dict[str, ZooEntry] = {
    "emanet_r50-d8_512x1024_80k_cityscapes": ZooEntry(
        architecture=_R50,
        protocol=_WHOLE,
        file="emanet_r50-d8_512x1024_80k_cityscapes_20200901_100301-c43fcef1.pth",
        sha256="c43fcef1",
        url=f"{_URL}/emanet_r50-d8_512x1024_80k_cityscapes/"
        "emanet_r50-d8_512x1024_80k_cityscapes_20200901_100301-c43fcef1.pth",
        published=Published(miou=77.59, miou_ms_flip=79.44, memory_gb=5.4, fps=4.58),
    ),
    "emanet_r101-d8_512x1024_80k_cityscapes": ZooEntry(
        architecture=_R101,
        protocol=_WHOLE,
        file="emanet_r101-d8_512x1024_80k_cityscapes_20200901_100301-2d970745.pth",
        sha256="2d970745",
        url=f"{_URL}/emanet_r101-d8_512x1024_80k_cityscapes/"
        "emanet_r101-d8_512x1024_80k_cityscapes_20200901_100301-2d970745.pth",
        published=Published(miou=79.10, miou_ms_flip=81.21, memory_gb=6.2, fps=2.87),
    ),
    "emanet_r50-d8_769x769_80k_cityscapes": ZooEntry(
        architecture=_R50,
        protocol=_SLIDE,
        file="emanet_r50-d8_769x769_80k_cityscapes_20200901_100301-16f8de52.pth",
        sha256="16f8de52",
        url=f"{_URL}/emanet_r50-d8_769x769_80k_cityscapes/"
        "emanet_r50-d8_769x769_80k_cityscapes_20200901_100301-16f8de52.pth",
        published=Published(miou=79.33, miou_ms_flip=80.49, memory_gb=8.9, fps=1.97),
        crop=(769, 769),
    ),
    "emanet_r101-d8_769x769_80k_cityscapes": ZooEntry(
        architecture=_R101,
        protocol=_SLIDE,
        file="emanet_r101-d8_769x769_80k_cityscapes_20200901_100301-47a324ce.pth",
        sha256="47a324ce",
        url=f"{_URL}/emanet_r101-d8_769x769_80k_cityscapes/"
        "emanet_r101-d8_769x769_80k_cityscapes_20200901_100301-47a324ce.pth",
        published=Published(miou=79.62, miou_ms_flip=81.00, memory_gb=10.1, fps=1.22),
        crop=(769, 769),
    ),
    DEMO: ZooEntry(
        architecture=_TINY,
        protocol=Protocol(base_scale=(512, 256)),
        file="emanet_demo.pth",
        sha256="6bb262a4",
        url=None,
        published=None,
        crop=(192, 384),
    ),
}


def list_models() -> list[str]:
    """The names of all models: the published ones, then the demonstration."""
    return list(ZOO)


def create_model(
    name: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
) -> Network:
    """Build a model of the zoo, in evaluation mode, on the CPU and in float32.

    PyTorch's default device and default dtype have no effect on the model. A model made under
    ``torch.inference_mode`` still has ordinary tensors.

    Args:
        name: one of ``list_models()``. It may be left out if ``checkpoint`` is a file of the
            training (emanet-triton train), which says it.
        checkpoint: a checkpoint file to load. All weights must fit.
        pretrained: load the published checkpoint. It is downloaded once into torch's hub cache,
            and its hash is checked whenever it is opened.
        num_classes: channels of the logits, 1 to 255; by default the number of classes in a file
            of emanet-triton train, or else of the model's data set (19 for Cityscapes). If a
            number is given and a file has another one, the classifiers of the model (``conv_seg``
            of both heads) are not loaded, with a warning: they must be trained.

    Returns:
        The model: an ``EMANet``, unless its entry in the zoo names another class.
        ``model.protocol`` is the protocol of its published evaluation, or of the training.

    Raises:
        InputError: the name is unknown or missing, a file cannot be downloaded, is damaged or is
            not the published one, or the weights do not fit.
        ValueError: ``checkpoint`` and ``pretrained`` are both given, or ``num_classes`` is no int
            or is out of range.
    """
    description = None if checkpoint is None else description_in(Path(checkpoint))
    if name is None:
        if description is None:
            raise InputError(
                f"{checkpoint or 'create_model'}: expected the name of the model, one of: "
                f"{', '.join(ZOO)}; only a file of emanet-triton train needs none"
            )
        name = description.model
    entry = find_entry(name)
    if checkpoint is not None and pretrained:
        raise ValueError("give either checkpoint or pretrained=True, not both")
    classes = num_classes
    if classes is None:
        classes = len(description.classes if description else entry.dataset.classes)
    if type(classes) is not int or not 1 <= classes <= 255:
        raise ValueError(f"num_classes must be an int in 1 to 255, got {classes!r}")
    protocol = description.protocol if description and description.model == name else entry.protocol
    new_classes = num_classes is not None
    with torch.inference_mode(False):
        with torch.device("cpu"):
            model = entry.network(entry.architecture, protocol, classes).float()
        if pretrained:
            load_into(model, read_published(name), new_classes=new_classes)
        elif checkpoint is not None:
            load_into(model, read_checkpoint(checkpoint), new_classes=new_classes)
    return model.eval()


def find_entry(name: str) -> ZooEntry:
    """The entry of a name.

    Raises:
        InputError: the name is unknown. The message lists all names.
    """
    if name not in ZOO:
        raise InputError(f"unknown model '{name}'; expected one of: {', '.join(ZOO)}")
    return ZOO[name]


def published_path(name: str, folder: str | Path | None = None) -> Path:
    """The file of ``read_published``, also if it has not been downloaded yet.

    Raises:
        InputError: the name is unknown, or the model has no checkpoint in the zoo.
    """
    entry = find_entry(name)
    if entry.file is None:
        raise InputError(f"{name}: the zoo has no checkpoint of this model; expected a file")
    if entry.url is None:
        return _WEIGHTS / entry.file
    return hub_file(entry.file) if folder is None else Path(folder) / entry.file


def read_published(name: str, folder: str | Path | None = None) -> Checkpoint:
    """Read the published checkpoint of a model, with its hash checked.

    Args:
        name: one of ``list_models()``.
        folder: where its file lies; by default torch's hub cache, into which a missing file is
            downloaded. The demonstration's file is part of this package.

    Raises:
        InputError: the name is unknown, the model has no checkpoint in the zoo, or the file is
            missing, damaged or not the published one.
    """
    entry = find_entry(name)
    path = published_path(name, folder)
    if entry.url is not None and folder is None:
        assert entry.sha256 is not None  # as of every file that is published
        download(entry.url, path, entry.sha256)
    return read_checkpoint(path, entry.sha256)


def name_of(checkpoint: Checkpoint) -> str | None:
    """The model whose published file this is, by file name or by hash, or ``None``."""
    for name, entry in ZOO.items():
        has_hash = entry.sha256 is not None and checkpoint.sha256.startswith(entry.sha256)
        if has_hash or checkpoint.path.name == entry.file:
            return name
    return None
