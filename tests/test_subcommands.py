"""``emanet-triton``: the table of commands, their start and their usage lines."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from emanet_triton import __version__, subcommands
from emanet_triton.__main__ import main, start
from emanet_triton.bench.__main__ import COMMANDS as OF_BENCH
from emanet_triton.command import SCRIPT, Parser
from emanet_triton.subcommands import COMMANDS, Command, run_command

ROOT = Path(__file__).parents[1]
NAMES = ", ".join(COMMANDS)


@pytest.fixture
def fake(monkeypatch):
    """The arguments that the command "eval" gets; it returns 7."""
    got = []
    module = type(sys)("fake_command")
    module.main = lambda arguments: got.append(arguments) or 7
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "eval", Command(module.__name__, "fake"))
    return got


def test_a_command_gets_its_arguments_and_gives_the_exit_code(fake):
    assert main(["eval", "--version", "eval", "-h"]) == 7
    assert fake == [["--version", "eval", "-h"]]


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.endswith(f" {command.line}")
        assert len(line) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], f"unknown command 'evl' (did you mean 'eval'?); expected one of: {NAMES}"),
        (["xyzzy", "--ckpt", "x"], f"unknown command 'xyzzy'; expected one of: {NAMES}"),
        ([""], f"unknown command ''; expected one of: {NAMES}"),
        (["--ckpt", "x"], "unrecognized arguments: --ckpt"),
        (["--ckpt", "eval"], "unrecognized arguments: --ckpt"),
        (["ev\x1b[2J"], "argument 'ev\\x1b[2J' holds a control character"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_message(capsys, arguments, message):
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"emanet-triton {__version__}\n"


def test_ctrl_c_while_a_command_is_imported(fake, monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(subcommands.importlib, "import_module", interrupted)
    assert main(["eval"]) == 2
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_list_of_commands_imports_nothing_that_the_package_does_not():
    code = (
        "import sys, emanet_triton, argparse, difflib; before = set(sys.modules);"
        "from emanet_triton.__main__ import main; main([]); main(['evl']);"
        "print(*sorted(n for n in set(sys.modules) - before if n.split('.')[0] not in"
        " sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = {"emanet_triton.__main__", "emanet_triton.command", "emanet_triton.subcommands"}
    assert set(done.stdout.splitlines()[-1].split()) <= own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_parser_named_as_it_was_called(name, monkeypatch):
    command = COMMANDS[name]
    assert callable(importlib.import_module(command.module).main)
    make_parser = importlib.import_module(command.options or command.module).make_parser
    for called, prog in (
        ("/bin/emanet-triton", f"emanet-triton {name}"),
        ("/lib/emanet_triton/__main__.py", f"python -m emanet_triton {name}"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        parser = make_parser()
        assert isinstance(parser, Parser)
        assert parser.prog == prog


@pytest.mark.parametrize("name", OF_BENCH)
def test_the_commands_of_the_benchmark(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emanet-triton"])
    parser = importlib.import_module(OF_BENCH[name].module).make_parser()
    assert parser.prog == f"emanet-triton bench {name}"


def test_a_table_of_one_command():
    commands = {"one": Command("emanet_triton.convert", "")}
    with pytest.raises(ValueError, match=r"^unknown command 'two'; expected one of: one$"):
        run_command("two", [], commands)


def test_the_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"][SCRIPT].partition(":")
    assert getattr(importlib.import_module(module), function) is start


def test_signals_and_streams_are_handled(tmp_path):
    """As a console script runs it, with a full standard output."""
    code = "import sys; sys.argv = ['emanet-triton']; from emanet_triton.__main__ import start"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", f"{code}; sys.exit(start())"],
            stdout=full,
            stderr=-1,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "error: standard output: cannot be written (No space left on device)\n"
