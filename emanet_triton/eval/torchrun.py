"""Whether torchrun started this process as one of its ranks, and as which rank."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from emanet_triton.errors import InputError

_RUN_ID = "TORCHELASTIC_RUN_ID"
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank and the processes that it starts share all of these; another torchrun differs in one.
_IDENTITY = (_RUN_ID, "TORCHELASTIC_RESTART_COUNT", "RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """A rank of a torchrun.

    Attributes:
        rank: of this process, from 0.
        count: of ranks.
        local_rank: of this process on its machine.
        local_count: of ranks on this machine.
        host, port: where torchrun's key-value store answers.
        hosted: torchrun hosts the store; otherwise rank 0 has to.
        node: number of this machine.
        attempt: number of the attempt: torchrun may start all ranks again.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    host: str
    port: int
    hosted: bool
    node: str
    attempt: str


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place in the torchrun that started it, or ``None`` without torchrun.

    Raises:
        InputError: torchrun's environment variables are incomplete or contradict one another.
    """
    if _RUN_ID not in environment:
        return None
    *texts, host, port_text = (environment.get(name, "") for name in _PLACE)
    texts.append(port_text)
    if not host or not all(text.isascii() and text.isdigit() for text in texts):
        raise _unusable(environment)
    rank, count, local_rank, local_count, port = map(int, texts)
    if not (rank < count and local_rank < local_count <= count and 0 < port < 2**16):
        raise _unusable(environment)
    return Place(
        rank,
        count,
        local_rank,
        local_count,
        host,
        port,
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environment.get("GROUP_RANK", "0"),
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def is_inside_a_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank of another program started this process.

    An example is a training that evaluates its checkpoint. The answer is yes if PyTorch's process
    group is already in use, or if a Python process among this process's ancestors is the same
    rank. Shells and other programs between torchrun and this process do not count. The answer is
    no if the system does not show other processes.
    """
    if dist.is_available() and dist.is_initialized():
        return True
    own = [environment.get(name) for name in _IDENTITY]
    for process in _ancestors():
        theirs = _environment_of(process)
        if [theirs.get(name) for name in _IDENTITY] != own:
            return False
        if _is_python(process):
            return True
    return False


def _ancestors() -> Iterator[Path]:
    """The folders in /proc of this process's parent, of the parent's parent, and so on."""
    parent = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while parent > 0:
            process = Path("/proc", str(parent))
            yield process
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _environment_of(process: Path) -> dict[str, str]:
    """The environment that a process started with."""
    try:
        lines = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _is_python(process: Path) -> bool:
    try:
        return (process / "exe").readlink().name.startswith(("python", "pypy"))
    except OSError:
        return False


def _unusable(environment: Mapping[str, str]) -> InputError:
    found = ", ".join(f"{name}={environment.get(name, '(missing)')}" for name in _PLACE)
    return InputError(
        f"torchrun's environment variables are not usable: {found}; start all ranks with torchrun, "
        f"or unset {_RUN_ID} to run alone"
    )
