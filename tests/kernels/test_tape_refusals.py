"""What a tape cannot repeat runs as usual, each time."""

import itertools

import numpy as np
import pytest
import torch
from tape_cases import Operator, launch, pair, summed

from emanet_triton.kernels import recording, tape

pytestmark = pytest.mark.usefixtures("tapes")


ELSEWHERE = torch.rand(4)


def changes(x, y):
    out = torch.zeros_like(x)
    launch(x, y, out)
    return out.add_(1)


def reads_elsewhere(x, y):
    out = torch.empty_like(x)
    launch(ELSEWHERE, y, out)
    return out


def returns_elsewhere(x, y):
    return ELSEWHERE


def launches_by_triton(x, y):
    out = torch.empty_like(x)
    launch(x, y, out, is_ready=False)
    return out


def launches_with_another_type(x, y):
    out = torch.empty_like(x)
    launch(x, y, out, factor=np.float64(1.0))
    return out


def takes_a_list(x, y):
    return torch.cat([x, y])


def makes_several(x, y):
    return torch.sort(x).values


def changes_the_dtype(x, y):
    out = torch.empty_like(x)
    launch(x.view(torch.int32), y, out)
    return out


def reads_its_own(x, y):
    return summed(x, y).double()


def looks_at_values(x, y):
    return summed(x, y, 2.0 if x.sum().item() > 0 else 0.0)


def without_a_launch(x, y):
    return x.view(2, 2)


def depends_on_values(x, y):
    return summed(x, y)[(x > 0.5).nonzero().flatten()]


def makes_on_another_device(x, y):
    torch.zeros(4, device="meta")
    return summed(x, y)


REASONS = {
    depends_on_values: "the shape that aten.nonzero.default makes depends on values",
    makes_on_another_device: "zeros.default makes a tensor on meta",
    changes: "add_.Tensor changes a tensor",
    reads_elsewhere: "a tensor comes from elsewhere",
    returns_elsewhere: "a tensor comes from elsewhere",
    launches_by_triton: "a launch is Triton's own",
    launches_with_another_type: "a launch takes a float64",
    takes_a_list: "cat.default takes a list of tensors",
    makes_several: "sort.default makes several tensors",
    changes_the_dtype: "view.dtype gives bytes another dtype",
    reads_its_own: "_to_copy.default reads memory that the launcher allocated",
    looks_at_values: "_local_scalar_dense.default changes a tensor, or makes none",
}


@pytest.mark.parametrize("operate", REASONS)
def test_what_a_tape_cannot_repeat_runs_as_usual(operate, monkeypatch):
    reasons, record = [], tape._record

    def noted(*arguments):
        reason, outputs = record(*arguments)
        reasons.append(reason)
        return reason, outputs

    monkeypatch.setattr(tape, "_record", noted)
    operator = Operator(operate)
    for _ in range(4):
        operator.check(*pair(4))
    assert operator.calls == 4
    (reason,) = reasons  # it is not tried again
    assert REASONS[operate] in reason


def test_an_input_may_be_returned():
    operator = Operator(without_a_launch)
    for _ in range(4):
        x, y = pair(4)
        assert operator.check(x, y).data_ptr() == x.data_ptr()
    assert operator.calls == 2


def test_an_error_is_raised_and_nothing_is_taped():
    def operate(x, y):
        if operator.calls == 2:
            raise ZeroDivisionError
        return summed(x, y)

    operator = Operator(operate)
    operator.taped(*pair(4))
    with pytest.raises(ZeroDivisionError):
        operator.taped(*pair(4))
    for _ in range(3):
        operator.taped(*pair(4))
    assert operator.calls == 3


def test_a_tile_replaced_meanwhile_is_not_taped(monkeypatch):
    count = itertools.count()
    operator = Operator(summed)
    operator.taped(*pair(4))
    traits = tape._traits
    key = traits(pair(4))[0]
    monkeypatch.setattr(tape, "_traits", lambda arguments: (key, *traits(arguments)[1:]))
    monkeypatch.setattr(tape, "replacements", lambda: next(count))
    for _ in range(3):
        operator.check(*pair(4))
    assert operator.calls == 4


def test_errors_while_a_tape_is_made_do_not_reach_the_caller(monkeypatch):
    def fail(tensor):
        raise AttributeError("of a newer PyTorch")

    operator = Operator(summed)
    operator.check(*pair(4))
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recorder, "view", lambda self, tensor: fail(tensor))
        operator.check(*pair(4))
    for _ in range(2):
        operator.check(*pair(4))
    assert operator.calls == 4


def test_no_tape_is_made_while_a_graph_is_recorded(monkeypatch):
    operator = Operator(summed)
    with monkeypatch.context() as patch:
        patch.setattr(tape, "is_capturing", lambda device: True)
        for _ in range(3):
            operator.check(*pair(4))
    assert operator.calls == 3
    for _ in range(3):
        operator.check(*pair(4))
    assert operator.calls == 4
