"""The evaluation as a process: its terminal, links and pipes, and its memory."""

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_eval
from tiny_eval import expected_confusion, tiny_process

from emanet_triton.eval.__main__ import main

TINY = Path(tiny_eval.__file__)


TERMINALS = {
    "full-disk": (">/dev/full", 2),
    "no-output": (">&-", 0),
    "no-streams": (">&- 2>&-", 0),
    "head": ("| head -1; exit ${PIPESTATUS[0]}", 0),
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_the_result_is_written_whatever_happens_to_the_terminal(tmp_path, city, ckpt, terminal):
    redirection, code = TERMINALS[terminal]
    out = tmp_path / "out.json"
    command = tiny_process("--ckpt", str(ckpt), "--data", str(city), "--json", str(out))
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(command)} {redirection}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert json.loads(out.read_text())["confusion"] == expected_confusion(city)


def test_the_tables_are_printed_when_the_result_cannot_be_written(city, ckpt, capsys):
    assert main(["--ckpt", str(ckpt), "--data", str(city), "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 25
    assert err.endswith("error: /dev/full: cannot be written (No space left on device)\n")


def test_the_result_goes_through_links_and_into_fifos(tmp_path, city, ckpt):
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "fifo")
    written = []
    reader = threading.Thread(target=lambda: written.append((tmp_path / "fifo").read_text()))
    reader.start()
    for name in ("link.json", "fifo"):
        assert main(["--ckpt", str(ckpt), "--data", str(city), "--json", str(tmp_path / name)]) == 0
    reader.join(timeout=60)
    assert (tmp_path / "link.json").is_symlink()
    for text in (written[0], (tmp_path / "real.json").read_text()):
        assert json.loads(text)["confusion"] == expected_confusion(city)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, ckpt):
    """50 images need as much memory as 10, within a quarter of the size of the other 40."""
    peaks = []
    code = (  # not ru_maxrss of getrusage, which includes the peak of the parent process
        "import pathlib, sys, tiny_eval; code = tiny_eval.main(sys.argv[1:]);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(status.partition('VmHWM:')[2].split()[0]); sys.exit(code)"
    )
    city = tiny_eval.write_cityscapes(tmp_path / "many", 50, enlarge=16)
    for limit in ("10", "50"):
        command = ["--ckpt", str(ckpt), "--data", str(city), "--limit", limit]
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(TINY.parent)},
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
    pixels = 40 * 4 * 256 * tiny_eval.SIZE[0] * tiny_eval.SIZE[1] / 1024  # KiB, images and labels
    assert peaks[1] - peaks[0] < pixels / 4
