"""TF32 on and off: PyTorch's settings within ``cuda_fp32`` and after it."""

import itertools

import pytest
import torch
from torch import backends, nn

from emanet_triton.kernels.precision import cuda_fp32

CPU = backends._FP32Precision("mkldnn", "all")
SETTINGS = (
    backends,
    backends.cudnn,
    backends.cudnn.conv,
    backends.cudnn.rnn,
    backends.cuda.matmul,
    CPU,
    backends.mkldnn.matmul,
    backends.mkldnn.conv,
    backends.mkldnn.rnn,
)


def reset():
    for setting in SETTINGS:
        setting.fp32_precision = "none"
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _settings():
    reset()
    yield
    reset()


def new(setting, value):
    setting.fp32_precision = value


def legacy(module, value):
    module.allow_tf32 = value


def several(*changes):
    for change, *arguments in changes:
        change(*arguments)


EARLIER = {
    "default": (several,),
    "conv-ieee": (new, backends.cudnn.conv, "ieee"),
    "conv-none": (new, backends.cudnn.conv, "none"),
    "matmul-tf32": (new, backends.cuda.matmul, "tf32"),
    "all-ieee": (new, backends, "ieee"),
    "all-tf32": (new, backends, "tf32"),
    "all-bf16": (new, backends, "bf16"),
    "all-of-cuda": (new, backends.cudnn, "tf32"),
    "all-of-cpu": (new, CPU, "bf16"),
    "one-follows": (
        several,
        (new, backends, "ieee"),
        (new, backends.cudnn, "tf32"),
        (new, backends.cudnn.rnn, "none"),
    ),
    "legacy-off": (legacy, backends.cudnn, False),
    "legacy-on": (legacy, backends.cuda.matmul, True),
    "legacy-high": (torch.set_float32_matmul_precision, "high"),
    "legacy-medium": (torch.set_float32_matmul_precision, "medium"),
    "both": (
        several,
        (legacy, backends.cudnn, False),
        (torch.set_float32_matmul_precision, "medium"),
        (new, backends.cudnn, "tf32"),
        (new, backends.cuda.matmul, "ieee"),
    ),
}
by_earlier = pytest.mark.parametrize(
    ("change", "arguments"), [(c, a) for c, *a in EARLIER.values()], ids=EARLIER
)
by_precision = pytest.mark.parametrize("precision", ["ieee", "tf32"])


def everything():
    """All settings as PyTorch shows them, also while the settings that others follow change."""
    shown = [setting.fp32_precision for setting in SETTINGS]
    for ask in (
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            shown.append(ask())
        except RuntimeError:
            shown.append("the interfaces differ")
    for followed in ((backends,), (backends.cudnn, CPU)):
        for setting, value in itertools.product(followed, ("ieee", "tf32")):
            setting.fp32_precision = value
            shown += [setting.fp32_precision for setting in SETTINGS]
    return shown


@by_precision
@by_earlier
def test_all_settings_are_put_back(change, arguments, precision):
    change(*arguments)
    expected = everything()
    reset()
    change(*arguments)
    with pytest.raises(KeyError), cuda_fp32(precision):
        raise KeyError
    assert everything() == expected


@by_precision
@by_earlier
def test_products_are_formed_as_asked(change, arguments, precision):
    change(*arguments)
    with cuda_fp32(precision), cuda_fp32(precision):
        for setting in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
            assert setting.fp32_precision == precision


@by_precision
@by_earlier
def test_pytorch_can_ask_by_its_old_interface(change, arguments, precision):
    change(*arguments)
    with cuda_fp32(precision):
        assert backends.cudnn.allow_tf32 == (precision == "tf32")
        assert backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert (torch.get_float32_matmul_precision() == "highest") == (precision == "ieee")
        with backends.cudnn.flags(enabled=True):
            assert backends.cudnn.conv.fp32_precision == "tf32"  # as ``flags`` set it
        assert backends.cudnn.conv.fp32_precision == precision


def test_contexts_of_several_threads_may_overlap():
    expected = everything()
    reset()
    first, second = cuda_fp32("ieee"), cuda_fp32("ieee")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.cudnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert everything() == expected


def test_a_setting_of_the_user_within_a_context_counts_until_the_next():
    with cuda_fp32("ieee"):
        backends.cudnn.conv.fp32_precision = "tf32"
        with cuda_fp32("ieee"):
            assert backends.cudnn.conv.fp32_precision == "ieee"
        assert backends.cudnn.conv.fp32_precision == "tf32"


@by_precision
def test_models_can_be_exported_meanwhile(precision):
    """torch.onnx begins with this call, which reads the old interface."""
    x = torch.zeros(1, 3, 8, 8)
    with cuda_fp32(precision):
        exported = torch.export.export(nn.Conv2d(3, 4, 3), (x,), strict=False)
        assert exported.module()(x).shape == (1, 4, 6, 6)
