"""A trial of a network's kernels on a GPU, in a process of its own.

A kernel that accesses memory it should not ends every later call of its process, so the trial must
not run in the user's. Its verdict is kept in ``$XDG_CACHE_HOME/emanet_triton/trials.jsonl``. The
child is ``python -m emanet_triton.models.trial_child``: a ``Trial`` as JSON on its input, the
verdict as JSON on the last line of its output.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from emanet_triton.kernels.cache import Cache, digest, environment
from emanet_triton.models.agreement import input_size
from emanet_triton.models.emanet import Architecture, EMANet

SECONDS = 600  # enough to compile all kernels and to measure all convolutions
SOUND = "sound"
FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trial:
    """What is tried: a network with generated weights, on noise.

    Attributes:
        network: "fused", or "plain", which tries the EM attention alone.
        architecture, num_classes: of the network.
        height, width: of its input.
        backend: of its EM attention.
        dtype: that it computes in, by PyTorch's name.
        device: where.
    """

    network: str
    architecture: Architecture
    num_classes: int
    height: int
    width: int
    backend: str
    dtype: str
    device: str

    @classmethod
    def of(cls, network: str, model: EMANet, dtype: torch.dtype, device: torch.device) -> "Trial":
        """The trial that tells most of a model."""
        backend = model.decode_head.ema_module.backend
        height, width = input_size(model.protocol)
        return cls(
            network, model.architecture, model.num_classes, height, width, backend,
            str(dtype).removeprefix("torch."), str(device),
        )  # fmt: skip

    @property
    def key(self) -> str:
        """What the verdict depends on beside the environment, which has the device's name."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "device"})


@dataclass(frozen=True)
class Verdict:
    """What a trial came to.

    Attributes:
        problem: what is wrong, if anything.
        lasting: whether another trial would come to the same.
    """

    problem: str | None
    lasting: bool = True


def problem_of(trial: Trial) -> str | None:
    """What is wrong with a network on its CUDA device, if anything: tried once, then known."""
    cache = _cache(torch.device(trial.device))
    known = cache.get(trial.key)
    if known is not None:
        if known == SOUND:
            return None
        return f"{known}; found earlier: to have it tried again, delete {cache.path}"
    verdict = run(trial)
    if verdict.lasting:
        cache.put(trial.key, verdict.problem or SOUND)
    return verdict.problem


@functools.cache
def _cache(device: torch.device) -> Cache:
    sources = [file for name in ("kernels", "models") for file in (_PACKAGE / name).rglob("*.py")]
    return Cache("trials.jsonl", f"{environment(device)}, sources {digest(sources)}")


def run(trial: Trial, command: Sequence[str] | None = None, seconds: float = SECONDS) -> Verdict:
    """Have a child process make the trial.

    Args:
        trial: what to try.
        command: of the child; ``trial_child`` by default.
        seconds: until it is ended.
    """
    paths = os.environ.get("PYTHONPATH", ""), str(_PACKAGE.parent)
    try:
        child = subprocess.Popen(
            command or [sys.executable, "-m", "emanet_triton.models.trial_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # so that a compiler that it has started ends with it
        )
    except OSError as error:
        return Verdict(f"its trial cannot be started: {error}", lasting=False)
    with child:
        try:
            output, errors = child.communicate(json.dumps(asdict(trial)), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(f"its trial has not ended after {seconds:g} seconds")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    return _verdict(child.returncode, output, errors)


def _verdict(code: int, output: str, errors: str) -> Verdict:
    last_words = (errors.strip().splitlines() or ["no message"])[-1]
    if code < 0:
        reason = f"its trial was ended by {signal.strsignal(-code)}: {last_words}"
        return Verdict(reason, lasting=-code not in FROM_OUTSIDE)
    if code > 0:
        reason = f"its trial failed with exit code {code}: {last_words}"
        return Verdict(reason, lasting=False)
    try:
        return Verdict(**json.loads(output.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Verdict("its trial gave no verdict", lasting=False)
