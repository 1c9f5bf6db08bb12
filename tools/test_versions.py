"""Run the tests with PyTorch 2.10, with the PyTorch that pip takes, and with the newest PyTorch.

    python tools/test_versions.py [ARGUMENTS OF PYTEST]

Each PyTorch has a virtual environment of its own in ``.venvs``. Before the tests, mypy checks the
package's types, because PyTorch's own differ from version to version. The last lines of the output
say how many tests passed and failed with each PyTorch, and whether mypy failed. The exit code is 1
if a test or mypy failed, or if a PyTorch could not be installed.
"""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venvs"
INSTALLED = "import torch, triton; print(f'torch {torch.__version__}, Triton {triton.__version__}')"


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        name: of its folder.
        packages: the packages that pip installs besides this package.
        variables: environment variables for pip.
    """

    name: str
    packages: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


ENVIRONMENTS = (
    # The oldest that pyproject.toml allows. The interpreter of its Triton needs NumPy before 2.4.
    Environment("oldest", ("torch==2.10.*", "torchvision==0.25.*", "numpy<2.4")),
    Environment("pip", ("torch", "torchvision")),
    # Without pip's configuration on this machine, which may hold PyTorch back.
    Environment(
        "newest", ("torch", "torchvision"), {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""}
    ),
)


def main(arguments: list[str]) -> int:
    lines, failed = [], False
    for environment in ENVIRONMENTS:
        try:
            line, passed = run(environment, arguments)
        except subprocess.CalledProcessError as error:
            line, passed = f"not installed: {' '.join(map(str, error.cmd))}", False
        lines.append(f"{environment.name}: {line}")
        failed |= not passed
    print("", *lines, sep="\n")
    return 1 if failed else 0


def run(environment: Environment, arguments: list[str]) -> tuple[str, bool]:
    """Install an environment, and run mypy and the tests in it.

    Returns:
        The environment's line of the output, without its name, and whether nothing failed.

    Raises:
        CalledProcessError: a package could not be installed.
    """
    folder = FOLDER / environment.name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--upgrade")
    variables = os.environ | environment.variables
    subprocess.run(
        [*pip, *environment.packages, "--editable", f"{ROOT}[dev]"], check=True, env=variables
    )
    typed = subprocess.run([python, "-m", "mypy", "emanet_triton"], cwd=ROOT).returncode == 0
    results = folder / "results.xml"
    results.unlink(missing_ok=True)
    pytest = (python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={results}")
    code = subprocess.run(
        [*pytest, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ).returncode
    versions = subprocess.check_output([python, "-c", INSTALLED], text=True).strip()
    line = f"{versions}: {counted(results)}{'' if typed else ', mypy failed'}"
    return line, typed and code == 0


def counted(results: Path) -> str:
    """How many tests passed and failed, from pytest's file of results."""
    if not results.exists():
        return "pytest did not end"
    suite = ET.parse(results).getroot().find("testsuite")
    total, skipped, *bad = (
        int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")
    )
    return f"{total - skipped - sum(bad)} passed, {sum(bad)} failed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
