"""Scripts that start as forks of a program that has imported torch, which takes seconds."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# It forks for each line of its input: a folder, two files for the output, and the arguments of
# Python. The fork goes on as the script and ends as a program does. Its exit code is printed.
CODE = """
import json, os, runpy, sys, torch

for line in sys.stdin:
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
folder, out, err, *sys.argv = json.loads(line)
os.chdir(folder)
for stream, path in enumerate((os.devnull, out, err)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
if sys.argv[0] == "-m":
    sys.path[0], sys.argv = folder, sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Forks:
    """The program, in an environment of its own, which all scripts get."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", CODE]
        self._process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)

    def run(self, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
        """What Python does with these arguments in this folder."""
        with tempfile.TemporaryDirectory() as kept:
            files = Path(kept, "out"), Path(kept, "err")
            line = json.dumps([*map(str, (folder, *files)), *arguments])
            print(line, file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, *(f.read_text() for f in files))

    def close(self) -> None:
        self._process.communicate()
