"""Run the tests of ``emanet_triton.mmseg`` inside mmsegmentation 0.30.0 and 1.2.2, on the CPU.

    python tools/mmseg_env.py [ARGUMENTS OF PYTEST]

Each version has a virtual environment in ``.venvs``. It also sees this package and the packages of
the Python that runs this script: PyTorch, OpenCV and the dev extra. mmcv comes without its compiled
operators, which EMANet does not use. The exit code is 1 if a test failed or a package could not be
installed.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venvs"
TESTS = ROOT / "tests" / "in_mmseg"

# Packages by version of mmsegmentation. mmcv 1.7.2 is built from its source, by a setuptools that
# still has pkg_resources, and already the command bdist_wheel, which a new wheel takes from it.
VERSIONS = {"0.30.0": ("mmcv==1.7.2",), "1.2.2": ("mmcv-lite==2.1.0", "mmengine")}
BUILD = ("setuptools>=70.1,<81", "wheel")
# What these import. Nothing else is installed, so that PyTorch and OpenCV stay those of the script.
IMPORTED = (
    *("addict", "ftfy", "platformdirs", "prettytable", "pyyaml", "regex", "rich", "scipy"),
    *("termcolor", "terminaltables", "tomli", "wcwidth", "yapf"),
)

# Takes the place of mmcv/ops/__init__.py, which would import the compiled operators.
OPERATORS = '''"""mmcv without compiled operators: each name is a class that cannot be used."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"mmcv.ops.{name} is not compiled in this environment")

    return type(name, (), {"__init__": refuse})
'''


def main(arguments: list[str]) -> int:
    lines, failed = [], False
    for version in VERSIONS:
        try:
            passed = test(install(version), arguments)
            line = "passed" if passed else "failed"
        except subprocess.CalledProcessError as error:
            line, passed = f"not installed: {' '.join(map(str, error.cmd))}", False
        lines.append(f"mmsegmentation {version}: {line}")
        failed |= not passed
    print("", *lines, sep="\n")
    return 1 if failed else 0


def install(version: str) -> Path:
    """Make the environment of a version if it is missing; return its Python.

    Raises:
        CalledProcessError: a package could not be installed.
    """
    folder = FOLDER / f"mmseg-{version}"
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps")
    subprocess.run([*pip, *BUILD, *IMPORTED], check=True)
    packages = (f"mmsegmentation=={version}", *VERSIONS[version])
    subprocess.run([*pip, "--no-build-isolation", *packages], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shared = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    (site / "shared.pth").write_text("\n".join([str(ROOT), *shared, ""]))
    operators = site / "mmcv" / "ops" / "__init__.py"
    operators.parent.mkdir(exist_ok=True)
    operators.write_text(OPERATORS)
    done.touch()
    return python


def test(python: Path, arguments: list[str]) -> bool:
    """Run the tests in an environment; return whether all passed."""
    files = sorted(TESTS.glob("mmseg_*.py"))
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *files, *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
