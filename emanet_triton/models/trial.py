"""Whether a network's kernels work on a GPU: its logits against PyTorch's, in a process of its own.

A kernel that accesses wrong memory ends every later GPU call of its process, so the trial must not
run in the user's process. The child reads a pickled ``Trial`` from its input and prints a
``Verdict`` as JSON on its last line. Verdicts are kept in ``$XDG_CACHE_HOME/emanet_triton/
trials.jsonl``.
"""

import base64
import contextlib
import copy
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from emanet_triton.errors import describe
from emanet_triton.kernels import choice
from emanet_triton.kernels.cache import Cache, digest, environment
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_out_of_memory, is_refused
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.models.fused import fuse
from emanet_triton.models.head import attentions
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import MOST_INPUTS, Protocol, num_windows

FP32_ERROR = 1e-4  # bound of the logits' relative error, as in the golden tests
HALF_ERROR = 1e-3  # in half precision: added to twice the error of PyTorch's operations
# For a child: enough to compile and to measure all kernels on most machines. Three trials take less
# than the half hour after which an evaluation in several processes gives a process up.
SECONDS = 540
SECONDS_TO_END = 10  # for a child that was killed
SOUND = "sound"
_UNTAPED = 2  # calls before the launchers play their tapes (see ``kernels.tape``)
_USUAL_SCALE = (1024, 512)  # for a protocol in which every image keeps its own size
_LEAST_SIDE = 128  # pixels of noise: smaller noise would say little about the network
# Signals that come from outside and say nothing about the network. Windows lacks some of them.
FROM_OUTSIDE = {getattr(signal, name, None) for name in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM")}

_PACKAGE = Path(__file__).parents[1]
# It imports what this process does; without -P first what the working directory has.
_CHILD = [sys.executable, "-P", "-c", "from emanet_triton.models.trial import main; main()"]


@dataclass(frozen=True)
class Trial:
    """One network with generated weights, to be run on noise.

    Attributes:
        network: "fused"; "fastest", the fused network that also measures kernels in Gluon; or
            "plain", the network itself, which tries its EM attention.
        kind: the network's class.
        architecture, num_classes: the class is called with them.
        height, width: of the noise.
        windows: of an image of the base scale: so many inputs run at once, or as many as fit into
            memory.
        measures: whether backends are measured; the environment may forbid it.
        backend: of the EM attention.
        dtype: in which the network computes, by PyTorch's name.
        device: where it runs.
    """

    network: str
    kind: type[Network]
    architecture: object
    num_classes: int
    height: int
    width: int
    windows: int
    measures: bool
    backend: str
    dtype: str
    device: str

    @classmethod
    def of(cls, network: str, model: Network, dtype: torch.dtype, device: torch.device) -> "Trial":
        """The trial that resembles a model most."""
        backends = [attention.backend for attention in attentions(model)]
        height, width = _input_size(model.protocol)
        windows = min(num_windows(model.protocol, _usual_size(model.protocol)), MOST_INPUTS)
        return cls(
            network,
            type(model),
            model.architecture,
            model.num_classes,
            height,
            width,
            windows,
            choice.may_search(),
            backends[0] if backends else "auto",
            str(dtype).removeprefix("torch."),
            str(device),
        )

    @property
    def key(self) -> str:
        """The verdict's key in the cache, without the device: the cache's environment names it."""
        return repr(replace(self, device=""))


@dataclass(frozen=True)
class Verdict:
    """The result of a trial.

    Attributes:
        problem: what is wrong, or ``None``.
        lasting: whether another trial would find the same.
    """

    problem: str | None
    lasting: bool = True


def problem_of(trial: Trial) -> str | None:
    """What is wrong with a network on its CUDA device, or ``None``. Known verdicts are reused."""
    cache = _cache(torch.device(trial.device))
    known = cache.get(trial.key)
    if known is not None:
        if known == SOUND:
            return None
        return f"{known}; found earlier: to have it tried again, delete {cache.path}"
    verdict = run(trial)
    choice.reread()
    if verdict.lasting:
        cache.put(trial.key, verdict.problem or SOUND)
    return verdict.problem


@functools.cache
def _cache(device: torch.device) -> Cache:
    sources = [file for name in ("kernels", "models") for file in (_PACKAGE / name).rglob("*.py")]
    return Cache("trials.jsonl", f"{environment(device)}, sources {digest(sources)}")


def run(trial: Trial, command: Sequence[str] = _CHILD, seconds: float = SECONDS) -> Verdict:
    """Have a child process make the trial, and end it after some seconds."""
    # Kernels run natively: else a verdict, which is kept, would be about Triton's interpreter.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths, own = [str(Path(path).absolute()) for path in sys.path], str(_PACKAGE.parent)
    paths = paths if own in paths else [own, *paths]  # torch.hub takes it away after the import
    try:
        asked = base64.b64encode(pickle.dumps(trial)).decode()
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=kept | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a compiler that the child has started ends with it
        )
    except (OSError, pickle.PicklingError, AttributeError, TypeError) as error:
        return Verdict(f"its trial cannot be started: {error}", lasting=False)
    try:
        output, errors = child.communicate(asked, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Verdict(f"its trial has not ended after {seconds:g} seconds")
    finally:
        if child.poll() is None:
            _end(child)
    return _verdict(child.returncode, output, errors)


def _end(child: subprocess.Popen[str]) -> None:
    """End a process; on POSIX systems also all that it has started.

    Do not wait for long: a driver that waits for its GPU may keep a process that was killed.
    """
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(SECONDS_TO_END)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            pipe.close()


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


def main() -> None:
    """The child process: make the trial that standard input asks for."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = pickle.loads(base64.b64decode(sys.stdin.read()))  # from the parent alone
    print(json.dumps(asdict(attempt(asked))))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: else a killed parent would leave the GPU busy."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def attempt(trial: Trial) -> Verdict:
    """Make a trial in this process."""
    device, dtype = torch.device(trial.device), getattr(torch, trial.dtype)
    try:
        watch = MemoryWatch(device)
        model = _generated(trial).to(device)
    except Exception as error:  # the device cannot be used, which says nothing about the network
        return Verdict(describe(error), lasting=False)
    try:
        network: Callable[[Tensor], Tensor] = functools.partial(plain_logits, model, dtype)
        if trial.network != "plain":
            network = fused = fuse(model, dtype=dtype)
            fused.choose_by("fastest" if trial.network == "fastest" else "auto")
        _run_windows(network, trial)
        return Verdict(disagreement(network, model, dtype))
    except Exception as error:  # whatever a kernel that does not compile or launch raises
        lasting = not watch.explains(error)
        return Verdict(describe(error), lasting)


@torch.inference_mode()
def _run_windows(network: Callable[[Tensor], Tensor], trial: Trial) -> None:
    """Run all windows of a usual image, so that this process measures their kernels.

    If memory runs out, run half as many at once, as ``Predictor`` does.
    """
    device = torch.device(trial.device)
    windows = trial.windows
    while windows:
        watch = MemoryWatch(device)
        try:
            network(torch.randn(windows, 3, trial.height, trial.width, device=device))
            return
        except Exception as error:
            if not watch.explains(error):
                raise
        windows //= 2


def _generated(trial: Trial) -> Network:
    """A model whose batch norms have the statistics of noise: activations keep their size."""
    torch.manual_seed(0)
    protocol = Protocol((trial.width, trial.height))
    model = trial.kind(trial.architecture, protocol, trial.num_classes)
    for attention in attentions(model):
        attention.backend = "torch"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # then one batch determines the statistics
    with torch.no_grad():
        model(torch.randn(2, 3, 129, 129))
    for attention in attentions(model):
        attention.backend = trial.backend
    return model.eval()


def disagreement(
    network: Callable[[Tensor], Tensor], model: Network, dtype: torch.dtype
) -> str | None:
    """What is wrong with a network's logits for noise of the protocol's size, or ``None``.

    The logits of a third call are compared with ``model.reference_logits``, in float64 if possible.
    In half precision the network's error may be twice the error of the same operations under
    autocast. If memory runs out, since the reference needs more of it than the network, the noise
    has half the height and width.

    Args:
        network: float32 [1, 3, H, W] on the model's device → logits.
        model: has the network's weights, in float32.
        dtype: in which the network computes.
    """
    device = next(model.parameters()).device
    size = _input_size(model.protocol)
    while True:
        watch = MemoryWatch(device)
        try:
            return _disagreement(network, model, dtype, size)
        except Exception as error:
            if min(size) < 2 * _LEAST_SIDE or not watch.explains(error):
                raise
        size = size[0] // 2, size[1] // 2


@torch.inference_mode()
def _disagreement(
    network: Callable[[Tensor], Tensor], model: Network, dtype: torch.dtype, size: tuple[int, int]
) -> str | None:
    """``disagreement`` for noise of one (height, width)."""
    device = next(model.parameters()).device
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(1, 3, *size, generator=generator, dtype=torch.float32, device="cpu")
    images = noise.to(device)
    with torch.autocast(device.type, enabled=False), cuda_fp32("ieee"):
        want = _wide_logits(model, images)
        for _ in range(_UNTAPED):
            network(images.flip(3))  # other numbers: a network may not repeat an earlier result
        error = _relative_error(network(images), want)
    bound = FP32_ERROR
    if dtype != torch.float32:
        with torch.autocast(device.type, dtype):
            bound = 2 * _relative_error(model.reference_logits(images), want) + HALF_ERROR
    return None if error <= bound else f"relative error {error:.1e}, expected at most {bound:.1e}"


def plain_logits(model: Network, dtype: torch.dtype, images: Tensor) -> Tensor:
    """The logits of a model that an evaluation does not fuse: half precision by autocast."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return model(images)


def _input_size(protocol: Protocol) -> tuple[int, int]:
    """(height, width) of the network's inputs for an image of the protocol's base scale."""
    return protocol.crop or _usual_size(protocol)


def _usual_size(protocol: Protocol) -> tuple[int, int]:
    """(height, width) of an image of the protocol's base scale."""
    width, height = protocol.base_scale or _USUAL_SCALE
    return height, width


def _wide_logits(model: Network, images: Tensor) -> Tensor:
    """The reference in float64; in float32 where memory or an engine for float64 is missing."""
    try:
        return copy.deepcopy(model).double().reference_logits(images.double())
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or is_refused(error)):
            raise
    return model.reference_logits(images).double()


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``; NaN if ``got`` has NaN."""
    return ((got.double() - want).norm() / want.norm()).item()
