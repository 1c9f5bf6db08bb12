"""Every kind of exported file, of the networks of the zoo, on images of real sizes.

    python -m emanet_triton.bench.exports --csv benchmarks/results/export/files.csv

Each file is for images of all sizes (``image-to-labels``, float32). AOTInductor needs long for such
a file, so it makes one for each size. The labels are compared with those of ``Predictor`` and the
fused network. The weights are generated.
"""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from emanet_triton.bench.networks import MODELS, make_network, make_protocol
from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.deploy.formats import FORMATS
from emanet_triton.deploy.parts import IMAGE_TO_LABELS
from emanet_triton.deploy.program import OWN, STANDARD, Request
from emanet_triton.deploy.verify import example_image, labels_check, wanted_labels
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.views import Size
from emanet_triton.models.fused import fuse
from emanet_triton.models.zoo import ZOO
from emanet_triton.versions import package_version

KINDS = (("onnx", STANDARD), ("openvino", STANDARD), ("torch", STANDARD), ("torch", OWN),
         ("aoti", STANDARD))  # fmt: skip
SIZES = ((1024, 2048), (513, 1023))
RUNTIMES = "onnx", "onnxruntime", "openvino"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 if labels are wrong."""
    return answer(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog=program("bench.exports"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="few channels and small images")
    kinds = {to: None for to, _ in KINDS}
    parser.add_argument("--to", nargs="+", choices=kinds, help="only these kinds of files")
    parser.add_argument("--networks", nargs="+", choices=MODELS.values(), metavar="MODEL")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the rows to a file")
    args = parser.parse_args(arguments)
    if args.csv:
        require_table(args.csv)
    rows: list[dict[str, Any]] = []
    installed = {name: package_version(name) for name in RUNTIMES}
    for (network, mode), name in MODELS.items():
        if args.networks and name not in args.networks:
            continue
        for row in _rows(network, mode, args.to or kinds, args.tiny):
            rows.append({"network": name, **row})
            say(" | ".join(map(str, rows[-1].values())))
            if args.csv:  # the next file takes minutes
                write_table(args.csv, rows, **installed)
    say(tabulate(rows, headers="keys", tablefmt="github"))
    return int(any(row["wrong"] for row in rows))


def _rows(network: str, mode: str, wanted: Collection[str], tiny: bool) -> Iterator[dict[str, Any]]:
    """Write files of the wanted kinds, and compare their labels; a row for each size of image."""
    scale: Size = (128, 256) if tiny else (1024, 2048)
    protocol = make_protocol(mode, scale, tiny) if tiny else ZOO[MODELS[network, mode]].protocol
    model = make_network(network, protocol, tiny)
    sizes = [(height // 8, width // 8) if tiny else (height, width) for height, width in SIZES]
    predictor = Predictor(fuse(model), protocol)
    images = {size: example_image(size, seed=0) for size in sizes}
    right = {size: wanted_labels(predictor, image) for size, image in images.items()}
    for to, operators in KINDS:
        # A file for all sizes, or one for each.
        files = sizes if to == "aoti" else [scale]
        for fixed in files if to in wanted else []:
            dynamic = to != "aoti"
            request = Request(
                model, protocol, IMAGE_TO_LABELS, "fp32", fixed, 1, dynamic, operators, None
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"file{FORMATS[to].suffix}")
                FORMATS[to].write(request, path)
                megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
                labels = FORMATS[to].run(path, request)
                for size in sizes if dynamic else [fixed]:
                    got = labels(torch.from_numpy(images[size])[None]).cpu()
                    check = labels_check(got, [right[size]], "fp32")
                    yield {
                        "file": to,
                        "operators": operators,
                        "sizes": "all" if dynamic else "one",
                        "MB": round(megabytes, 1),
                        "image": "x".join(map(str, size)),
                        "labels that differ, %": round(100 * check.error, 5),
                        "wrong": check.beyond,
                        "near-tie": check.allowed,
                    }


if __name__ == "__main__":
    run(main)
