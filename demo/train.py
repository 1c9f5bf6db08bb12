"""Train the demonstration EMANet on synthetic street scenes, by the package's own command.

    python demo/train.py > demo/train.log

It takes twenty minutes on one CPU core and replaces the weights that come with the package. The
same seed gives the same weights on the same machine and versions. ``--no-reconstruction`` trains
the same network, from the same initial weights and on the same batches, but without the
reconstruction of the EM attention; it writes no weights. A trial of a few seconds:

    python demo/train.py --iterations 2 --scenes 2 --held-out 2 --out trial.pth

The last lines of the log show what the reconstruction contributes. They have the mIoU of the
trained network with the reconstruction set to zero, and set to its mean over images and pixels.
Later layers have learnt to expect the mean, so only the second figure shows what the differences
between pixels and images contribute.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from emanet_triton.command import Parser, answer, count, run, say
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.scenes.generate import DEMO_COUNT, write_scenes
from emanet_triton.eval.metric import scores
from emanet_triton.files import require_writable
from emanet_triton.inference.inputs import normalise
from emanet_triton.models.conversion import MMSEG, SUFFIXES, convert
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import ZOO
from emanet_triton.train.folder import LAST
from emanet_triton.train.group import ALONE
from emanet_triton.train.options import parse
from emanet_triton.train.plan import Plan, make_plan
from emanet_triton.train.run import Run
from emanet_triton.train.validation import validate

CPU = torch.device("cpu")
CHECKPOINT = Path(__file__).parents[1] / "emanet_triton/models/weights" / str(ZOO[DEMO].file)
# mmseg's recipe on a small scale, with AdamW because it is faster. The scenes are drawn in all
# sizes and colours already, so they are only cropped and mirrored.
RECIPE = """
    --model emanet_demo --init none --optimizer adamw --lr 3e-3 --min-lr 0 --weight-decay 0.02
    --warmup 100 --class-balance 0.33 --ratios 1,1 --no-colors --most-of-one-class 1
    --val-every 200 --threads 1 --workers 1 --no-check
"""


@torch.no_grad()
def mean_reconstruction(plan: Plan, model: EMANet) -> Tensor:
    """The reconstruction of the EM attention, averaged over images and pixels: [1, C, 1, 1]."""
    head, means = model.eval().decode_head, []
    for sample in plan.val:
        image, _ = plan.dataset.read(sample)
        *_, stage4 = model.backbone(normalise(torch.from_numpy(image)[None]).contiguous())
        recon = head.ema_module(head.ema_mid_conv(head.ema_in_conv(stage4)))
        means.append(recon.mean((0, 2, 3), keepdim=True))
    return torch.stack(means).mean(0)


def ablate(plan: Plan, model: EMANet) -> dict[str, float]:
    """mIoU of the same weights with the reconstruction set to zero, and to its mean."""
    fixed = {"zero": torch.zeros(1), "mean": mean_reconstruction(plan, model)}
    figures = {}
    for name, model.decode_head.fixed_reconstruction in fixed.items():
        confusion = validate(
            model, plan.protocol, "fp32", plan.val, plan.dataset, ALONE, 1, lambda *_: None
        )
        figures[name] = scores(confusion).miou
    model.decode_head.fixed_reconstruction = None
    return figures


def main() -> int:
    return answer(lambda: train(options()))


def options() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--iterations", type=count, default=1200)
    parser.add_argument("--scenes", type=count, default=1500, help="training scenes")
    parser.add_argument("--held-out", type=count, default=DEMO_COUNT, help="scenes to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-reconstruction", action="store_true", help="an ablation that writes no weights"
    )
    arguments = parser.parse_args()
    if not arguments.no_reconstruction:
        require_writable(arguments.out)
        if arguments.out.suffix != SUFFIXES[MMSEG]:
            parser.error(f"--out {arguments.out}: expected a file *{SUFFIXES[MMSEG]}")
    return arguments


def train(arguments: argparse.Namespace) -> int:
    """Train and evaluate; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "scenes"), Path(folder, "out")
        write_scenes(data, "train", arguments.scenes)
        write_scenes(data, "val", arguments.held_out)
        given = {
            "data": data,
            "out": out,
            "iterations": arguments.iterations,
            "seed": arguments.seed,
        }
        named = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        plan = make_plan(parse([*RECIPE.split(), *named]), torch.device("cpu"), ALONE)
        torch.set_num_threads(plan.threads)
        say(f"{ZOO[DEMO].architecture}\n{plan.recipe}\ntorch {torch.__version__}")
        training = Run(plan, ALONE, say, lambda done: None)
        model = training.trainer.network
        assert isinstance(model, EMANet) and training.confusion is None
        if arguments.no_reconstruction:
            model.decode_head.fixed_reconstruction = torch.zeros(1)
        training()
        assert training.confusion is not None
        result = scores(training.confusion)
        for each, iou in zip(CITYSCAPES.classes, result.iou, strict=True):
            say(f"{each.name:14s} {iou:6.2f}")
        if arguments.no_reconstruction:
            say(f"mIoU {result.miou:.2f}, trained and evaluated without reconstruction")
            return 0
        figures = ablate(plan, model)
        say(
            f"mIoU {result.miou:.2f}, and with the reconstruction set to zero "
            f"{figures['zero']:.2f}, to its mean {figures['mean']:.2f}"
        )
        convert(out / LAST, arguments.out, overwrite=True)
        say(f"{arguments.out.name}: {arguments.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    run(main)
