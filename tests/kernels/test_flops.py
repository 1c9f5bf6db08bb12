"""The operators' FLOPs as PyTorch's counter reports them."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from emanet_triton.kernels import flops
from emanet_triton.kernels.conv import onednn as conv_cpu
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.conv import winograd
from emanet_triton.kernels.em.op import em_attention, em_attention_block
from emanet_triton.kernels.em.reference import em_attention as plain_em_attention
from emanet_triton.kernels.registration import NAMESPACE

X, W, B = torch.zeros(2, 16, 6, 5), torch.zeros(8, 16, 3, 3), torch.zeros(8)
WITHOUT_PRODUCTS = {*("confusion_counts", "max_pool", "resample_labels", "resample_probabilities")}
LAYER = 2 * (2 * 6 * 5) * 16 * 8 * 9  # of W on X
POSITIONS, SQUARE = 2 * 6 * 5, torch.zeros(16, 16)
EM = 2 * POSITIONS * 16 * 4 * (2 * 3 + 1)
OPERATORS = {
    "conv_bias_act": (lambda: conv.conv_bias_act(X, W, B), LAYER),
    "stride": (lambda: conv.conv_bias_act(X, W, B, stride=2), LAYER * 9 // 30),
    "expand_reduce": (
        lambda: conv.expand_reduce(
            X,
            [torch.zeros(8, 16, 1, 1), torch.zeros(4, 8, 1, 1)],
            [B, B[:4]],
            torch.zeros(2, 8, 6, 5),
        ),
        2 * POSITIONS * (16 * 8 + 8 * 4),
    ),
    "conv_cpu": (lambda: conv_cpu.conv_bias_act_(X, W, B), LAYER),
    "conv_cpu_add_": (lambda: conv_cpu.conv_bias_act_(X, W, B, torch.zeros(2, 8, 6, 5)), LAYER),
    "winograd_conv": (lambda: winograd.winograd_conv(X, W, B), LAYER),
    "em_attention": (lambda: em_attention(X, torch.zeros(1, 16, 4)), EM),
    "em_attention_block": (
        lambda: em_attention_block(X, torch.zeros(1, 16, 4), SQUARE, SQUARE[0], SQUARE, SQUARE[0]),
        EM + 2 * (2 * POSITIONS * 16 * 16),
    ),
}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("call", "want"), OPERATORS.values(), ids=OPERATORS)
def test_flops_of_an_operator(call, want):
    assert counted(call) == want


def test_the_em_attention_counts_as_its_reference_does():
    assert counted(lambda: plain_em_attention(X.flatten(2), torch.zeros(1, 16, 4), 3)) == EM


def test_only_operators_without_products_have_no_formula():
    found = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ours = {name for namespace, _, name in found if namespace == NAMESPACE}
    assert ours - set(flops.FORMULAS) == WITHOUT_PRODUCTS
    assert set(flops.FORMULAS) <= ours


COUNTER, PACKAGE = "from torch.utils.flop_counter import FlopCounterMode", "import emanet_triton"
SEARCH = "importlib.util.find_spec('torch.utils.flop_counter')"
RELOAD = "importlib.reload(sys.modules['emanet_triton.kernels.em.op'])"
ORDERS = {
    "after": [PACKAGE, COUNTER],
    "before": [COUNTER, PACKAGE],
    "after_a_search": [PACKAGE, SEARCH, COUNTER],
    "before_a_reload": [COUNTER, PACKAGE, RELOAD],
    "after_a_reload": [PACKAGE, RELOAD, COUNTER],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_it_does_not_matter_when_the_counter_is_imported(order):
    code = "\n".join(
        [
            "import importlib.util, sys, torch",
            *order,
            "with FlopCounterMode(display=False) as counter:",
            "    emanet_triton.em_attention(torch.zeros(1, 5, 8), torch.zeros(1, 8, 2))",
            "print(counter.get_total_flops(), any('flops' in str(f) for f in sys.meta_path))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout + done.stderr).strip() == f"{2 * 5 * 8 * 2 * 7} False"
