"""The operators as PyTorch sees them: registration, compile, export, choices and errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from em_cases import Case, channels_first, common_case
from torch import nn

from emanet_triton.kernels.em import reference
from emanet_triton.kernels.em.op import em_attention, em_attention_block

CASE = common_case(2)
BACKENDS = ("triton", "torch")


def arguments(case: Case = CASE, dtype: torch.dtype = torch.float32):
    return case.feats(dtype), case.initial_bases(dtype), *case.weights(dtype)


class Block(nn.Module):
    """Both operators on the same features."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        _, self.bases, *self.weights = arguments()

    def forward(self, feats):
        recon, _ = em_attention(feats, self.bases, 2, backend=self.backend)
        return (
            recon + em_attention_block(feats, self.bases, *self.weights, 2, backend=self.backend)[0]
        )


@pytest.mark.parametrize("layout", ["last", "first", "sliced"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, layout):
    feats, bases, *weights = arguments(common_case(2, layout))
    ops = torch.ops.emanet_triton
    torch.library.opcheck(ops.em_attention, (feats, bases, 2, 1e-6, backend, "ieee"))
    options = 2, 1e-6, False, backend, "ieee"
    torch.library.opcheck(ops.em_attention_block, (feats, bases, *weights, *options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_with_dynamic_sizes(backend):
    torch._dynamo.reset()
    model = Block(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, sizes in ((2, (9, 37)), (3, (13, 29)), (2, (37, 9))):
        feats = Case(batch, CASE.channels, sizes, CASE.bases, "nchw").feats(torch.float32)
        torch.testing.assert_close(compiled(feats), model(feats))


def test_inductor_with_channels_last_features():
    torch._dynamo.reset()
    model = Block("auto")
    feats = common_case(2, "channels_last").feats(torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(feats), model(feats))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_dynamic_batch_and_size(backend):
    model = Block(backend)
    feats = common_case(2, "nchw").feats(torch.float32)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (feats,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    other = Case(5, CASE.channels, (13, 29), CASE.bases, "nchw").feats(torch.float32)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_and_a_training_step_does_not_raise(backend):
    feats, bases, *weights = arguments()
    feats.requires_grad_()
    for out in (
        *em_attention(feats, bases, backend=backend),
        *em_attention_block(feats, bases, *weights, backend=backend),
    ):
        assert not out.requires_grad
    compiled = torch.compile(
        lambda x: (x + em_attention(x, bases, backend=backend)[0]).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(feats).backward()
    torch.testing.assert_close(feats.grad, torch.ones_like(feats))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["last", "nchw", "channels_last", "sliced", "cropped"])
def test_the_torch_backend_is_the_reference(layout, dtype):
    case = Case(2, 8, (3, 5), 3, layout)
    feats, bases, *weights = arguments(case, dtype)
    for operator, specification, inputs in (
        (em_attention, reference.em_attention, (bases,)),
        (em_attention_block, reference.em_attention_block, (bases, *weights)),
    ):
        got = operator(feats, *inputs, 2, backend="torch")
        want = specification(channels_first(feats), *inputs, 2)
        assert got[0].shape == feats.shape
        torch.testing.assert_close(channels_first(got[0]), want[0])
        torch.testing.assert_close(got[1], want[1])


def test_inputs_are_left_alone():
    before = arguments()
    after = arguments()
    em_attention_block(*after, backend="triton")
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


BAD = {
    "rank": ({"feats": torch.zeros(8, 5)}, r"feats must be \[B, C, H, W\] or \[B, N, C\], got \[8"),
    "no positions": (
        {"feats": torch.zeros(2, 8, 0, 3)},
        r"feats must have channels and positions, got \[2, 8, 0, 3\]",
    ),
    "too many channels": (
        {"feats": torch.zeros(1, 1, 2049)},
        "feats must have at most 2048 channels, got 2049",
    ),
    "dtype": (
        {"feats": torch.zeros(2, 5, 8, dtype=torch.float64)},
        "feats must be float32, float16 or bfloat16, got torch.float64",
    ),
    "channels": (
        {"feats": torch.zeros(2, 5, 9)},
        r"bases must be \[1 or 2, 9, K\], got \[1, 8, 3\]",
    ),
    "batch of bases": (
        {"bases": torch.zeros(3, 8, 3)},
        r"bases must be \[1 or 2, 8, K\], got \[3, 8, 3\]",
    ),
    "rank of bases": ({"bases": torch.zeros(8, 3)}, r"\[1 or 2, 8, K\], got \[8, 3\]"),
    "too many bases": (
        {"bases": torch.zeros(1, 8, 257)},
        "bases must be 1 to 256 in number, got 257",
    ),
    "no bases": ({"bases": torch.zeros(1, 8, 0)}, "bases must be 1 to 256 in number, got 0"),
    "dtype of bases": (
        {"bases": torch.zeros(1, 8, 3, dtype=torch.float16)},
        "^bases must be torch.float32, got torch.float16$",
    ),
    "dtype of bases beside half": (
        {"feats": torch.zeros(2, 5, 8).half(), "bases": torch.zeros(1, 8, 3).double()},
        "^bases must be torch.float16 or torch.float32, got torch.float64$",
    ),
    "no feats": ({"feats": None}, "^feats must be a tensor, got NoneType$"),
    "array": ({"bases": np.zeros((1, 8, 3))}, "^bases must be a tensor, got ndarray$"),
    "text as stages": ({"num_stages": "3"}, "^num_stages must be an int, got '3'$"),
    "fraction as stages": ({"num_stages": 2.0}, "^num_stages must be an int, got 2.0$"),
    "true as stages": ({"num_stages": True}, "^num_stages must be an int, got True$"),
    "device of bases": (
        {"bases": torch.zeros(1, 8, 3, device="meta")},
        "bases must be on cpu like feats, got meta",
    ),
    "stages": ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
    "shift": ({"norm_shift": "1"}, "^norm_shift must be a number, got '1'$"),
    "true as shift": ({"norm_shift": True}, "^norm_shift must be a number, got True$"),
    "negative shift": (
        {"norm_shift": -1e-6},
        "^norm_shift must be finite and at least 0, got -1e-06$",
    ),
    "shift of nan": (
        {"norm_shift": float("nan")},
        "^norm_shift must be finite and at least 0, got nan$",
    ),
    "backend": (
        {"backend": "cuda"},
        "backend must be one of auto, fastest, fastest-known, triton, torch, one-pass-128, "
        "one-pass-16, got 'cuda'",
    ),
    "precision": (
        {"precision": "high"},
        "precision must be one of ieee, tf32x3, tf32, got 'high'",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(change, message):
    good = {"feats": torch.zeros(2, 5, 8), "bases": torch.zeros(1, 8, 3)}
    weights = {"mid_weight": torch.zeros(8, 8), "mid_bias": torch.zeros(8)}
    weights |= {"out_weight": torch.zeros(8, 8), "out_bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        em_attention(**good | change)
    with pytest.raises(ValueError, match=message):
        em_attention_block(**good | weights | change)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mid_weight", torch.zeros(8, 9), r"mid_weight must be \[8, 8\], got \[8, 9\]"),
        ("out_weight", torch.zeros(8, 8, 1, 1), r"out_weight must be \[8, 8\], got \[8, 8, 1, 1\]"),
        ("mid_bias", None, "^mid_bias must be a tensor, got NoneType$"),
        ("mid_bias", torch.zeros(1), r"mid_bias must be \[8\], got \[1\]"),
        ("out_bias", torch.zeros(8, dtype=torch.int32), "must be floating point, got torch.int32"),
        ("out_bias", torch.zeros(8, device="meta"), "out_bias must be on cpu like feats, got meta"),
    ],
    ids=["shape", "rank", "none", "bias", "dtype", "device"],
)
def test_bad_weights(name, value, message):
    good = {"feats": torch.zeros(2, 5, 8), "bases": torch.zeros(1, 8, 3)}
    weights = {"mid_weight": torch.zeros(8, 8), "mid_bias": torch.zeros(8)}
    weights |= {"out_weight": torch.zeros(8, 8), "out_bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        em_attention_block(**good | weights | {name: value})


def run_python(code: str, **environment: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    return (done.stdout + done.stderr).strip()


def test_the_package_imports_neither_triton_nor_a_driver():
    code = """
import sys, torch, emanet_triton, emanet_triton.kernels.em.op
print("triton" in sys.modules, torch.cuda.is_initialized())"""
    assert run_python(code) == "False False"


CALL = """
import torch
from emanet_triton.kernels.em.op import em_attention
for backend in ("auto", "triton"):
    try:
        print(len(em_attention(torch.ones(1, 4, 8), torch.ones(1, 8, 3), backend=backend)))
    except ValueError as error:
        print(error)"""


def test_triton_on_a_cpu_without_the_interpreter():
    assert run_python(CALL, TRITON_INTERPRET="0").splitlines() == [
        "2",
        "backend 'triton' needs tensors on a GPU, or TRITON_INTERPRET=1 set in the environment "
        "before triton is imported; got tensors on cpu",
    ]


def test_without_triton_installed():
    assert run_python("import sys; sys.modules['triton'] = None\n" + CALL).splitlines() == [
        "2",
        "backend 'triton' needs the package triton, which is not installed",
    ]
