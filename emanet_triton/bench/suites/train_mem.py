"""Peak memory and time of one training step, as the published table's column Mem counts it."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import (
    NETWORKS,
    make_network,
    make_protocol,
    published_figures,
)
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import mmseg_attention
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suite import Suite
from emanet_triton.bench.tables import NOT_MEASURED, on_gpu, table
from emanet_triton.data.dataset import IGNORE
from emanet_triton.inference.views import Size
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.entries import DEMO
from emanet_triton.models.head import EMAttention
from emanet_triton.models.zoo import ZOO, create_model
from emanet_triton.train.loss import losses
from emanet_triton.train.recipe import Recipe

CROPS: dict[str, Size] = {
    entry.protocol.mode: entry.crop for entry in ZOO.values() if entry.source == "mmseg"
}
BOUND = 1e-3  # a reconstruction set to zero, or two EM iterations instead of three, makes 2e-3

Step = tuple[float, Tensor]  # the loss, and the norm of every parameter's gradient, on the CPU


def case_name(network: str, crop: Size, batch: int) -> str:
    """The name of the case for crops of (height, width)."""
    return f"{network} {crop[0]}x{crop[1]} B={batch} fp32"


def cases(selection: Selection) -> Iterator[Case]:
    """A training step of each network at each crop; on a CPU one small image.

    The short selection has no case on a CPU.
    """
    crops, batches, networks = _defaults(selection)
    if (selection.quick and not selection.cuda) or "fp32" not in (selection.dtypes or ["fp32"]):
        return
    if not selection.tiny:
        networks = selection.networks or networks
    for network, crop, batch in itertools.product(
        networks, selection.sizes or crops, selection.batches or batches
    ):
        yield _case(selection, network, crop, batch)


def _defaults(selection: Selection) -> tuple[Sequence[Size], Sequence[int], Sequence[str]]:
    if selection.tiny:
        return [(24, 40)], [2], [DEMO]
    if selection.cuda:
        return list(CROPS.values()), [2], ["r50"] if selection.quick else NETWORKS
    return [(256, 512)], [1], ["r50"]


def _case(selection: Selection, network: str, crop: Size, batch: int) -> Case:
    found: list[Step] = []  # mmseg's step, which is the first
    make = functools.partial(_make_step, selection, network, crop, batch)
    providers = {"mmseg": functools.partial(make, mmseg=True), "ours": make}
    return Case(
        suite=SUITE.name,
        name=case_name(network, crop, batch),
        providers=selection.pick(providers, "mmseg"),
        baseline="mmseg",
        error=functools.partial(_error, found),
        bound=BOUND,
        peak=True,
    )


class MmsegAttention(EMAttention):
    """The same layer, computed by mmseg's operations."""

    @torch.no_grad()
    def forward(self, feats: Tensor) -> Tensor:
        recon, bases = mmseg_attention(feats, self.bases, self.num_stages)
        if self.training:
            self._update_bases(bases)
        return recon


def _make_step(
    selection: Selection, network: str, crop: Size, batch: int, mmseg: bool = False
) -> Call:
    """A training step. The optimizer's buffers exist before the first step, as in later ones."""
    mode = "slide" if crop == CROPS["slide"] else "whole"
    if network == DEMO:
        model = create_model(DEMO, pretrained=True)
        assert isinstance(model, EMANet)
    else:
        model = make_network(network, make_protocol(mode, crop))
    if mmseg:
        ours = model.decode_head.ema_module
        _, channels, bases = ours.bases.shape
        model.decode_head.ema_module = MmsegAttention(channels, bases, ours.num_stages)
        model.decode_head.ema_module.load_state_dict(ours.state_dict())
    model = model.to(selection.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, Recipe.lr, Recipe.momentum, weight_decay=Recipe.weight_decay
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *crop, generator=generator).to(selection.device)
    labels = torch.randint(model.num_classes, (batch, *crop), generator=generator)
    labels[:, : crop[0] // 8] = IGNORE
    return functools.partial(training_step, model, optimizer, images, labels.to(selection.device))


def training_step(
    model: EMANet, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Step:
    """One step in mmseg's order: the last step's gradients stay until the forward pass is done.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        images: normalised, [B, 3, H, W].
        labels: int64 [B, H, W]. A pixel of label 255 adds nothing to the loss, but the mean counts
            it.
    """
    cuda = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)  # the same dropout at every step
        logits, auxiliary = model(images)
    loss = losses(
        logits,
        auxiliary,
        labels,
        align_corners=model.protocol.align_corners,
        auxiliary_weight=Recipe.auxiliary_weight,
    ).total
    optimizer.zero_grad()
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return loss.item(), torch.stack(norms).cpu()


def _error(found: list[Step], got: Step) -> float:
    """The relative error of the loss and of the gradient norms, against mmseg's operations."""
    if not found:
        found.append(got)
    (loss, norms), (want_loss, want_norms) = got, found[0]
    if not math.isfinite(loss):
        return math.nan
    gradients = (norms - want_norms).norm() / want_norms.norm()
    return max(abs(loss - want_loss) / abs(want_loss), gradients.item())


def beside_published(rows: Sequence[Row]) -> str:
    """Peak memory on GPUs beside the published figures."""
    own = [row for row in rows if row.provider == "ours" and on_gpu(row)]
    devices = list(dict.fromkeys(row.device for row in own))
    lines = []
    for network, mode, published in published_figures():
        height, width = CROPS[mode]
        name = case_name(network, (height, width), 2)
        peaks = {row.device: row.peak_mb for row in own if row.case == name and row.peak_mb}
        cells = [f"{peaks[d] / 1e3:.1f}" if d in peaks else NOT_MEASURED for d in devices]
        cells = cells or [NOT_MEASURED]
        lines.append([network, f"{height}x{width}", f"{published.memory_gb}", *cells])
    ours = [f"ours, GB ({device})" for device in devices] or ["ours, GB (GPU)"]
    return table(lines, ["network", "2 images of", "published, GB (V100)", *ours], texts=2)


SUITE = Suite(
    name="train-mem",
    title="Memory of a training step",
    measures="one training step, and above all its memory",
    cases=cases,
    text="""\
A step takes the cross entropy, the auxiliary head's with weight 0.4, and SGD with momentum. `mmseg`
computes the EM attention by mmsegmentation's operations.""",
    published=beside_published,
    chart=False,
)
