"""Steps that do one thing, and a stage of them, for the tests of gpu-check."""

import sys

from emanet_triton.bench.gpu_check import Stage
from emanet_triton.bench.gpu_check.steps import Step

HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"


def python(name, code, seconds=30.0, **options):
    """A step of some Python code, whose first argument is its folder."""
    return Step(name, [sys.executable, "-c", code, "{out}"], seconds, **options)


def writes(name, file, text, then="pass"):
    """A step that writes a file, then does something else."""
    code = f"import pathlib, sys, time; (pathlib.Path(sys.argv[1]) / {file!r}).write_text({text!r})"
    return python(name, f"{code}; {then}")


def stage(folder, given=None, work="work"):
    """A stage in a folder of its own: its files are in ``folder/out``."""
    (folder / work).mkdir(parents=True)
    return Stage("the stage", folder / work, folder / "out", "run", given)
