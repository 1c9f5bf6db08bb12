"""How much ``--smooth`` calms the labels of a panned still, and what it costs.

A window moves over drawn street scenes as a camera pans. Two things are counted: points of the
scene whose label changes from one frame to the next, and pixels with a wrong label, because an
average over frames lags behind the motion. Run from the repository: python demo/smoothing.py
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from emanet_triton import Predictor, create_model, fuse
from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.command import Parser, answer, count, run, say
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.scenes.generate import VAL_SEEDS, generate_scene
from emanet_triton.inference.smoothing import Smoothing
from emanet_triton.kernels.device import cpu_name

HEIGHT, WIDTH = 256, 512  # pixels of the window: what the demonstration model was trained on
SPEEDS = (1, 4)  # pixels a frame
WEIGHTS = (None, 0.5, 0.8, 0.9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python demo/smoothing.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=count, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--frames", type=count, default=40, metavar="N", help="of each pan; default: %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the figures to a file")
    args = parser.parse_args(arguments)
    if args.csv:
        require_table(args.csv)
    rows = [
        {"pixels a frame": speed, "weight": "off" if weight is None else weight}
        | _measured(speed, weight, args.scenes, args.frames)
        for speed in SPEEDS
        for weight in WEIGHTS
    ]
    say(tabulate(rows, headers="keys"))
    if args.csv:
        where = {"scenes": args.scenes, "frames": args.frames, "device": cpu_name()}
        write_table(args.csv, rows, **where)
    return 0


def _measured(speed: int, weight: float | None, scenes: int, frames: int) -> dict[str, float]:
    """The mean percentages over all frames but the first ten, in which an average begins."""
    network = fuse(create_model("emanet_demo", pretrained=True))
    predictor = Predictor(network, network.protocol)
    skipped = min(10, frames // 2)
    changed, wrong = [], []
    for seed in VAL_SEEDS[:scenes]:
        scene, ids = generate_scene(seed, HEIGHT, WIDTH + speed * frames)
        smoothing = None if weight is None else Smoothing(weight)
        before = None
        for i in range(frames):
            window = slice(i * speed, i * speed + WIDTH)
            image = np.ascontiguousarray(scene[:, window])
            labels = predictor.results([image], adjust=smoothing)[0][0].numpy()
            if i >= skipped and before is not None:
                changed.append((labels[:, :-speed] != before[:, speed:]).mean())
                scored = np.isin(ids[:, window], [c.label_id for c in CITYSCAPES.classes])
                stored = CITYSCAPES.to_stored_ids(labels)
                wrong.append((stored != ids[:, window])[scored].mean())
            before = labels
    return {
        "changed labels, % a frame": round(100 * float(np.mean(changed)), 3),
        "wrong labels, %": round(100 * float(np.mean(wrong)), 2),
    }


if __name__ == "__main__":
    run(main)
