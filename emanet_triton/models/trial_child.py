"""The child process of ``trial``: makes a network and says whether it works."""

import functools
import json
import os
import sys
import threading
import time
from dataclasses import asdict

import torch
from torch import nn

from emanet_triton.errors import describe
from emanet_triton.kernels.out_of_memory import MemoryWatch
from emanet_triton.models.agreement import disagreement, plain_logits
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.fused import fuse
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.trial import Trial, Verdict


def main() -> None:
    """Make the trial that is asked for on standard input."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = json.load(sys.stdin)
    sizes = asked["architecture"]
    architecture = Architecture(**sizes | {"blocks": tuple(sizes["blocks"])})
    print(json.dumps(asdict(attempt(Trial(**asked | {"architecture": architecture})))))


def attempt(trial: Trial) -> Verdict:
    """Make a trial in this process."""
    device, dtype = torch.device(trial.device), getattr(torch, trial.dtype)
    try:
        watch = MemoryWatch(device)
        model = _generated(trial).to(device)
    except Exception as error:  # the device cannot be used: nothing is learned of the network
        return Verdict(describe(error), lasting=False)
    try:
        plain = functools.partial(plain_logits, model, dtype)
        network = fuse(model, dtype=dtype) if trial.network == "fused" else plain
        return Verdict(disagreement(network, model, dtype))
    except Exception as error:  # whatever a kernel that does not compile or launch raises
        lasting = not watch.explains(error)
        return Verdict(describe(error), lasting)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, which may be killed: the GPU would stay busy."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _generated(trial: Trial) -> EMANet:
    """A model whose batch norms know the statistics of noise: activations keep their size."""
    torch.manual_seed(0)
    protocol = Protocol((trial.width, trial.height))
    model = EMANet(trial.architecture, protocol, trial.num_classes)
    model.decode_head.ema_module.backend = "torch"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the first batch alone
    with torch.no_grad():
        model(torch.randn(2, 3, 129, 129))
    model.decode_head.ema_module.backend = trial.backend
    return model.eval()


if __name__ == "__main__":
    main()
