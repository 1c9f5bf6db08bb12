"""``emanet-triton completion``: the script for bash, as bash runs it, and those of other shells."""

import re
import subprocess

import pytest
import shtab

from emanet_triton import completion
from emanet_triton.bench.suites import SUITES
from emanet_triton.completion import main, script
from emanet_triton.models.zoo import list_models
from emanet_triton.subcommands import COMMANDS

# Prints what bash would offer after a command line; the last word is being typed.
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$(complete -p emanet-triton | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "emanet-triton"
    path.write_text(script("bash"))
    return path


@pytest.fixture
def offered(bash_script, tmp_path):
    """A function that returns what bash offers in a folder with a file and a folder."""
    (tmp_path / "file.pth").touch()
    (tmp_path / "folder").mkdir()

    def ask(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", ASK, "bash", str(bash_script), "emanet-triton", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    return ask


def test_bash_can_read_the_script(bash_script):
    done = subprocess.run(["bash", "-n", str(bash_script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["ev"], {"eval"}),
        ([""], set(COMMANDS)),
        (["--v"], {"--version"}),
        (["eval", "--pre"], {"--precision"}),
        (["eval", "--precision", "b"], {"bf16"}),
        (["eval", "--model", "emanet_d"], {"emanet_demo"}),
        (["eval", "--ckpt", "f"], {"file.pth", "folder"}),
        (["eval", "--data", "f"], {"file.pth", "folder"}),
        (["eval", "--calibration", "f"], {"file.pth", "folder"}),
        (["predict", "--precision", "i"], {"int8"}),
        (["eval", "--save-overlays", "f"], {"folder"}),
        (["eval", "--no-f"], {"--no-fuse"}),
        (["eval", "--ms-flip", "--pr"], {"--protocol", "--precision"}),
        (["convert", "fi"], {"file.pth"}),
        (["convert", "file.pth", "--f"], {"--force"}),
        (["bench", ""], {*SUITES, "report", "compare", "gpu-check"}),
        (["bench", "--csv", "f"], {"file.pth", "folder"}),
        (["bench", "em", "--dtypes", "f"], {"fp16", "fp32"}),
        (["bench", "report", "--ch"], {"--check"}),
        (["bench", "compare", "fi"], {"file.pth"}),
        (["bench", "gpu-check", "--stage", "pro"], {"profile"}),
        (["completion", "ba"], {"bash"}),
        (["nothing", "--pre"], set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers(offered, words, wanted):
    assert offered(*words) == wanted


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_every_shell(shell, capsys):
    assert main([shell]) == 0
    said = capsys.readouterr().out
    assert "emanet-triton" in said
    assert set(COMMANDS) <= set(re.findall(r"\w+", said))


def test_another_shell(capsys):
    assert main(["sh"]) == 2
    assert "invalid choice: 'sh'" in capsys.readouterr().err


def test_models_are_words():
    assert list(completion.WORDS["model"]()) == list_models()
