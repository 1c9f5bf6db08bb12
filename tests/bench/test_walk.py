"""The fused network's calls of the operators, found with tensors that have no data."""

import pytest
import torch

from emanet_triton.bench.walk import OperatorCall, Recorder, TensorSpec, walk
from emanet_triton.kernels.conv.op import conv_bias_act

SIZE = 1024, 2048


def convolutions(calls, **wanted):
    """The calls of ``conv_bias_act`` with some arguments, and the number of each."""
    found = {call: n for call, n in calls.items() if call.name == "conv_bias_act"}
    return {c: n for c, n in found.items() if all(c[name] == v for name, v in wanted.items())}


@pytest.mark.parametrize(("network", "blocks"), [("r50", 16), ("r101", 33)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_every_operator_of_the_network_is_found(network, mode, blocks):
    calls = walk(network, mode, SIZE)
    operators = {}
    for call, count in calls.items():
        operators[call.name] = operators.get(call.name, 0) + count
    alone = 2 + blocks  # the first 1x1 convolution and the last, and the 3x3 of each block
    assert operators == {
        "conv_bias_act": 3 + alone + 4 + 5,  # stem, blocks, projections, head
        "max_pool": 1,
        "expand_reduce": blocks - 1,
        "em_attention_block": 1,
        "resample_labels": 1,
    }


def head_convolutions(calls):
    """Of the head's two 3x3 convolutions of the backbone's output, and of the one that adds."""
    read = {c["weight"].shape: c for c in convolutions(calls) if c["x"].shape[1] == 2048}
    (adds,) = (c for c in convolutions(calls) if c["residual"] and c["weight"].shape[1] == 256
               and c["weight"].shape[2] == 3)  # fmt: skip
    return {shape: call for shape, call in read.items() if shape[2] == 3}, adds


def test_a_gpu_runs_the_heads_two_convolutions_of_one_input():
    read, adds = head_convolutions(walk("r50", "whole", SIZE))
    feats, partial = (read.pop((outputs, 2048, 3, 3)) for outputs in (512, 256))
    assert not read
    assert (feats["relu"], feats["out_dtype"]) == (True, torch.bfloat16)
    assert (partial["relu"], partial["out_dtype"]) == (False, torch.bfloat16)
    assert adds["residual"] == TensorSpec(
        (1, 256, 128, 256), (256 * 128 * 256, 1, 256 * 256, 256), torch.bfloat16
    )


def test_a_cpu_runs_them_as_one():
    read, adds = head_convolutions(walk("r50", "whole", SIZE, merged=True))
    ((shape, both),) = read.items()
    assert (shape, both["relu"], both["out_dtype"]) == ((768, 2048, 3, 3), False, torch.float32)
    assert adds["residual"].stride == (768 * 128 * 256, 1, 768 * 256, 768)  # a part of the output


def test_a_sliding_window_runs_all_windows_as_one_batch():
    calls = walk("r101", "slide", SIZE)
    (stem,) = convolutions(calls, stride=2, relu=True, bias=TensorSpec((32,), (1,), torch.bfloat16))
    assert stem["x"].shape == (8, 3, 769, 769)
    ((layer3, count),) = (
        (call, n)
        for call, n in convolutions(calls, dilation=2).items()
        if call["weight"].shape == (256, 256, 3, 3)
    )
    assert (layer3["x"].shape, count) == ((8, 256, 97, 97), 22)
    (labels,) = (call for call in calls if call.name == "resample_labels")
    assert labels["logits"].shape == (1, 19, 8 * 97 * 97)


def test_windows_of_two_images_one_by_one():
    calls = walk("r50", "slide", SIZE, 2, "fp32", at_once=1)
    (layer,) = convolutions(calls, dilation=4)
    assert (layer["x"].shape, layer["x"].dtype) == ((2, 512, 97, 97), torch.float32)
    assert calls[layer] == 8 * 2


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_call_can_be_made_anew(mode):
    calls = walk("r50", mode, (24, 40), 1, "fp32", tiny=True)
    with Recorder() as recorder:
        for call in calls:
            call.run()
    assert set(recorder.calls) == set(calls)


def test_a_call_made_anew_on_a_device_computes():
    x, bias = torch.ones(1, 2, 3, 3), torch.zeros(4)
    weight = torch.ones(4, 2, 1, 1)
    with Recorder() as recorder:
        conv_bias_act(x, weight, bias, backend="torch")
    (call,) = recorder.calls
    out = call.run("cpu")
    assert (out.shape, out.device.type) == ((1, 4, 3, 3), "cpu")


def test_other_values_of_arguments():
    call = OperatorCall("conv_bias_act", (("stride", 1), ("backend", "auto")))
    other = call.but(backend="triton")
    assert (other["backend"], other["stride"], call["backend"]) == ("triton", 1, "auto")
    assert other != call
    assert hash(call.but()) == hash(call)


def test_a_call_reads_as_its_arguments():
    x = TensorSpec((1, 64, 4, 8), (2048, 1, 512, 64), torch.bfloat16)
    call = OperatorCall("expand_reduce", (("x", x), ("biases", (x, x)), ("backend", "auto")))
    assert str(call) == (
        "expand_reduce(x=bf16[1, 64, 4, 8], biases=(bf16[1, 64, 4, 8], bf16[1, 64, 4, 8]), "
        "backend=auto)"
    )
