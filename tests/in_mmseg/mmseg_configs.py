"""The published configurations: mmsegmentation's loader, its pipelines and its test script."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch
import versions_of_mmseg as mm
from versions_of_mmseg import PUBLISHED, SHIPPED, VERSION_1, build, config_of, reference_of

from emanet_triton.data.png import write_png
from emanet_triton.mmseg import FusedEMANet

RATIOS = [0.5, 1.0, 1.25]
ROOT = Path(__file__).parents[2]


def colours(seed=0):
    """A picture with areas of many colours, uint8 RGB [60, 120, 3]."""
    few = np.random.default_rng(seed).integers(0, 256, (5, 10, 3), np.uint8)
    return cv2.resize(few, (120, 60), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "colours.png"
    write_png(path, colours())
    return path


@pytest.fixture(scope="module", params=PUBLISHED)
def loaded(request, tmp_path_factory):
    """mmsegmentation's segmentor and ours, loaded from one checkpoint file by mmsegmentation."""
    config = config_of(request.param)
    size = (129, 65) if "769" in request.param else (128, 64)
    if VERSION_1:
        next(step for step in config.test_pipeline if step.type == "Resize").scale = size
    else:
        config.data.test.pipeline[1].img_scale = size
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    write_checkpoint(path, config)
    config.model.type = "FusedEMANet"
    return mm.load(reference_of(config), path), mm.load(config, path)


def write_checkpoint(path, config):
    model = mm.enliven(build(reference_of(config)))
    meta = {"CLASSES": ("class",) * 19, "PALETTE": [[0, 0, 0]] * 19}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)


def test_labels_of_a_picture(loaded, picture):
    reference, fused = loaded
    want, probabilities = mm.recorded(reference, lambda: mm.segment(reference, picture))
    assert want.shape == (60, 120)
    mm.assert_labels(mm.segment(fused, picture)[None], want[None], probabilities)
    if VERSION_1:
        fused.labels_only = True
        mm.assert_labels(mm.segment(fused, picture)[None], want[None], probabilities)
        fused.labels_only = False


def test_labels_of_several_scales_and_mirrors(loaded, picture):
    reference, fused = loaded
    want, probabilities = mm.recorded(reference, lambda: ms_flip(reference, picture))
    mm.assert_labels(ms_flip(fused, picture)[None], want[None], probabilities)
    if VERSION_1:
        got = ms_flip(fused, picture, "FusedTTAModel")
        mm.assert_labels(got[None], want[None], probabilities)
        mm.assert_labels(  # a segmentor without a fused network
            ms_flip(reference, picture, "FusedTTAModel")[None], want[None], probabilities
        )


@torch.no_grad()
def ms_flip(model, picture, kind="SegTTAModel"):
    """Labels by six views; in 1.x by a model of this kind."""
    config = model.cfg
    if not VERSION_1:
        model.cfg = copy.deepcopy(config)
        model.cfg.data.test.pipeline[1].update(img_ratios=RATIOS, flip=True)
        try:
            return mm.segment(model, picture)
        finally:
            model.cfg = config
    from mmengine.dataset import Compose, pseudo_collate

    pipeline = copy.deepcopy(config.tta_pipeline)
    resizes, flips, _, pack = pipeline[1].transforms
    resizes = [step for step in resizes if step.scale_factor in RATIOS]
    pipeline[1].transforms = [resizes, flips, pack]
    data = pseudo_collate([Compose(pipeline)({"img_path": str(picture)})])
    tta = mm.MODELS.build({"type": kind, "module": model})
    (sample,) = tta.test_step(data)
    small = kind == "FusedTTAModel" and isinstance(model, FusedEMANet)
    assert ("seg_logits" in sample) != small
    return sample.pred_sem_seg.data[0].numpy()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A Cityscapes of two images, a checkpoint, and two configuration files.

    Only one of the two has the line ``custom_imports``.
    """
    work = tmp_path_factory.mktemp("work")
    for index in range(2):
        for kind, array in (
            ("leftImg8bit", colours(index)),
            ("gtFine", np.full((60, 120), index, np.uint8)),
        ):
            folder = work / "cityscapes" / kind / "val" / "town"
            folder.mkdir(parents=True, exist_ok=True)
            suffix = "gtFine_labelTrainIds" if kind == "gtFine" else kind
            write_png(folder / f"town_000000_00000{index}_{suffix}.png", array)
    config = config_of()
    write_checkpoint(work / "checkpoint.pth", config)
    root = str(work / "cityscapes")
    if VERSION_1:
        config.test_dataloader.dataset.data_root = root
        config.test_dataloader.update(num_workers=0, persistent_workers=False)
        for part in config.test_dataloader.dataset.pipeline:
            if part.type == "Resize":
                part.scale = (128, 64)
    else:
        config.data.test.data_root = root
        config.data.update(workers_per_gpu=0, persistent_workers=False)
        config.data.test.pipeline[1].img_scale = (128, 64)
    config.dump(str(work / "plain.py"))
    text = (work / "plain.py").read_text()
    (work / "ours.py").write_text(f"{mm.IMPORTS}\n{text}")
    return work


def predictions(work, config, *options):
    """The labels that mmsegmentation's test script writes, [2, 60, 120]."""
    out = work / "-".join([config, *options]).replace("=", "-")
    script = [sys.executable, "-W", "ignore", SHIPPED / "tools" / "test.py"]
    output = out if VERSION_1 else out.with_suffix(".pkl")
    command = [*script, f"{config}.py", "checkpoint.pth", "--out", output, "--work-dir", out]
    done = subprocess.run(
        [*command, *options],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if not VERSION_1:
        return np.stack(mmcv.load(output))
    return np.stack([cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted(out.glob("*.png"))])


ONE = (["model.type=FusedEMANet"], ["model.type=FusedEMANet", "model.labels_only=True"])
TTA = (["model.type=FusedEMANet"], ["model.type=FusedEMANet", "tta_model.type=FusedTTAModel"])


@pytest.mark.parametrize(
    ("views", "options"),
    [([], ONE), (["--tta"], TTA)] if VERSION_1 else [([], ONE[:1]), (["--aug-test"], ONE[:1])],
    ids=["single", "ms-flip"],
)
def test_the_test_script(work, views, options):
    want = predictions(work, "plain", *views)
    assert want.shape == (2, 60, 120) and len(np.unique(want)) > 2
    for fields in ([], *options):
        got = predictions(work, "ours", *views, *(["--cfg-options", *fields] if fields else []))
        assert (got == want).mean() > 0.999
