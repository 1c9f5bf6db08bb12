"""The memory of a training step by arithmetic: nothing is allocated, so no GPU is needed.

    python -m emanet_triton.bench.training_memory --csv benchmarks/results/train/memory.csv

Counted are the weights, their gradients, SGD's momentum, and the tensors that autograd keeps from
the forward to the backward pass, for 2 images of the published crop. What operations need for a
moment is left out. ``mmseg`` is the same network with mmsegmentation's operations in the EM
attention.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode

from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.bench.suites.train_mem import MmsegAttention
from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.resnet import Bottleneck
from emanet_triton.models.zoo import ZOO, create_model, list_models
from emanet_triton.train.loss import losses
from emanet_triton.train.memory import SavedTensors, step_memory
from emanet_triton.train.recipe import Recipe

IMAGES = 2
WAYS = {  # the provider's operations, precision, checkpointing
    "mmseg": (True, "fp32", False),
    "ours": (False, "fp32", False),
    "ours, --checkpointing": (False, "fp32", True),
    "ours, bf16": (False, "bf16", False),
    "ours, bf16 --checkpointing": (False, "bf16", True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        prog=program("bench.training_memory"), description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tiny", action="store_true", help="count for the first network only")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the figures to a file")
    args = parser.parse_args(arguments)
    if args.csv:
        require_table(args.csv)
    names = list_models(source="mmseg")
    rows = [
        _row(name, way, *settings)
        for name in (names[:1] if args.tiny else names)
        for way, settings in WAYS.items()
    ]
    say(tabulate(rows, headers="keys", tablefmt="github"))
    if args.csv:
        write_table(args.csv, rows)
    return 0


def _row(name: str, way: str, mmseg: bool, precision: str, checkpointing: bool) -> dict:
    entry = ZOO[name]
    network = create_model(name).train()
    assert isinstance(network, EMANet) and entry.published is not None
    if mmseg:
        own = network.decode_head.ema_module
        _, channels, bases = own.bases.shape
        network.decode_head.ema_module = MmsegAttention(channels, bases, own.num_stages).train()
    for module in network.modules():
        if isinstance(module, Bottleneck):
            module.checkpointing = checkpointing
    saved = saved_bytes(network, entry.crop, precision)
    momentum = [p for p in network.parameters() if p.requires_grad]  # SGD keeps one of each
    found = step_memory(network, momentum, saved, averaged=False)
    figures = {
        "weights": found.weights,
        "gradients": found.gradients,
        "momentum": found.optimizer,
        "kept for the backward pass": found.saved,
        "together": found.total,
    }
    return {
        "network": name,
        "way": way,
        **{f"{key}, GB": round(value / 1e9, 3) for key, value in figures.items()},
        "published, GB": entry.published.memory_gb,
    }


def saved_bytes(network: EMANet, crop: tuple[int, int], precision: str = "fp32") -> int:
    """The bytes that autograd keeps for ``IMAGES`` crops of (height, width)."""
    with FakeTensorMode(allow_non_fake_inputs=True), SavedTensors(network) as saved:
        images = torch.empty(IMAGES, 3, *crop)
        labels = torch.zeros(IMAGES, *crop, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits, auxiliary = network(images)
        losses(
            logits,
            auxiliary,
            labels,
            align_corners=network.protocol.align_corners,
            auxiliary_weight=Recipe.auxiliary_weight,
        )
    return saved.bytes


if __name__ == "__main__":
    run(main)
