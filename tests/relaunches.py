"""Launch kernels again and again by a fake driver: say what ran, and when Triton searched.

    python tests/relaunches.py [--times CSV]

Run as a process of its own, since it needs Triton's compiler in place of the interpreter. It
prints JSON: the name of each scene below, and what it returns. With ``--times`` it prints nothing
and writes the times of the operators to a file.
"""

import argparse
import csv
import datetime
import functools
import itertools
import json
import statistics
import sys
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton.language as tl
from fake_driver import SMALL, At, Gpu, searches
from triton import knobs
from triton.runtime.jit import JITFunction

from emanet_triton import create_model
from emanet_triton.kernels import launch, pixels, relaunch, tape
from emanet_triton.kernels.conv import expand_reduce, hopper, implicit_gemm
from emanet_triton.kernels.conv import op as conv_op
from emanet_triton.kernels.device import cpu_name
from emanet_triton.kernels.em import attention, block
from emanet_triton.kernels.em import op as em_op
from emanet_triton.kernels.pool import max_pool
from emanet_triton.kernels.pool import op as pool_op
from emanet_triton.kernels.resample import gather
from emanet_triton.kernels.tile import Tile
from emanet_triton.models import fused
from emanet_triton.versions import commit

CPU = torch.device("cpu")
TILE = Tile("scale", "sm_90", "fp32", {"BLOCK": 128}, 4, 1)


@triton.jit
def scale(x_ptr, y_ptr, out_ptr, n, factor, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor * x + y"""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_out = tl.load(x_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32) * factor
    if HAS_Y:
        b_out += tl.load(y_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_n, b_out.to(out_ptr.dtype.element_ty), mask=o_n < n)


GPU = Gpu()
X = torch.ones(256)
OUT = torch.ones(256)


@tape.taped
def scaled(x, y, out, n, factor, has_y):
    launch.launch(scale, TILE, CPU, 2, x, y, out, n, factor, HAS_Y=has_y)
    return out


def launch_scale(x=X, y=X, out=OUT, n=200, factor=0.5, constant: int | None = None) -> None:
    scaled(x, y, out, n, factor, y is not None if constant is None else constant)


def repeated() -> dict:
    """Triton searches at the first call and at the second, which makes the tape."""
    counts = [searches(launch_scale) for _ in range(2)]
    GPU.stream = 5
    counts.append(searches(launch_scale))
    GPU.stream = 0
    first, *others = GPU.launches[-3:]
    return {
        "searches": counts, "same": [all(first[i] == o[i] for o in others) for i in (0, 1, 3)],
        "streams": [launched[2] for launched in (first, *others)],
        "arguments": [arguments[:5] for *_, arguments in (first, *others)]
        == [[*(t.data_ptr() for t in (X, X, OUT)), 200, 0.5]] * 3,
    }  # fmt: skip


VARIATIONS: dict[str, dict] = {
    "an unaligned pointer": {"x": X[1:]},
    "another unaligned pointer": {"out": OUT[1:]},
    "1": {"n": 1},
    "a multiple of 16": {"n": 192},
    "64 bits": {"n": 2**31 + 1},
    "64 bits, a multiple of 16": {"n": 2**32},
    "no tensor": {"y": None},
    "another dtype": {"x": X.half()},
    "an integer as factor": {"factor": 2},
    "1 as factor": {"factor": 1},
    "a constant": {"constant": False},
}


def varied() -> dict:
    """For each variation of a usual launch: searches of three, and their kernels and Triton's."""
    found = {}
    launch_scale()
    usual = GPU.launches[-1][3]
    for name, variation in VARIATIONS.items():
        counts = [searches(lambda v=variation: launch_scale(**v)) for _ in range(3)]
        kernels = [function for *_, function, _ in GPU.launches[-3:]]
        scale[(2,)](*_arguments(**variation), **TILE.keywords())
        kernels.append(GPU.launches[-1][3])
        found[name] = {"searches": counts, "kernels": kernels, "usual": usual}
    return found


def _arguments(x=X, y=X, out=OUT, n=200, factor=0.5, constant=None) -> tuple:
    return x, y, out, n, factor, y is not None if constant is None else constant


def on_another_device() -> dict:
    launch_scale()
    GPU.device = 3
    counts = [searches(launch_scale) for _ in range(3)]
    GPU.device = 0
    return {"searches": counts, "kernels": [launch[3] for launch in GPU.launches[-4:]]}


def watched() -> dict:
    """A launch that somebody watches is Triton's own, and the watcher sees it."""
    seen: list[str] = []
    counts = {}
    launch_scale()
    runtime = knobs.runtime
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(runtime, name)
        note = lambda metadata, name=name: seen.append(f"{name} {metadata.get()['name']}")  # noqa: E731
        hook.add(note)
        counts[name] = searches(launch_scale)
        hook.remove(note)
    scale.add_pre_run_hook(lambda *_, **__: seen.append("pre_run_hook"))
    counts["pre_run_hook"] = searches(launch_scale)
    scale.pre_run_hooks.clear()
    run = JITFunction.run
    JITFunction.run = lambda self, *_, **__: seen.append(f"run {self.__name__}")
    launch_scale()
    JITFunction.run = run
    runtime.debug = True
    counts["debug"] = searches(launch_scale)
    runtime.debug = False
    return {"seen": seen, "searches": counts, "afterwards": searches(launch_scale)}


def unknown() -> list[int]:
    """An argument of an unknown type takes Triton's own way, each time."""
    launch_scale()
    wrapped = triton.reinterpret(X, tl.float32)
    return [searches(lambda: launch_scale(x=wrapped)) for _ in range(4)]


def without_memory() -> list[str]:
    GPU.device = SMALL
    raised = []
    for _ in range(2):
        try:
            launch_scale()
        except triton.OutOfResources as error:
            raised.append(str(error))
    GPU.device = 0
    return raised


def from_threads() -> bool:
    """Whether each launch of many threads gets the kernel of its own arguments."""
    sizes = [1, 16, 17, 160, 161, 2**31, 2**31 + 1]
    of_size = {}
    for n in sizes:
        launch_scale(n=n)
        of_size[n] = GPU.launches[-1][3]
    launches = len(GPU.launches)
    tape.MOST_TAPES, before = 3, tape.MOST_TAPES  # so that tapes are forgotten meanwhile
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: launch_scale(n=n), sizes * 100))
    tape.MOST_TAPES = before
    new = GPU.launches[launches:]
    return len(new) >= 100 * len(sizes) and all(
        function == of_size[arguments[3]] for *_, function, arguments in new
    )


class Call:
    """A call of a launcher, or of an operator."""

    def __init__(self, operator: Callable, *arguments: object) -> None:
        self.operator, self.arguments = operator, arguments
        lists = [a if isinstance(a, list) else [a] for a in arguments]
        self._inputs = [a for a in itertools.chain(*lists) if isinstance(a, torch.Tensor)]

    def __call__(self) -> object:
        return self.operator(*self.arguments)

    def with_other_tensors(self) -> "Call":
        """The same with other tensors of the same traits."""

        def other(value: object) -> object:
            if isinstance(value, list):
                return [other(v) for v in value]
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

        return Call(self.operator, *map(other, self.arguments))

    def launched(self) -> tuple[int, list, list]:
        """Make the call: Triton's searches, its launches, and what it returned.

        In place of an address there is the number of an argument, or after these the number of a
        tensor that was made.
        """
        first = len(GPU.launches)
        numbers = {tensor.data_ptr(): i for i, tensor in enumerate(self._inputs)}

        def shown(value: object) -> object:
            if isinstance(value, (list, tuple)):
                return [shown(v) for v in value]
            if type(value) is At:
                return f"tensor {numbers.setdefault(value, len(numbers))}"
            return value

        found: list[object] = []
        count = searches(lambda: found.append(self()))
        launches = [(*r[:4], shown(r[4])) for r in GPU.launches[first:]]
        GPU.kept.clear()
        outputs = found[0] if isinstance(found[0], tuple) else (found[0],)
        layouts = [
            (shown(At(t.data_ptr())), [*t.shape], t.stride(), str(t.dtype))
            for t in outputs if t is not None
        ]  # fmt: skip
        return count, launches, layouts


def labels_of(logits, rows, row_weights, columns, column_weights, probabilities):
    tables = rows, row_weights, columns, column_weights
    return gather.resample(logits, tables, average="logits", probabilities=probabilities)


def calls() -> dict[str, Call]:
    """Calls of the launchers, and of two operators, which check their arguments."""
    torch.manual_seed(0)
    # On a CPU the operators let only the interpreter run their kernels.
    implicit_gemm.INTERPRETED = block.INTERPRETED = True
    x, bases = torch.rand(1, 300, 64), torch.rand(1, 64, 8)
    small = [torch.rand(*shape) for shape in ((64, 64), (64,)) * 2]
    image, wide = (torch.rand(1, 8, 16, c).half().permute(0, 3, 1, 2) for c in (64, 256))
    weights = [torch.rand(*shape, 1, 1).half() for shape in ((256, 64), (64, 256))]
    biases = [torch.rand(len(w)).half() for w in weights]
    half = torch.rand(1, 300, 512).half(), torch.rand(1, 512, 8).half()
    large = [torch.rand(*shape).half() for shape in ((512, 512), (512,)) * 2]
    layer_of = image, weights[0], biases[0], wide, 1, 1, True, torch.float16, "ieee"
    index, weight_of_taps = torch.zeros(1, 2, 40, dtype=torch.int32), torch.ones(1, 2, 40)
    tables, logits = (index, weight_of_taps, index + 1, weight_of_taps + 1), torch.rand(1, 19, 60)
    classes, means = torch.zeros(100, dtype=torch.uint8), (1.25, 2.25, 3.25)
    contiguous = image.contiguous(), torch.rand(64, 64, 3, 3).half(), *layer_of[2:3]
    convolve = functools.partial(conv_op.conv_bias_act, backend="triton")
    em_block = functools.partial(em_op.em_attention_block, backend="triton", precision="tf32")
    lower, others = (image[..., :7, :], wide[..., :7, :]), torch.rand(1, 301, 64)
    return {
        "operator conv_bias_act": Call(convolve, lower[0], *layer_of[1:3], lower[1]),
        "operator em_attention_block": Call(em_block, others, bases, *small),
        "conv_bias_act": Call(implicit_gemm.conv_bias_act, *layer_of),
        "conv_bias_act_of_copies": Call(
            implicit_gemm.conv_bias_act, *contiguous, None, 2, 1, True, torch.float32, "ieee"
        ),
        "conv_bias_act_in_gluon": Call(hopper.conv_bias_act, *layer_of),
        "expand_reduce": Call(expand_reduce.expand_reduce, image, weights, biases, wide),
        "max_pool": Call(max_pool.max_pool, image),
        "labels": Call(labels_of, logits, *tables, False),
        "probabilities": Call(labels_of, logits, *tables, True),
        "counts": Call(gather.confusion, classes, classes.flip(0), 19),
        "pixels": Call(
            pixels.normalise,
            torch.ones(1, 4, 6, 3, dtype=torch.uint8),
            means,
            [1.5, 2.5, 3.5],
            torch.float16,
        ),
        "em_attention": Call(attention.run_attention, x, bases, 3, 0.0, "tf32"),
        "em_attention_in_one_pass": Call(attention.run_attention, *half, 2, 0.0, "ieee", 16),
        "em_attention_block": Call(block.run_block, x, bases, *small, 3, 0.0, False, "tf32"),
        "em_attention_block_in_one_pass": Call(
            block.run_block, *half, *large, 3, 0.0, False, "ieee", 16
        ),
    }


def operators() -> dict:
    """Each of ``calls``: three times, and a fourth time with other tensors.

    The second call makes a tape, the third and the fourth play it. Times are medians of one call,
    with a driver that does nothing but what Triton's own does to tensor descriptors.
    """
    found = {}
    for name, call in calls().items():
        runs = [call.launched() for _ in range(3)] + [call.with_other_tensors().launched()]
        counts, launches, outputs = zip(*runs, strict=True)
        found[name] = {
            "kernels": [launched[0] for launched in launches[0]],
            "same": all(run == launches[0] for run in launches),
            "same_outputs": all(run == outputs[0] for run in outputs),
            "searches": counts,
            "microseconds": _times(call),
        }
    return found


def _times(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of the host: by Triton at every launch, and by a tape."""
    times, GPU.notes = {}, False
    for way in ("triton", "tape"):
        relaunch.has_fast_way = lambda device, way=way: way == "tape"
        each = timeit.repeat(call, number=1, repeat=201)
        times[f"{way}_us"] = round(1e6 * statistics.median(each), 1)
    GPU.notes = True
    return times


def network() -> dict:
    """The fused R50 in float16, with every convolution by Triton, as if the CPU were a GPU."""
    max_pool.INTERPRETED = implicit_gemm.INTERPRETED = block.INTERPRETED = True
    fused.takes_winograd = fused.has_onednn = lambda _: False
    fused.onednn.conv_bias_act_ = functools.partial(conv_op.conv_bias_act, backend="triton")
    fused.F.max_pool2d = lambda x, *_, **__: pool_op.max_pool(x, backend="triton")
    model = create_model("emanet_r50-d8_769x769_80k_cityscapes").eval()
    found = fused.fuse(model, dtype=torch.float16)
    found.decode_head.backend = "triton"
    (shared,) = (layer for layer in found.modules() if isinstance(layer, fused.SharedConv))
    shared.merged = False
    images = torch.rand(1, 64, 128, 3).half().permute(0, 3, 1, 2)
    with torch.inference_mode():
        found(images)
        first = len(GPU.launches)
        found(images)
        kernels = [launched[0] for launched in GPU.launches[first:]]
        GPU.kept.clear()
        return {"kernels": kernels, "microseconds": _times(lambda: found(images))}


def write_times(path: Path) -> None:
    """A row for each of ``calls`` and for R50: the host's microseconds, and where and with what."""
    taken_with = {
        "device": cpu_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    rows = [
        {"operator": name, "launches": len(found["kernels"]), **found["microseconds"], **taken_with}
        for name, found in {**operators(), "fused R50": network()}.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--times", metavar="CSV", type=Path)
    path = parser.parse_args().times
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(GPU)
    relaunch.has_fast_way = lambda device: True
    if path:
        write_times(path)
        return
    scenes = (
        repeated, varied, on_another_device, watched, unknown, without_memory, from_threads,
        operators,
    )  # fmt: skip
    json.dump({scene.__name__: scene() for scene in scenes}, sys.stdout)


if __name__ == "__main__":
    main()
