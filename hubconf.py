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
emanet_r50_769x769_40k_sem_seg_bdd100k = _entry("emanet_r50-d8_769x769_40k_sem_seg_bdd100k")
emanet_r50_769x769_80k_sem_seg_bdd100k = _entry("emanet_r50-d8_769x769_80k_sem_seg_bdd100k")
emanet_r50_512x1024_40k_drivable_bdd100k = _entry("emanet_r50-d8_512x1024_40k_drivable_bdd100k")
emanet_r50_769x769_40k_drivable_bdd100k = _entry("emanet_r50-d8_769x769_40k_drivable_bdd100k")
emanet_r50_769x769_80k_drivable_bdd100k = _entry("emanet_r50-d8_769x769_80k_drivable_bdd100k")
emanet_resnet50os8_voc = _entry("emanet_resnet50os8_voc")
emanet_resnet50os16_voc = _entry("emanet_resnet50os16_voc")
emanet_resnet101os8_voc = _entry("emanet_resnet101os8_voc")
emanet_resnet101os16_voc = _entry("emanet_resnet101os16_voc")
emanet_resnet50os8_ade20k = _entry("emanet_resnet50os8_ade20k")
emanet_resnet50os16_ade20k = _entry("emanet_resnet50os16_ade20k")
emanet_resnet101os8_ade20k = _entry("emanet_resnet101os8_ade20k")
emanet_resnet101os16_ade20k = _entry("emanet_resnet101os16_ade20k")
emanet_resnet50os8_cityscapes = _entry("emanet_resnet50os8_cityscapes")
emanet_resnet50os16_cityscapes = _entry("emanet_resnet50os16_cityscapes")
emanet_resnet101os8_cityscapes = _entry("emanet_resnet101os8_cityscapes")
emanet_resnet101os16_cityscapes = _entry("emanet_resnet101os16_cityscapes")
emanet_r101_voc_official = _entry("emanet_r101_voc_official")
emanet_resnet50_os8_cityscapes_1024x512_80k = _entry("emanet_resnet50_os8_cityscapes_1024x512_80k")
emanet_resnet101_os8_cityscapes_1024x512_80k = _entry(
    "emanet_resnet101_os8_cityscapes_1024x512_80k"
)
emanet_resnet50_os8_voc12aug_512x512_40k = _entry("emanet_resnet50_os8_voc12aug_512x512_40k")
emanet_resnet101_os8_voc12aug_512x512_40k = _entry("emanet_resnet101_os8_voc12aug_512x512_40k")
emanet_demo = _entry("emanet_demo")
