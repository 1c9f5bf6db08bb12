"""The command that times large pages, with processes that end early."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

from emanet_triton.bench import large_pages

RESULT = 20.0, 1.0, 30.0
FILE = "pages.csv"
STARTED = "LARGE_PAGES_TEST_STARTED"  # names a file that the child makes


def dies_in_bfloat16(image, dtype, calls, value):
    """As running out of memory does, with the second dtype."""
    return os._exit(9) if dtype == "bf16" else RESULT


def sleeps_in_bfloat16(image, dtype, calls, value):
    if dtype == "bf16":
        Path(os.environ[STARTED]).touch()
        time.sleep(300)
    return RESULT


def run(monkeypatch, tmp_path, measure):
    """Time one size with this function; the exit code."""
    monkeypatch.setattr(large_pages, "_measure", measure)
    path = str(tmp_path / FILE)
    return large_pages.main(["--sizes", "64x96", "--processes", "1", "--csv", path])


def assert_rows_of_float32(tmp_path, printed):
    kept = (tmp_path / FILE).read_text()
    assert printed.out.count("r50 network 64x96") == kept.count("r50 network 64x96,fp32") == 2
    assert "bf16" not in printed.out + kept


def test_a_process_that_dies_is_one_message_and_the_rows_are_kept(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, dies_in_bfloat16) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: --sizes 64x96, bf16: the measuring process ended")
    assert_rows_of_float32(tmp_path, printed)


def test_an_interruption_ends_the_process_and_the_rows_are_kept(tmp_path, monkeypatch, capsys):
    started = tmp_path / "started"
    monkeypatch.setenv(STARTED, str(started))

    def interrupt():
        while not started.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    before = multiprocessing.active_children()
    threading.Thread(target=interrupt, daemon=True).start()
    assert run(monkeypatch, tmp_path, sleeps_in_bfloat16) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["interrupted"]
    assert_rows_of_float32(tmp_path, printed)
    assert multiprocessing.active_children() == before


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    folder = tmp_path / "file"
    folder.write_text("")
    assert large_pages.main(["--csv", str(folder / FILE)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: expected a folder")
