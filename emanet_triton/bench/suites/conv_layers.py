"""The convolutions that the fused network runs, and how often it runs each."""

from collections import Counter
from dataclasses import dataclass

from emanet_triton.bench.cost import ConvShape, Cost
from emanet_triton.bench.networks import MODES, NETWORKS
from emanet_triton.bench.options import Selection
from emanet_triton.bench.walk import OperatorCall, recorded, walk
from emanet_triton.inference.views import Size
from emanet_triton.kernels.conv.op import conv_bias_act
from emanet_triton.kernels.conv.tiles import why_not_boxes
from emanet_triton.kernels.device import DTYPE_NAMES


@dataclass(frozen=True)
class Layer:
    """One convolution with what follows it.

    Attributes:
        shape: its sizes and dtypes.
        pitch: channels from a pixel of its residual to the next pixel; more than its outputs if
            the residual is a part of a larger tensor. 0 without a residual.
    """

    shape: ConvShape
    pitch: int = 0

    def __str__(self) -> str:
        s = self.shape
        words = [
            f"{s.kernel}x{s.kernel} C={s.channels} O={s.outputs} H={s.height} W={s.width}",
            f"stride={s.stride} dilation={s.dilation}",
        ]
        if s.residual:
            other = "" if s.residual == s.dtype else f"={DTYPE_NAMES[s.residual]}"
            words.append(f"residual{other}")
        words += [f"pitch={self.pitch}"] if self.pitch not in (0, s.outputs) else []
        words += ["relu"] if s.relu else []
        words += [f"out={DTYPE_NAMES[s.out_dtype]}"] if s.out_dtype != s.dtype else []
        return " ".join([*words, f"B={s.batch}", DTYPE_NAMES[s.dtype]])

    @property
    def one_dtype(self) -> bool:
        """Whether residual and output have the input's dtype."""
        return {self.shape.residual or self.shape.dtype, self.shape.out_dtype} == {self.shape.dtype}

    def why_not_boxes(self, arch: str) -> str | None:
        """What ``conv_boxes`` needs and does not get on an architecture; None if it can run."""
        s = self.shape
        return why_not_boxes(arch, DTYPE_NAMES[s.dtype], s.channels, s.outputs, s.stride)

    def floor(self) -> Cost:
        """Every tensor moved once, every product computed once."""
        return Cost(self.shape.bytes, self.shape.flops)


def walks(
    selection: Selection, size: Size, batch: int, dtype: str
) -> dict[str, Counter[OperatorCall]]:
    """The operator calls of each network, "r50-whole" and so on, for images of (height, width).

    The sliding window is left out on a CPU: there its windows run one by one, and its layers are
    those of the whole image at another size.
    """
    modes = MODES if selection.cuda and not selection.tiny else ("whole",)
    return {
        f"{network}-{mode}": walk(
            network, mode, size, batch, dtype, tiny=selection.tiny, merged=not selection.cuda
        )
        for network in NETWORKS
        for mode in modes
    }


def layers(calls: Counter[OperatorCall]) -> Counter[Layer]:
    """The convolutions of the calls. ``expand_reduce`` counts as two convolutions."""
    found: Counter[Layer] = Counter()
    for call, count in calls.items():
        for convolution in convolutions_of(call):
            found[layer_of(convolution)] += count
    return found


def convolutions_of(call: OperatorCall) -> list[OperatorCall]:
    """A convolution itself, the two convolutions of ``expand_reduce``, or none for another call."""
    if call.name != "expand_reduce":
        return [call] if call.name == "conv_bias_act" else []
    x, weights, biases, residual, *_ = call.values()

    def run() -> None:
        out = conv_bias_act(x, weights[0], biases[0], residual)
        conv_bias_act(out, weights[1], biases[1])

    return recorded(run)


def layer_of(call: OperatorCall) -> Layer:
    """What a convolution computes."""
    weight, residual = call["weight"], call["residual"]
    batch, channels, height, width = call["x"].shape
    outputs, _, kernel, _ = weight.shape
    added = None if residual is None else residual.dtype
    sizes = batch, channels, height, width, outputs, kernel, call["stride"], call["dilation"]
    shape = ConvShape(*sizes, weight.dtype, added, call["out_dtype"], call["relu"])
    return Layer(shape, 0 if residual is None else residual.stride[3])
