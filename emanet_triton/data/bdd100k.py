"""BDD100K: semantic segmentation (10,000 images) and drivable areas (100,000 images).

Source: the folders, classes and colours are those of the project's own tools (``bdd100k.label``)
and models (SysCV/bdd100k-models).
"""

from emanet_triton.data import cityscapes
from emanet_triton.data.dataset import Class, Dataset
from emanet_triton.data.labelled import Ids, labelled_pictures
from emanet_triton.data.layout import Layout


def _dataset(
    name: str,
    classes: tuple[Class, ...],
    images: str,
    task: str,
    published_on: tuple[str, int],
    unscored: int | None = None,
) -> Dataset:
    """``images``: the folder of images; ``task``: the folder of the task's labels."""
    layout = Layout(
        f"images/{images}/{{split}}/{{name}}.jpg", f"labels/{task}/masks/{{split}}/{{name}}.png", {}
    )
    return labelled_pictures(
        name,
        classes,
        layout.places(),
        layout.find_files,
        Ids.counted(len(classes)),
        published_on=published_on,
        unscored=unscored,
    )


BDD100K = _dataset(
    "BDD100K",
    tuple(Class(each.name, each.color) for each in cityscapes.CLASSES),
    images="10k",
    task="sem_seg",
    published_on=("val", 1000),
)
BDD100K_DRIVABLE = _dataset(
    "BDD100K drivable",
    (
        Class("direct", (219, 94, 86)),  # the lane of the driver
        Class("alternative", (86, 211, 219)),  # lanes that the driver could change to
        Class("background", (0, 0, 0)),
    ),
    images="100k",
    task="drivable",
    published_on=("val", 10_000),
    unscored=2,  # the background: bdd100k.eval counts only pixels with another label
)
