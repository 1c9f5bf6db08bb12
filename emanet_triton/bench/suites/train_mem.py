"""Peak memory and time of one training step, as the published table's column Mem counts it."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import mmseg_attention
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.head import EMAttention
from emanet_triton.models.zoo import DEMO, create_model

CROPS: dict[str, Size] = {"whole": (512, 1024), "slide": (769, 769)}  # of the published models
IGNORED = 255
AUXILIARY = 0.4  # weight of the auxiliary head's loss
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
BOUND = 1e-3  # a reconstruction set to zero, or two EM iterations in place of three, makes 2e-3

Step = tuple[float, Tensor]  # the loss, and the norm of every parameter's gradient, on the CPU


def case_name(network: str, crop: Size, batch: int) -> str:
    """Of a crop (height, width)."""
    return f"{network} {crop[0]}x{crop[1]} B={batch} fp32"


def cases(selection: Selection) -> Iterator[Case]:
    """A training step of each network at each crop; on a CPU by default one small image.

    The short selection has none on a CPU.
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
        return list(CROPS.values()), [2], ["r50"] if selection.quick else ["r50", "r101"]
    return [(256, 512)], [1], ["r50"]


def _case(selection: Selection, network: str, crop: Size, batch: int) -> Case:
    found: list[Step] = []  # mmseg's, which comes first
    make = functools.partial(_make_step, selection, network, crop, batch)
    providers = {"mmseg": functools.partial(make, mmseg=True), "ours": make}
    return Case(
        suite="train-mem",
        name=case_name(network, crop, batch),
        providers=selection.pick(providers, "mmseg"),
        baseline="mmseg",
        error=functools.partial(_error, found),
        bound=BOUND,
        peak=True,
    )


class MmsegAttention(EMAttention):
    """The same layer by mmseg's operations."""

    @torch.no_grad()
    def forward(self, feats: Tensor) -> Tensor:
        recon, bases = mmseg_attention(feats, self.bases, self.num_stages)
        if self.training:
            self._update_bases(bases)
        return recon


def _make_step(
    selection: Selection, network: str, crop: Size, batch: int, mmseg: bool = False
) -> Call:
    """A training step; the optimiser's buffers exist before the first, as they do after it."""
    mode = "slide" if crop == CROPS["slide"] else "whole"
    if network == DEMO:
        model = create_model(DEMO, pretrained=True)
    else:
        model = make_network(network, make_protocol(mode, crop))
    if mmseg:
        ours = model.decode_head.ema_module
        _, channels, bases = ours.bases.shape
        model.decode_head.ema_module = MmsegAttention(channels, bases, ours.num_stages)
        model.decode_head.ema_module.load_state_dict(ours.state_dict())
    model = model.to(selection.device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *crop, generator=generator).to(selection.device)
    labels = torch.randint(model.num_classes, (batch, *crop), generator=generator)
    labels[:, : crop[0] // 8] = IGNORED
    return functools.partial(training_step, model, optimizer, images, labels.to(selection.device))


def training_step(
    model: EMANet, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Step:
    """One step in mmseg's order: the gradients of the last step live until the forward is done.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        images: normalised, [B, 3, H, W].
        labels: int64 [B, H, W]; 255 is left out of the sum, but counted in the mean.
    """
    cuda = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)  # the same dropout at every step
        logits, auxiliary = model(images)
    loss = _loss(model, logits, labels) + AUXILIARY * _loss(model, auxiliary, labels)
    optimizer.zero_grad()
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return loss.item(), torch.stack(norms).cpu()


def _loss(model: EMANet, logits: Tensor, labels: Tensor) -> Tensor:
    align = model.protocol.align_corners
    resized = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align)
    return F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="none").mean()


def _error(found: list[Step], got: Step) -> float:
    """Of loss and gradient norms, relative to those of mmseg's operations in the same dtype."""
    found or found.append(got)
    (loss, norms), (want_loss, want_norms) = got, found[0]
    if not math.isfinite(loss):
        return math.nan
    gradients = (norms - want_norms).norm() / want_norms.norm()
    return max(abs(loss - want_loss) / abs(want_loss), gradients.item())
