"""``python -m emanet_triton.convert SRC DST.safetensors``: keep a checkpoint's weights only."""

from collections.abc import Sequence

from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.models.checkpoint import convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 if the input cannot be used."""
    return answer(lambda: _convert(arguments))


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("convert"),
        description="Write the weights of an mmseg checkpoint as a safetensors file.",
    )
    parser.add_argument("source", help="a PyTorch or safetensors checkpoint")
    parser.add_argument("destination", help="the file to write, *.safetensors")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    return parser


def _convert(arguments: Sequence[str] | None) -> int:
    args = make_parser().parse_args(arguments)
    written = convert(args.source, args.destination, overwrite=args.force)
    megabytes = written.path.stat().st_size / 1e6
    say(
        f"{written.path}: {len(written.state_dict)} tensors, {megabytes:.1f} MB, "
        f"sha256 {written.sha256}"
    )
    return 0


if __name__ == "__main__":
    run(main)
