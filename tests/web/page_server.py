"""The page's server in a process of its own, which notes to whom it connects."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # a proxy that does not answer

# Notes which addresses the server connects to and which names it looks up.
NOTES = """
import pathlib, sys

def note(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        address = arguments[1][0]
    elif event == "socket.getaddrinfo":
        address = arguments[0]
    else:
        return
    with pathlib.Path(__file__).with_name("connected").open("a") as file:
        print(address, file=file)

sys.addaudithook(note)
"""


class Server:
    """A running server of the page, with all its files in a folder.

    Attributes:
        address: of the page.
        temporary: the folder for its temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(NOTES)
        own = {name: str(folder) for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME")}
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), NOWHERE)
        search = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emanet_triton.web", "--no-browser", "--device", "cpu"],
            cwd=folder,
            env={
                **{
                    name: value for name, value in os.environ.items() if "proxy" not in name.lower()
                },
                **own,
                **proxies,
                "PYTHONPATH": search,
                "TMPDIR": str(self.temporary),
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        if found is None:
            raise AssertionError(line + self.process.communicate()[0])
        self.address = found[0]

    def memory(self) -> int:
        """Bytes of memory that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) * 1024

    def stop(self) -> tuple[int, str, float]:
        """Press Ctrl-C: the exit code, the last output, and the seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output, time.monotonic() - start

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
