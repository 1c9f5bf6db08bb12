"""The table of all commands, and how a command line runs one of them."""

import argparse
import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from emanet_triton.errors import InputError


class Command(NamedTuple):
    """A command. Its modules are imported only when it runs, or when its options are needed.

    Attributes:
        module: has ``main(arguments: Sequence[str] | None) -> int``, which returns the exit code.
        line: what it does, in one line.
        options: the module that has ``make_parser() -> Parser``; empty if it is ``module``.
    """

    module: str
    line: str
    options: str = ""


COMMANDS = {
    "eval": Command(
        "emanet_triton.eval.__main__",
        "evaluate a checkpoint on a data set; without arguments a demonstration",
        options="emanet_triton.eval.options",
    ),
    "predict": Command(
        "emanet_triton.predict.__main__",
        "segment pictures, folders, videos and webcams",
        options="emanet_triton.predict.options",
    ),
    "train": Command(
        "emanet_triton.train.__main__",
        "train a network or fine-tune a checkpoint on your classes",
        options="emanet_triton.train.options",
    ),
    "bench": Command(
        "emanet_triton.bench.__main__", "time the network and its parts, beside competitors"
    ),
    "convert": Command(
        "emanet_triton.convert", "write a checkpoint's weights as a safetensors or mmseg file"
    ),
    "export": Command(
        "emanet_triton.deploy.__main__",
        "write a network as an ONNX, OpenVINO or PyTorch file for other programs",
        options="emanet_triton.deploy.options",
    ),
    "env": Command("emanet_triton.env", "print versions and hardware, for a report of a bug"),
    "demo": Command("emanet_triton.web.__main__", "segment pictures on a page in the browser"),
    "completion": Command(
        "emanet_triton.completion", "print a script that completes commands in a shell"
    ),
}


def run_command(name: str, arguments: Sequence[str], commands: Mapping[str, Command]) -> int:
    """Run a command and return its exit code.

    Raises:
        InputError: there is no such command. The message names the nearest one, and all.
    """
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        meant = f" (did you mean '{near[0]}'?)" if near else ""
        raise InputError(f"unknown command '{name}'{meant}; expected one of: {', '.join(commands)}")
    return importlib.import_module(commands[name].module).main(arguments)


def add_parsers(added: "argparse._SubParsersAction", commands: Mapping[str, Command]) -> None:
    """Add the parser of each command."""
    for name, command in commands.items():
        parser = importlib.import_module(command.options or command.module).make_parser()
        added.add_parser(name, parents=[parser], add_help=False, help=command.line)
