"""What all operators have in common: reloads, empty batches, bfloat16 in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from device import DEVICE, NATIVE

from emanet_triton.kernels.conv import onednn as conv_cpu
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.conv import winograd
from emanet_triton.kernels.em import op as ops
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.resample import op as resample
from emanet_triton.kernels.resample.op import Taps

MODULES = (
    "conv.op", "conv.expand_reduce", "conv.onednn", "conv.winograd", "em.op", "pool.op",
    "resample.op",
)  # fmt: skip
RELOAD = """
import importlib, sys
import torch
from torch import nn
import emanet_triton
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

def logits(package):
    torch.manual_seed(0)
    emanet = sys.modules["emanet_triton.models.emanet"]
    sizes = emanet.Architecture((1, 1, 1, 1), 8, 16, 4, head_channels=8)
    return package.fuse(emanet.EMANet(sizes, Protocol((64, 32))).eval())(torch.ones(1, 3, 16, 24))

want = logits(emanet_triton)
"""
RELOADS = {
    "a module": """
for _ in range(2):
    for name in {modules}:
        importlib.reload(importlib.import_module("emanet_triton.kernels." + name))
""",
    # In sys.modules a module comes after those that it imports.
    "all modules": """
for _ in range(3):
    for name in [name for name in sys.modules if name.startswith("emanet_triton")]:
        importlib.reload(sys.modules[name])
""",
    "a new import": """
old = emanet_triton
for name in [name for name in sys.modules if name.startswith("emanet_triton")]:
    del sys.modules[name]
import emanet_triton
from emanet_triton.models.protocol import Protocol
assert emanet_triton is not old
""",
}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("reload", RELOADS.values(), ids=RELOADS)
def test_a_reload_registers_the_operators_anew(reload):
    reload = reload.format(modules=MODULES)
    code = f"{RELOAD}{reload}assert torch.equal(logits(emanet_triton), want)"
    assert run_python(code) == ""


def test_of_an_empty_batch_nothing_is_computed_and_the_last_registration_holds():
    def run(factor: int):
        def multiply(x: torch.Tensor) -> torch.Tensor:
            return factor * x

        return multiply

    def computes_nothing(x):
        return x.new_empty(x.shape[0], 7)

    for factor in (2, 3):
        register("a test", Operator("toy", run(factor), computes_nothing))
    try:
        toy = torch.ops.emanet_triton.toy
        assert toy(torch.ones(2)).tolist() == [3, 3]
        assert toy(torch.ones(0, 4)).shape == (0, 7)
    finally:
        vars(torch.ops.emanet_triton)["libraries"].pop("a test")._destroy()


ITERATION = "int num_stages, float norm_shift"
HOW = "str backend, str precision"
WEIGHTS = "Tensor mid_weight, Tensor mid_bias, Tensor out_weight, Tensor out_bias"
CONVOLUTION = "Tensor x, Tensor weight, Tensor bias"
TAPS = "Tensor row_index, Tensor row_weight, Tensor column_index, Tensor column_weight"


@pytest.mark.parametrize(
    "schema",
    [
        f"em_attention(Tensor feats, Tensor bases, {ITERATION}, {HOW}) -> (Tensor, Tensor)",
        "em_attention_block(Tensor feats, Tensor bases, "
        f"{WEIGHTS}, {ITERATION}, bool out_relu, {HOW}) -> (Tensor, Tensor)",
        f"conv_bias_act({CONVOLUTION}, Tensor? residual, int stride, int dilation, bool relu, "
        "ScalarType out_dtype, str backend, str precision) -> Tensor",
        "expand_reduce(Tensor x, Tensor[] weights, Tensor[] biases, Tensor residual, "
        "str backend, str precision) -> (Tensor, Tensor)",
        f"conv_cpu({CONVOLUTION}, int stride, int dilation, bool relu) -> Tensor",
        f"conv_cpu_add_(Tensor(a0!) residual, {CONVOLUTION}, int stride, int dilation, bool relu)"
        " -> ()",
        f"winograd_conv({CONVOLUTION}, Tensor? residual, int dilation, bool relu, "
        "ScalarType out_dtype) -> Tensor",
        "max_pool(Tensor x, str backend) -> Tensor",
        f"resample_labels(Tensor logits, {TAPS}, str average, str backend) -> Tensor",
        f"resample_probabilities(Tensor logits, {TAPS}, str average, str backend) "
        "-> (Tensor, Tensor)",
        "confusion_counts(Tensor targets, Tensor labels, int num_classes, str backend) -> Tensor",
    ],
    ids=lambda schema: schema.partition("(")[0],
)
def test_schemas(schema):
    operator = getattr(torch.ops.emanet_triton, schema.partition("(")[0])
    assert str(operator.default._schema) == f"emanet_triton::{schema}"


def taps() -> Taps:
    index = torch.zeros(1, 1, 2, dtype=torch.int32, device=DEVICE)
    return Taps(index, torch.ones(1, 1, 2, device=DEVICE))


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.full(shape, 0.1, device=DEVICE, dtype=dtype) for shape in shapes]


def em_block(batch: int, dtype: torch.dtype, **how):
    arguments = tensors(
        (batch, 64, 2, 3), (1, 64, 4), (64, 64), (64,), (64, 64), (64,), dtype=dtype
    )
    return ops.em_attention_block(*arguments, **how)


def expand_reduce(batch: int, dtype: torch.dtype, **how):
    shapes = (batch, 64, 2, 3), (128, 64, 1, 1), (64, 128, 1, 1), (128,), (64,), (batch, 128, 2, 3)
    x, expand, reduce, *biases, residual = tensors(*shapes, dtype=dtype)
    return conv.expand_reduce(x, [expand, reduce], biases, residual, **how)


def convolution(function, batch: int, dtype: torch.dtype, **how):
    shapes = (batch, 64, 2, 3), (8, 64, 3, 3), (8,), (batch, 8, 2, 3)
    return function(*tensors(*shapes, dtype=dtype), **how)


# Each with a batch, a dtype and how it runs.
WITH_TRITON = {
    "em_attention": lambda batch, dtype, **how: ops.em_attention(
        *tensors((batch, 64, 2, 3), (1, 64, 4), dtype=dtype), **how
    ),
    "em_attention_block": em_block,
    "conv_bias_act": lambda *given, **how: convolution(conv.conv_bias_act, *given, **how),
    "expand_reduce": expand_reduce,
    "max_pool": lambda batch, dtype, **how: max_pool(
        *tensors((batch, 8, 4, 5), dtype=dtype), **how
    ),
    "resample_labels": lambda batch, dtype, **how: resample.resample_labels(
        *tensors((batch, 19, 1), dtype=dtype), taps(), taps(), **how
    ),
    "resample_probabilities": lambda batch, dtype, **how: resample.resample_probabilities(
        *tensors((batch, 19, 1), dtype=dtype), taps(), taps(), **how
    ),
}
ON_A_CPU = {"conv_cpu": lambda *given: convolution(conv_cpu.conv_bias_act_, *given)}
OPERATORS = WITH_TRITON | {
    "winograd_conv": lambda *given: convolution(winograd.winograd_conv, *given),
}
OPERATORS |= {} if NATIVE else ON_A_CPU
SHAPES = {
    "em_attention": [(64, 2, 3), (64, 4)],
    "em_attention_block": [(64, 2, 3), (64, 4)],
    "expand_reduce": [(128, 2, 3), (64, 2, 3)],
    "resample_labels": [(2, 2)],
    "resample_probabilities": [(2, 2), (19, 2, 2)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_empty_batch_passes(name):
    results = OPERATORS[name](0, torch.float32)
    results = results if isinstance(results, tuple) else (results,)
    wanted = SHAPES.get(name, [(8, 2, 3)])
    assert [tuple(result.shape) for result in results] == [(0, *shape) for shape in wanted]


def test_no_pixels_are_counted_as_none():
    nothing = torch.empty(0, 3, dtype=torch.uint8, device=DEVICE)
    assert resample.confusion_counts(nothing, nothing, 2).tolist() == [0] * 5


@pytest.mark.skipif(NATIVE, reason="bfloat16 is right on a GPU")
@pytest.mark.parametrize("name", WITH_TRITON)
def test_bfloat16_is_refused_in_the_interpreter(name):
    message = (
        "backend 'triton' is wrong for bfloat16 in Triton's interpreter; take another backend "
        "or dtype, or unset TRITON_INTERPRET on a GPU"
    )
    with pytest.raises(ValueError) as raised:
        WITH_TRITON[name](1, torch.bfloat16, backend="triton")
    assert str(raised.value) == message
    WITH_TRITON[name](1, torch.float16, backend="triton")
