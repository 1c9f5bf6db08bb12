"""``python -m emanet_triton.convert SRC DST``: keep a checkpoint's weights only.

``DST.safetensors`` gets a safetensors file, ``DST.pth`` a file for mmsegmentation.
"""

from collections.abc import Sequence

from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.models.conversion import SUFFIXES, convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 if the input cannot be used."""
    return answer(lambda: _convert(arguments))


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("convert"),
        description="Write the weights of a checkpoint as a safetensors file, or as a file for "
        "mmsegmentation.",
    )
    parser.add_argument("source", help="a PyTorch, PaddlePaddle or safetensors checkpoint")
    parser.add_argument("destination", help="the file to write, *.safetensors or *.pth")
    parser.add_argument(
        "--to",
        choices=tuple(SUFFIXES),
        help="the kind of file; default: safetensors for *.safetensors, mmseg for *.pth",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


def _convert(arguments: Sequence[str] | None) -> int:
    args = make_parser().parse_args(arguments)
    written = convert(args.source, args.destination, overwrite=args.force, to=args.to)
    megabytes = written.path.stat().st_size / 1e6
    say(
        f"{written.path}: {len(written.state_dict)} tensors, {megabytes:.1f} MB, "
        f"sha256 {written.sha256}"
    )
    return 0


if __name__ == "__main__":
    run(main)
