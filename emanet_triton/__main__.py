"""``emanet-triton COMMAND``, which is also ``python -m emanet_triton COMMAND``: all commands."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from emanet_triton._version import __version__
from emanet_triton.command import SCRIPT, Parser, answer, program, run
from emanet_triton.subcommands import COMMANDS, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; without a command, list all commands."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return answer(lambda: _main(given))


def make_parser() -> Parser:
    """The parser of the options before a command."""
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:{width}}{command.line}" for name, command in COMMANDS.items())
    parser = Parser(
        prog=program(),
        usage="%(prog)s [--help] [--version] COMMAND ...",
        description="EMANet for semantic segmentation.\n\ncommands:\n" + "\n".join(lines),
        epilog=f"{program('COMMAND')} --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{SCRIPT} {__version__}")
    return parser


def start() -> NoReturn:
    """The console script."""
    run(main)


def _main(arguments: list[str]) -> int:
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 0
    name, *rest = arguments
    if name in COMMANDS:
        return run_command(name, rest, COMMANDS)
    _, unknown = parser.parse_known_args([name])  # runs --help and --version
    if name.startswith("-"):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return run_command(name, rest, COMMANDS)


if __name__ == "__main__":
    start()
