"""The command line of ``python -m emanet_triton.deploy``, which is ``emanet-triton export``."""

from pathlib import Path

from emanet_triton.command import THREADS, Parser, count, program, size, thread_count
from emanet_triton.deploy.formats import FORMATS
from emanet_triton.deploy.parts import LOGITS, PARTS
from emanet_triton.deploy.program import DTYPES, OPERATORS, STANDARD
from emanet_triton.inference.options import add_scale


def make_parser() -> Parser:
    """The parser of all arguments."""
    parser = Parser(
        prog=program("export", "deploy"),
        description="Write a network as a file that other programs run, and compare its results "
        "with this package's.",
        epilog=f"models: {program('eval')} --list",
    )
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        help="a checkpoint file, or the name of a model, whose published file is downloaded once",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="onnx: operators of ONNX alone; openvino: OpenVINO's .xml and .bin; torch: a program "
        "of torch.export; aoti: a package that AOTInductor compiles for this kind of device; "
        "safetensors: the weights alone",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--model",
        help="the model that CKPT belongs to; default: the one that a file of emanet-triton train "
        "names, or whose published file has the name or the hash of CKPT",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.toml",
        help="a file that describes the data set of CKPT; default: the data set of the model, or "
        "the one on which CKPT was trained",
    )
    what = parser.add_argument_group("what the file computes")
    what.add_argument(
        "--part",
        choices=PARTS,
        default=LOGITS,
        help="logits: normalised images, float32 [B, 3, H, W], to logits of an eighth of the size; "
        "labels: normalised images to uint8 labels [B, H, W]; image-to-labels: uint8 RGB images to "
        "labels, with all resizes; default: %(default)s",
    )
    what.add_argument(
        "--size",
        type=size,
        metavar="HEIGHTxWIDTH",
        help="of the input in pixels; default: the size into which the protocol fits an image, for "
        "the logits of sliding windows the size of a window; if images keep their size, for the "
        "logits the size to which the protocol pads them, and else there is no default",
    )
    what.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="images at once; default: one, which image-to-labels takes as [H, W, 3] and else as "
        "[N, H, W, 3]",
    )
    what.add_argument(
        "--dynamic",
        action="store_true",
        help="leave batch and size free; --size is then one of the compared sizes",
    )
    add_scale(what)

    how = parser.add_argument_group("how it computes")
    how.add_argument(
        "--precision",
        choices=DTYPES,
        default="fp32",
        help="of weights and activations; inputs and logits are float32; default: %(default)s",
    )
    how.add_argument(
        "--operators",
        choices=OPERATORS,
        default=STANDARD,
        help="standard: PyTorch's; own: this package's, for --to torch: faster, but the program "
        "that loads the file must import emanet_triton; default: %(default)s",
    )
    how.add_argument("--device", help="for which the file is; default: cuda if there is a GPU")
    how.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help=f"threads of the comparison on a CPU; {THREADS}",
    )
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not compare results. By default a file whose results are wrong is not kept",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser
