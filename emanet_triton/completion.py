"""``emanet-triton completion SHELL``: a script that completes commands, options and paths."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import shtab

from emanet_triton import __main__ as whole
from emanet_triton.command import SCRIPT, Parser, answer, program, run, say
from emanet_triton.models.zoo import list_models
from emanet_triton.subcommands import COMMANDS, add_parsers

# Names of arguments that may be paths although their type is not Path.
FILES = {"calibration", "ckpt", "init", "source", "sources", "destination"}
FOLDERS = {"DIR", "ROOT"}  # as the parsers show folders
WORDS: dict[str, Callable[[], Iterable[str]]] = {"model": list_models}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for bad arguments."""
    return answer(lambda: _main(arguments))


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("completion"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that completes commands, options and paths.",
        epilog=f'bash, in ~/.bashrc:  eval "$({SCRIPT} completion bash)"\n'
        f"zsh, in a folder of $fpath:  {SCRIPT} completion zsh > _{SCRIPT}\n"
        f"tcsh:  {SCRIPT} completion tcsh > FILE, and in ~/.tcshrc:  source FILE",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def script(shell: str) -> str:
    """The script for a shell, one of ``shtab.SUPPORTED_SHELLS``.

    Its words are those of all commands. Where a value is a file or a folder, the shell completes
    paths.
    """
    parser = whole.make_parser()
    parser.prog = SCRIPT  # the word that is completed, however this process was called
    add_parsers(parser.add_subparsers(), COMMANDS)
    _mark(parser)
    return shtab.complete(parser, shell)


def _main(arguments: Sequence[str] | None) -> int:
    say(script(make_parser().parse_args(arguments).shell))
    return 0


def _mark(parser: argparse.ArgumentParser) -> None:
    """Say of each argument which paths or words it takes."""
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _mark(inner)
        elif action.dest in WORDS:
            action.choices = list(WORDS[action.dest]())
        elif action.type is Path or action.dest in FILES:
            kind = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]  # where shtab looks


if __name__ == "__main__":
    run(main)
