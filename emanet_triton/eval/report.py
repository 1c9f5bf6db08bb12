"""The output of an evaluation: lines and tables for people, JSON for programs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor

from emanet_triton.cores import in_words
from emanet_triton.eval.metric import Scores, scores
from emanet_triton.eval.plan import Job, Plan, published_figure
from emanet_triton.eval.runner import Result
from emanet_triton.files import write_output
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import find_entry
from emanet_triton.versions import versions

TOLERANCE = 0.05  # points of mIoU within which a published figure counts as reproduced


@dataclass(frozen=True)
class Compared:
    """The results of the same network on the same images in another precision.

    Attributes:
        precision: the other precision.
        confusion: int64 [C, C] in the other precision, rows = label.
        agreement: int64 [C, C], rows = prediction in the first precision, columns = prediction
            in the other.
    """

    precision: str
    confusion: Tensor
    agreement: Tensor

    @property
    def labels_agree(self) -> float:
        """The percentage of pixels with equal predictions, among all pixels, scored or not."""
        return 100 * float(self.agreement.trace() / self.agreement.sum())


@dataclass(frozen=True)
class Report:
    """One evaluation: what was run, and its result.

    Attributes:
        model: its name in the zoo.
        checkpoint: path of the weights.
        sha256: of the checkpoint.
        dataset: the name of the data set.
        description: of the data set (``Dataset.description``), or ``None``.
        data: root of the data set.
        split: of the data set.
        classes: the names of the C classes.
        unscored: the class that is not scored (``Dataset.unscored``), or ``None``.
        images: the number of evaluated images.
        protocol: how images were resized and cut into windows.
        ms_flip: whether scales and mirroring were averaged.
        reconstruct: False for the ablation without the EM attention's reconstruction.
        precision: of the network.
        device: on which the network ran.
        network: "plain", "fused" or another ``Predictor.network_name``.
        calibration: paths of the images from which int8 took its ranges; empty without int8.
        seconds: from the first file to the last label of all images.
        confusion: int64 [C, C], rows = label.
        compared: the results in another precision, or ``None``.
        published: the published mIoU of this checkpoint and protocol in percent, or ``None``.
    """

    model: str
    checkpoint: str
    sha256: str
    dataset: str
    description: Mapping[str, Any] | None
    data: str
    split: str
    classes: tuple[str, ...]
    unscored: int | None
    images: int
    protocol: Protocol
    ms_flip: bool
    reconstruct: bool
    precision: str
    device: str
    network: str
    calibration: tuple[str, ...]
    seconds: float
    confusion: Tensor
    compared: Compared | None
    published: float | None

    def scores(self) -> Scores:
        """The scores of the network."""
        return scores(self.confusion, self.unscored)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values: unrounded percentages, null for NaN."""
        result = self.scores()
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
            "dataset": self.dataset,
            "description": self.description,
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "protocol": asdict(self.protocol),
            "ms_flip": self.ms_flip,
            "precision": self.precision,
            "device": self.device,
            "network": self.network,
            "calibration": list(self.calibration) or None,
            "versions": versions(),
            "seconds": self.seconds,
            "unscored": self.unscored,
            "mIoU": _number(result.miou),
            "mAcc": _number(result.macc),
            "aAcc": _number(result.aacc),
            "IoU": self._by_class(result.iou),
            "Acc": self._by_class(result.acc),
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

    def _by_class(self, percent: Iterable[float]) -> dict[str, float | None]:
        return {c: _number(v) for c, v in zip(self.classes, percent, strict=True)}

    def _compared_as_json(self) -> dict[str, Any] | None:
        if self.compared is None:
            return None
        other = scores(self.compared.confusion, self.unscored).miou
        return {
            "precision": self.compared.precision,
            "mIoU": _number(other),
            "difference": _number(self.scores().miou - other),
            "labels_agree": self.compared.labels_agree,
            "confusion": self.compared.confusion.tolist(),
            "agreement": self.compared.agreement.tolist(),
        }


def make_report(plan: Plan, job: Job, predictor: Predictor, result: Result) -> Report:
    """The report of a job whose images are all evaluated."""
    confusion, *others = result.counts
    compared = Compared(plan.compare, *others) if plan.compare else None
    return Report(
        model=job.name,
        checkpoint=str(job.checkpoint.path),
        sha256=job.checkpoint.sha256,
        dataset=plan.dataset.name,
        description=plan.dataset.description,
        data=str(plan.data),
        split=plan.split,
        classes=tuple(c.name for c in plan.dataset.classes),
        unscored=plan.dataset.unscored,
        images=len(plan.samples),
        protocol=job.protocol,
        ms_flip=job.ms_flip,
        reconstruct=job.reconstruct,
        precision=plan.precision,
        device=str(plan.device),
        network=predictor.network_name,
        calibration=tuple(map(str, plan.calibration.paths)) if plan.calibration else (),
        seconds=result.seconds,
        confusion=confusion,
        compared=compared,
        published=plan.published(job),
    )


def title(plan: Plan, job: Job) -> str:
    """Lines that say what is about to be evaluated."""
    protocol = job.protocol
    views = f"{len(protocol.ratios)} scales, plain and mirrored" if job.ms_flip else "one view"
    without = "" if job.reconstruct else ", without the EM attention's reconstruction"
    images = len(plan.samples)
    return (
        f"{job.name}{without}\n"
        f"  weights   {job.checkpoint.path} (sha256 {job.checkpoint.sha256[:8]})\n"
        f"  data      {plan.data}, split {plan.split}, {images} image{'s' * (images != 1)}\n"
        f"  protocol  {protocol.version}, {protocol.mode}, {views}{_published(plan, job)}"
    )


def _published(plan: Plan, job: Job) -> str:
    """A line on the published figure, if this evaluation does not compare with it."""
    figure, dataset = published_figure(job), find_entry(job.name).dataset
    if figure is None or plan.published(job) is not None or dataset.published_on is None:
        return ""
    split, images = dataset.published_on
    return (
        f"\n  published mIoU {figure:.2f}; not compared: it is for the published file, "
        f"its protocol and all {images} images of {dataset.name} {split}"
    )


def running(plan: Plan, predictor: Predictor) -> str:
    """A line that says how the network runs, with all that was chosen by default."""
    where = f"{plan.precision} on {plan.device}"
    if plan.device.type == "cpu":
        where += f", {in_words(plan.threads)}"
    elif predictor.cuda_graphs:
        where += ", CUDA graphs"
    most = predictor.inputs_at_once
    batch = "one input at once" if most == 1 else f"up to {most} inputs at once"
    compared = f"; compared with {plan.compare}" if plan.compare else ""
    ranges = f"\n  int8      {plan.calibration}" if plan.calibration else ""
    return f"  running   {predictor.network_name} network, {where}, {batch}{compared}{ranges}"


def speed(result: Result, images: int) -> str:
    """A line that says how long the evaluation took."""
    rate = images / result.seconds if result.seconds else 0.0
    share = 100 * result.waiting / result.seconds if result.seconds else 0.0
    return (
        f"  took      {result.seconds:.1f} s, {rate:.2f} images a second; "
        f"{share:.0f}% of it waiting for files"
    )


def class_table(classes: Sequence[str], result: Scores) -> str:
    """IoU and accuracy of every class, in percent."""
    rows = [
        (name, _shown(iou), _shown(acc))
        for name, iou, acc in zip(classes, result.iou, result.acc, strict=True)
    ]
    return tabulate(
        rows,
        ("class", "IoU", "Acc"),
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )


def summary_table(reports: list[Report]) -> str:
    """One row for each report: what was run, its scores, and the published figure if any."""
    headers = ["model", "views", "images", "aAcc", "mAcc", "mIoU"]
    rows = [[*_name_and_views(r), r.images, *_measured(r)] for r in reports]
    if any(report.published is not None for report in reports):
        headers += ["published", "difference", f"within {TOLERANCE}"]
        rows = [[*row, *_comparison(report)] for row, report in zip(rows, reports, strict=True)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def comparison_table(reports: list[Report]) -> str:
    """One row for each report that was compared with another precision."""
    headers = ("model", "views", "precision", "mIoU", "compared with", "mIoU", "difference")
    rows = []
    for report in reports:
        if (other := report.compared) is not None:
            own, others = report.scores().miou, scores(other.confusion, report.unscored).miou
            figures = f"{own:.4f}", other.precision, f"{others:.4f}", f"{own - others:+.4f}"
            agree = f"{other.labels_agree:.4f}%"
            rows.append((*_name_and_views(report), report.precision, *figures, agree))
    return tabulate(rows, (*headers, "labels agree"), tablefmt="github", disable_numparse=True)


def write_json(path: Path, reports: list[Report], as_list: bool) -> None:
    """Write one report, or a list of reports; the file appears whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    content = [report.as_json() for report in reports]
    text = json.dumps(content if as_list else content[0], indent=1) + "\n"
    write_output(path, text.encode())


def _name_and_views(report: Report) -> tuple[str, str]:
    name = report.model if report.reconstruct else f"{report.model} (no reconstruction)"
    views = report.protocol.mode + (" ms+flip" if report.ms_flip else "")
    return name, f"{views} (1.x)" if report.protocol.version == "mmseg-1.x" else views


def _measured(report: Report) -> tuple[str, str, str]:
    result = report.scores()
    return _shown(result.aacc), _shown(result.macc), _shown(result.miou)


def _comparison(report: Report) -> tuple[str, str, str]:
    if report.published is None:
        return "-", "-", "-"
    difference = report.scores().miou - report.published
    verdict = "yes" if abs(difference) <= TOLERANCE else "NO"
    return f"{report.published:.2f}", f"{difference:+.2f}", verdict


def _shown(percent: float) -> str:
    return "-" if math.isnan(percent) else f"{percent:.2f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
