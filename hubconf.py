"""The models for ``torch.hub``; ``docs/libraries.md`` shows their use."""

from emanet_triton import create_model as _create_model

# torch.hub checks that these can be imported: what a model and ``segment`` need.
dependencies = ["torch", "numpy", "cv2", "PIL", "filelock", "tqdm"]


def emanet(name=None, pretrained=False, checkpoint=None, num_classes=None):
    """Any model of ``emanet_triton.list_models()``, in evaluation mode.

    Args:
        name: of the model; a checkpoint of emanet-triton train needs none.
        pretrained: load the published checkpoint, which is downloaded once.
        checkpoint: a checkpoint file to load instead.
        num_classes: channels of the logits, 1 to 255; by default those of the checkpoint or of the
            model's data set.
    """
    return _create_model(name, checkpoint, pretrained, num_classes)


def _entry(name):
    """The entry point of one model."""

    def entry(pretrained=False, checkpoint=None, num_classes=None):
        return emanet(name, pretrained, checkpoint, num_classes)

    entry.__doc__ = f"The model {name}, in evaluation mode; the arguments are those of emanet."
    return entry


emanet_r50_512x1024 = _entry("emanet_r50-d8_512x1024_80k_cityscapes")
emanet_r101_512x1024 = _entry("emanet_r101-d8_512x1024_80k_cityscapes")
emanet_r50_769x769 = _entry("emanet_r50-d8_769x769_80k_cityscapes")
emanet_r101_769x769 = _entry("emanet_r101-d8_769x769_80k_cityscapes")
emanet_demo = _entry("emanet_demo")
