"""What an evaluation tells: tables for people, JSON for programs."""

import json
import math
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from emanet_triton._version import __version__
from emanet_triton.data.cityscapes import CLASSES
from emanet_triton.eval.metric import scores
from emanet_triton.files import write_output
from emanet_triton.models.protocol import Protocol

TOLERANCE = 0.05  # percent points of mIoU within which a published figure counts as reproduced


@dataclass(frozen=True)
class Compared:
    """The same images through the same network in another precision.

    Attributes:
        precision: the other.
        confusion: int64 [19, 19] of the other, rows = label.
        agreement: int64 [19, 19], rows = the label of the first, columns = that of the other.
    """

    precision: str
    confusion: Tensor
    agreement: Tensor

    @property
    def labels_agree(self) -> float:
        """Percent of all pixels, scored or not."""
        return 100 * float(self.agreement.trace() / self.agreement.sum())


@dataclass(frozen=True)
class Report:
    """One evaluation: what was run, and what came out.

    Attributes:
        model: its name in the zoo.
        checkpoint: path of the weights.
        sha256: of that file.
        data: root of the data set.
        split: of the data set.
        images: how many were evaluated.
        protocol: resizes and windows.
        ms_flip: whether scales and mirroring were averaged.
        reconstruct: False for the ablation without the EM attention's reconstruction.
        precision: of the network.
        device: it ran on.
        network: "fused" or "plain".
        seconds: all images, from the first file to the last label.
        confusion: int64 [19, 19], rows = label.
        compared: with another precision, or ``None``.
        published: the published mIoU in percent of this checkpoint and protocol, or ``None``.
    """

    model: str
    checkpoint: str
    sha256: str
    data: str
    split: str
    images: int
    protocol: Protocol
    ms_flip: bool
    reconstruct: bool
    precision: str
    device: str
    network: str
    seconds: float
    confusion: Tensor
    compared: Compared | None
    published: float | None

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values; percent, unrounded; NaN becomes null."""
        result = scores(self.confusion)
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "protocol": asdict(self.protocol),
            "ms_flip": self.ms_flip,
            "precision": self.precision,
            "device": self.device,
            "network": self.network,
            "versions": versions(),
            "seconds": self.seconds,
            "mIoU": _number(result.miou),
            "mAcc": _number(result.macc),
            "aAcc": _number(result.aacc),
            "IoU": {c.name: _number(v) for c, v in zip(CLASSES, result.iou, strict=True)},
            "confusion": self.confusion.tolist(),
            "compared": self._compared_as_json(),
            "published": None
            if self.published is None
            else {
                "mIoU": self.published,
                "difference": _number(result.miou - self.published),
                "within_tolerance": bool(abs(result.miou - self.published) <= TOLERANCE),
            },
        }

    def _compared_as_json(self) -> dict[str, Any] | None:
        if self.compared is None:
            return None
        other = scores(self.compared.confusion).miou
        return {
            "precision": self.compared.precision,
            "mIoU": _number(other),
            "difference": _number(scores(self.confusion).miou - other),
            "labels_agree": self.compared.labels_agree,
            "confusion": self.compared.confusion.tolist(),
            "agreement": self.compared.agreement.tolist(),
        }


def versions() -> dict[str, str]:
    """The versions on which figures depend."""
    return {
        "emanet_triton": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),  # not imported: see draw
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def class_table(report: Report) -> str:
    """IoU and accuracy of every class, in percent."""
    result = scores(report.confusion)
    rows = [
        (c.name, _shown(iou), _shown(acc))
        for c, iou, acc in zip(CLASSES, result.iou, result.acc, strict=True)
    ]
    return tabulate(
        rows,
        ("class", "IoU", "Acc"),
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )


def summary_table(reports: list[Report]) -> str:
    """One row a report: what was run and measured; beside it, where there is one, the published."""
    headers = ["model", "views", "images", "aAcc", "mAcc", "mIoU"]
    rows = [[*_name_and_views(r), r.images, *_measured(r)] for r in reports]
    if any(report.published is not None for report in reports):
        headers += ["published", "difference", f"within {TOLERANCE}"]
        rows = [[*row, *_comparison(report)] for row, report in zip(rows, reports, strict=True)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def comparison_table(reports: list[Report]) -> str:
    """One row a report that was compared with another precision."""
    headers = ("model", "views", "precision", "mIoU", "compared with", "mIoU", "difference")
    rows = []
    for report in reports:
        if (other := report.compared) is not None:
            own, others = (scores(c).miou for c in (report.confusion, other.confusion))
            figures = f"{own:.4f}", other.precision, f"{others:.4f}", f"{own - others:+.4f}"
            agree = f"{other.labels_agree:.4f}%"
            rows.append((*_name_and_views(report), report.precision, *figures, agree))
    return tabulate(rows, (*headers, "labels agree"), tablefmt="github", disable_numparse=True)


def write_json(path: Path, reports: list[Report], as_list: bool) -> None:
    """Write one report, or a list of them, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    content = [report.as_json() for report in reports]
    text = json.dumps(content if as_list else content[0], indent=1) + "\n"
    write_output(path, text.encode())


def _name_and_views(report: Report) -> tuple[str, str]:
    name = report.model if report.reconstruct else f"{report.model} (no reconstruction)"
    views = report.protocol.mode + (" ms+flip" if report.ms_flip else "")
    return name, views if report.protocol.version == "mmseg-0.x" else f"{views} (1.x)"


def _measured(report: Report) -> tuple[str, str, str]:
    result = scores(report.confusion)
    return _shown(result.aacc), _shown(result.macc), _shown(result.miou)


def _comparison(report: Report) -> tuple[str, str, str]:
    if report.published is None:
        return "-", "-", "-"
    difference = scores(report.confusion).miou - report.published
    verdict = "yes" if abs(difference) <= TOLERANCE else "NO"
    return f"{report.published:.2f}", f"{difference:+.2f}", verdict


def _shown(percent: float) -> str:
    return "-" if math.isnan(percent) else f"{percent:.2f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
