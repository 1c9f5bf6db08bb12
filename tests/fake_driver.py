"""A driver without a GPU: Triton compiles for an H100, and the driver notes each launch."""

import inspect
import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace

from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from emanet_triton.bench.ahead_of_time.gates import Compiler

SMALL = 6  # a device that has no memory for any kernel
# What newer versions of Triton ask for, too.
OTHERS = [None] * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)


class At(int):
    """An address."""


class Gpu(Compiler):
    """A driver that notes the launches, each with the number of the loaded kernel."""

    def __init__(self) -> None:
        super().__init__("sm_90")
        self.launches: list[tuple] = []
        self.notes = True  # else a launch costs little time
        self.kept: list[tuple] = []  # arguments: no other tensor gets the address of one of these
        self.device, self.stream = 0, 0
        numbers = itertools.count()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": -1 if device == SMALL else 232_448
            },
            load_binary=lambda *_: (object(), next(numbers), 0, 0, 1024),
            unload_module=lambda module: None,
            fill_tma_descriptor=fill,  # Triton 3.6; later ones:
            fill_tma_descriptor_tiled=fill,
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source, metadata):
        kinds = [str(kind) for kind in source.signature.values()]
        pointers = [i for i, kind in enumerate(kinds) if kind.startswith("*")]
        boxes = [i for i, kind in enumerate(kinds) if kind.startswith("tensordesc")]
        described = [*zip(boxes, metadata.tensordesc_meta or itertools.repeat(None), strict=False)]

        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            given = list(arguments)
            for i, kind in described:
                given[i] = nvidia.make_tensordesc_arg(given[i], kind, *OTHERS)
            if self.notes:
                self.kept.append(arguments)
                for i in pointers:
                    given[i] = address_of(given[i])
                for i, _ in described:
                    given[i] = [address_of(a) if hasattr(a, "data_ptr") else a for a in given[i]]
                self.launches.append((metadata.name, (x, y, z), stream, function, given))

        return run


def fill(address: int, *fields: object) -> tuple:
    """In the place of the function that makes a descriptor for the GPU."""
    return At(address), *fields


def address_of(argument: object) -> At | None:
    """What Triton's own driver gives to a kernel for a tensor, or for what stands for one."""
    if argument is None:
        return None
    return At(argument.data_ptr() if hasattr(argument, "data_ptr") else argument)


def searches(call: Callable[[], object]) -> int:
    """How often Triton searches for a kernel."""
    count = 0
    code = JITFunction.run.__code__

    def watch(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code is code

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count
