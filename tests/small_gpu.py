"""Launch the operators' kernels on a pretended GPU of little shared memory, and say what ran.

    python tests/small_gpu.py BYTES

Run as a process of its own, since it needs Triton's compiler in place of the interpreter. It
prints, as JSON, the bytes of shared memory of every launch, by kernel, and the warnings.
"""

import json
import sys
import warnings
from types import SimpleNamespace

import torch
import triton

from emanet_triton.bench.ahead_of_time import gates as compiled
from emanet_triton.bench.ahead_of_time.launches import ConvLaunch, EMLaunch, ExpandReduceLaunch

ROWS = (1, 512, 128, 256, 512, 3, 1, 1, True, None, None)
POINTERS = (2, 512, 97, 97, 512, 3, 1, 4, True, None, None)
TAPS = (1, 3, 1024, 2048, 32, 3, 2, 1, False, None, None)
LAUNCHES = (
    EMLaunch("sm_90", "bf16", "ieee", "em_attention_block", 512, 64),
    ConvLaunch("sm_90", "bf16", "ieee", ROWS),
    ConvLaunch("sm_90", "bf16", "ieee", POINTERS),
    ConvLaunch("sm_90", "bf16", "ieee", TAPS),
    ExpandReduceLaunch("sm_90", "bf16", 256, 256),
)


class SmallGpu(compiled.Compiler):
    """A driver that accepts the kernels that fit, and launches nothing."""

    def __init__(self, arch: str, shared: int) -> None:
        super().__init__(arch)
        self.launched: dict[str, list[int]] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
        )

    def launcher_cls(self, source, metadata):
        def run(*_):
            self.launched.setdefault(metadata.name, []).append(metadata.shared)

        return run


def main() -> None:
    gpu = SmallGpu("sm_90", int(sys.argv[1]))
    triton.runtime.driver.set_active(gpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for launch in LAUNCHES:
            launch.run()
            launch.run()
    assert not torch.cuda.is_initialized()
    json.dump([gpu.launched, [str(warning.message) for warning in caught]], sys.stdout)


if __name__ == "__main__":
    main()
