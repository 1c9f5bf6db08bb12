"""The validation of a network that is being trained, by the evaluation's own arithmetic."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from emanet_triton.data.dataset import Dataset, Sample
from emanet_triton.errors import InputError
from emanet_triton.eval.metric import as_matrix
from emanet_triton.inference.inputs import to_device
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite
from emanet_triton.kernels.resample.op import confusion_counts
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.progress import Bar
from emanet_triton.train.group import Group
from emanet_triton.workers import Workers


def validate(
    network: Network,
    protocol: Protocol,
    precision: str,
    samples: list[Sample],
    dataset: Dataset,
    group: Group,
    workers: int,
    each: Callable[[Sample, np.ndarray, np.ndarray, Tensor], None],
) -> Tensor:
    """The confusion matrix of all samples; the processes share them.

    The network runs in evaluation mode, and is in the mode of before afterwards.

    Args:
        network: on its device.
        protocol: how images become inputs.
        precision: of the network, as ``Predictor`` takes it.
        samples: the samples of all processes.
        dataset: reads them.
        group: the processes.
        workers: threads of this process that read files.
        each: called with every sample of this process, its image, labels and, on the
            device, predicted labels.

    Returns:
        int64 [C, C] on the CPU, rows = label; the same on every process.

    Raises:
        InputError: a file cannot be read, or logits are not finite.
    """
    classes = len(dataset.classes)
    mode = network.training
    predictor = Predictor(network.eval(), protocol, precision=precision)
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=predictor.device)
    mine = samples[group.rank :: group.count]
    try:
        bar = Bar(desc="validation", total=len(mine), leave=False, disable=not group.first)
        with Workers(workers) as pool, bar:
            loaded = pool.map(dataset.read, mine, ahead=max(workers, 1))
            for sample, (image, labels) in zip(mine, loaded, strict=True):
                (predicted,) = predictor([image])
                if not are_finite(predicted):
                    raise InputError(
                        f"{NOT_FINITE_MESSAGE} for {sample.image}: the training has diverged; "
                        "expected a lower --lr or a longer --warmup"
                    )
                target = to_device(torch.from_numpy(labels), predicted.device)
                counts += confusion_counts(target, predicted, classes).to(counts.device)
                each(sample, image, labels, predicted)
                bar.update()
    finally:
        network.train(mode)
    return as_matrix(group.sum(counts).cpu())
