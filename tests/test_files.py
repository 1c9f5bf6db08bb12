"""Files are written whole, also by two threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emanet_triton.files import write_whole


def test_two_threads_write_one_file(tmp_path, monkeypatch):
    """Both have written before either puts its file in its place."""
    both, write = threading.Barrier(2, timeout=10), Path.write_bytes

    def together(self, data):
        write(self, data)
        both.wait()

    monkeypatch.setattr(Path, "write_bytes", together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_whole, [tmp_path / "file"] * 2, (b"one", b"two")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() in (b"one", b"two")
