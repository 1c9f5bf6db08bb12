"""Time the network's 3x3 convolutions on the CPU: PyTorch, oneDNN's fused ones, Winograd's.

    python benchmarks/conv_cpu.py --out benchmarks/results/conv_cpu.csv

``WINOGRAD_CHANNELS`` in emanet_triton/models/fused.py is read off these rows. Times are the
process's CPU time on one thread. The error is against float64, relative in norm; no time is
reported for a provider that fails its check.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import em_common
import em_cpu
import torch
from net_cpu import cpu_time, relative_error
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.conv import pack_weight
from emanet_triton.kernels.conv_cpu import conv_bias_act_
from emanet_triton.kernels.winograd import transform_weight, winograd_conv

# Name: input and output channels, height and width at 512x1024 pixels, dilation.
LAYERS = {
    "stem": (32, 64, 256, 512, 1),
    "layer1": (64, 64, 128, 256, 1),
    "layer2": (128, 128, 64, 128, 1),
    "layer3": (256, 256, 64, 128, 2),
    "layer4": (512, 512, 64, 128, 4),
    "head": (2048, 768, 64, 128, 1),
    "bottleneck": (512, 256, 64, 128, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_ERROR = {"fp32": 3e-6, "bf16": 2e-2}  # of any provider
RESULTS = Path(__file__).parent / "results" / "conv_cpu.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to write")
    options = parser.parse_args()

    torch.set_num_threads(1)
    where = em_common.environment(em_cpu.cpu_name())
    rows = []
    for dtype in DTYPES:
        for layer in options.layers:
            rows += [row | where for row in measure(layer, dtype, options.rounds)]
            em_common.write_rows(options.out, rows)
    columns = ["provider", "layer", "dtype", "p50_ms", "ratio", "error"]
    print(tabulate([[row[c] for c in columns] for row in rows], columns))


@torch.no_grad()
def measure(layer: str, dtype: str, rounds: int) -> list[dict]:
    """The rows of one layer and dtype."""
    calls, want = make_calls(layer, DTYPES[dtype])
    errors = {name: relative_error(call(), want) for name, call in calls.items()}
    if not max(errors.values()) <= MOST_ERROR[dtype]:
        raise SystemExit(f"error: a convolution is wrong, {layer} in {dtype}: {errors}")
    channels, outputs, height, width, dilation = LAYERS[layer]
    shape = {"C": channels, "O": outputs, "size": f"{height}x{width}", "dilation": dilation}
    times = em_common.alternate(calls, cpu_time, rounds)
    return [
        {"provider": name, "layer": layer, "dtype": dtype}
        | shape
        | em_common.summary(seconds, times["torch"])
        | {"error": f"{errors[name]:.1e}"}
        for name, seconds in times.items()
    ]


def make_calls(layer: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """The providers at work on a layer, each with ReLU, and what float64 gives."""
    channels, outputs, height, width, dilation = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, height, width, generator=generator).relu().to(dtype)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    weight, bias = weight.to(dtype), torch.zeros(outputs, dtype=dtype)
    x_nhwc, packed = x.contiguous(memory_format=torch.channels_last), pack_weight(weight)
    transformed = transform_weight(weight, dtype)
    geometry = {"padding": dilation, "dilation": dilation}
    want = F.conv2d(x.double(), weight.double(), **geometry).relu()
    return {
        "torch": lambda: F.conv2d(x, weight, bias, **geometry).relu_(),
        "onednn": lambda: conv_bias_act_(x_nhwc, packed, bias, dilation=dilation),
        "winograd": lambda: winograd_conv(x_nhwc, transformed, bias, dilation=dilation),
    }, want


if __name__ == "__main__":
    main()
