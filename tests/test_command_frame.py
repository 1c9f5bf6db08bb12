"""The frame of command lines: arguments, closed and full streams, control characters."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks

from emanet_triton.command import Parser, answer, complain, program, say
from emanet_triton.errors import InputError, one_line, printable

# Starts programs of the frame alone: the whole package imports PyTorch, which takes two seconds.
FRAME_ALONE = f"""
import sys, types
package = sys.modules["emanet_triton"] = types.ModuleType("emanet_triton")
package.__path__ = [{str(Path(__file__).parents[1] / "emanet_triton")!r}]
"""

# Prints more than a pipe can hold, and does its work afterwards.
PROGRAM = f"""{FRAME_ALONE}
import pathlib, sys, tqdm, warnings
from emanet_triton.command import complain, run, say

def main():
    for i in range(20_000):
        say(f"line {{i}}")
    for stream in (sys.stdout, sys.stderr):
        for _ in tqdm.tqdm(range(2), file=stream):
            tqdm.tqdm.write("written", file=stream)
    complain("on standard error")
    warnings.warn("first\\nsecond")
    assert "torch" not in sys.modules
    with open("done", "w") as file:
        print(file.fileno(), file=file)
    return 0

run(main)
"""
FULL = "error: standard output: cannot be written (No space left on device)"
FORMS = {
    "no-output": (">&-", 0, ""),
    "no-errors": (">out 2>&-", 0, ""),
    "no-streams": ("<&- >&- 2>&-", 0, ""),
    "full-disk": (">/dev/full", 2, FULL),
    "full-errors": (">out 2>/dev/full", 0, ""),
    "head": ("| head -1 >out; exit ${PIPESTATUS[0]}", 0, ""),
    "both-to-head": ("2>&1 | head -1 >out; exit ${PIPESTATUS[0]}", 0, ""),
}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("form", FORMS)
def test_no_stream_ends_the_work(tmp_path, form, unbuffered):
    redirection, code, last = FORMS[form]
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} program.py {redirection}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int((tmp_path / "done").read_text()) > 2  # a file never gets a standard stream's number
    assert done.returncode == code
    assert "Error" not in done.stderr
    assert done.stderr.endswith(f"{last}\n" if last else "")


def test_a_warning_is_one_line():
    code = "import warnings; from emanet_triton.command import run;"
    code += "run(lambda: warnings.warn('first\\nsecond') or 0)"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", FRAME_ALONE + code],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "note: first\n")


def test_a_terminal_that_knows_ascii_only(tmp_path):
    code = "from emanet_triton.command import run, say; run(lambda: say('1.5× \\udcff é') or 0)"
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", FRAME_ALONE + code], capture_output=True, env=os.environ | ascii_only
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"1.5\\xd7 \\udcff \\xe9\n"


# Receives a signal, and another one while it ends.
SIGNALLED = """
import os, signal, sys
from emanet_triton.command import answer, run

def main():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal
run(lambda: answer(main, "what was kept"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
def test_what_counts_as_ctrl_c(number):
    done = subprocess.run(
        [sys.executable, "-c", FRAME_ALONE + SIGNALLED, str(int(number))],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "what was kept\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=str)
def test_what_is_ignored_stays_ignored(number):
    """A shell ignores Ctrl-C for a background command, and nohup ignores a hangup."""
    code = (
        "import os, sys; from emanet_triton.command import answer, run;"
        "run(lambda: answer(lambda: os.kill(os.getpid(), int(sys.argv[1])) or 7))"
    )
    done = subprocess.run(
        [sys.executable, "-c", FRAME_ALONE + code, str(int(number))],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 7, ""),
        (InputError("x: no such file"), 2, "error: x: no such file\n"),
        (InputError("\x1b[2J\r\x9b: none\n  more"), 2, "error: \\x1b[2J\\r\\x9b: none\n  more\n"),
        (KeyboardInterrupt(), 2, "interrupted\n"),
    ],
    ids=["none", "input", "control", "ctrl-c"],
)
def test_answer(capsys, error, code, message):
    def main():
        if error:
            raise error
        return 7

    assert answer(main) == code
    assert capsys.readouterr() == ("", message)


def test_no_control_character_is_printed(capsys):
    say("a\tb\n\x1b]0;title\x07")
    complain("\u202egnp.exe\u2028")
    assert capsys.readouterr() == ("a\tb\n\\x1b]0;title\\x07\n", "\\u202egnp.exe\\u2028\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("street é 街 ×", "street é 街 ×"),
        ("\x00\x7f\x85", "\\x00\\x7f\\x85"),
        ("\udcff", "\\udcff"),
        ("a\nb", "a\nb"),
    ],
    ids=["letters", "control", "not-utf-8", "lines"],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert one_line(text) == shown.replace("\n", "\\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "x"], "argument --count: invalid int value: 'x'"),
        (["--what"], "unrecognized arguments: --what"),
        (
            ["--count", "1\r"],
            "argument '1\\r' ends with a carriage return: expected a script with the line endings "
            "of Unix, not of Windows",
        ),
        (["--name", "a\x1b[2Jb"], "argument 'a\\x1b[2Jb' holds a control character"),
        (["--name", "a\nb"], "argument 'a\\nb' holds a control character"),
    ],
    ids=["value", "unknown", "carriage-return", "escape", "line-break"],
)
def test_bad_arguments_are_one_message(arguments, message):
    parser = Parser()
    parser.add_argument("--count", type=int)
    parser.add_argument("--name")
    with pytest.raises(InputError) as error:
        parser.parse_args(arguments)
    assert str(error.value) == message


COMMANDS = {
    "all": ("-m", "emanet_triton"),
    "all-eval": ("-m", "emanet_triton", "eval"),
    "env": ("-m", "emanet_triton.env"),
    "completion": ("-m", "emanet_triton.completion", "bash"),
    "eval": ("-m", "emanet_triton.eval"),
    "scenes": ("-m", "emanet_triton.data.scenes.generate", "x"),
    "convert": ("-m", "emanet_triton.convert", "a", "b"),
    "bench": ("-m", "emanet_triton.bench"),
    "bench-report": ("-m", "emanet_triton.bench", "report"),
    "bench-compare": ("-m", "emanet_triton.bench", "compare", "a", "b"),
    "gpu-check": ("-m", "emanet_triton.bench", "gpu-check"),
    "gpu-check-step": ("-m", "emanet_triton.bench.gpu_check.versions"),
    "cost": ("-m", "emanet_triton.bench.cost"),
    "compiled": ("-m", "emanet_triton.bench.ahead_of_time.gates"),
    "train": (str(Path(__file__).parents[1] / "demo" / "train.py"),),
}


@pytest.fixture(scope="module")
def forks():
    forks = Forks(os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    yield forks
    forks.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_line_ends_with_one_line(tmp_path, forks, name):
    done = forks.run([*COMMANDS[name], "--no-such-option\r"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: argument '--no-such-option\\r' ends with a carriage return: expected a script with "
        "the line endings of Unix, not of Windows\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("called", "command", "said"),
    [
        ("/usr/bin/emanet-triton", "eval", "emanet-triton eval"),
        ("Scripts/emanet-triton.exe", "bench report", "emanet-triton bench report"),
        ("/lib/emanet_triton/__main__.py", "eval", "python -m emanet_triton eval"),
        ("/lib/emanet_triton/__main__.py", "", "python -m emanet_triton"),
        ("/lib/emanet_triton/eval/__main__.py", "eval", "python -m emanet_triton.eval"),
        ("/lib/emanet_triton/bench/cost.py", "bench.cost", "python -m emanet_triton.bench.cost"),
        ("-c", "", "emanet-triton"),
        (None, "convert", "python -m emanet_triton.convert"),
    ],
)
def test_usage_shows_how_a_command_was_called(monkeypatch, called, command, said):
    monkeypatch.setattr(sys, "argv", [called] if called else [])
    assert program(command) == said
