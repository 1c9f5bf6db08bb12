"""A tape does with other tensors what the launcher would do, and its Python does not run."""

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tape_cases import Operator, add, described, launch, pair, summed
from torch.multiprocessing.reductions import StorageWeakRef
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.kernels import recording

pytestmark = pytest.mark.usefixtures("tapes")


def test_the_python_runs_twice():
    operator = Operator(summed)
    for i in range(6):
        operator.check(*pair(3, 5))
        assert operator.calls == min(i + 1, 2)


def test_one_tensor_in_two_places_stands_for_two():
    operator = Operator(summed)
    x = torch.rand(4)
    for _ in range(2):
        operator.check(x, x)
    operator.check(*pair(4))
    assert operator.calls == 2


def test_views_of_inputs_and_outputs():
    def operate(x, y):
        rows = y[1:]  # begins where its row does
        out, two = x.new_empty(4, 3), x.new_empty(2, 12)
        launch(x.T, rows, out)
        launch(x, rows.flatten(), two[0])
        launch(x, two[0], two[1])
        return out.T, two[0].view(3, 4), two[1].unflatten(0, (4, 3))

    operator = Operator(operate)
    for _ in range(4):
        outputs = operator.check(torch.rand(3, 4), torch.rand(4, 4))
    assert operator.calls == 2
    assert outputs[0].untyped_storage().nbytes() == 4 * 12
    assert outputs[1].untyped_storage().data_ptr() == outputs[2].untyped_storage().data_ptr()


def test_operations_of_pytorch_run_again():
    def operate(x, y):
        half = (x.mT.to(torch.float64) + y[:, 1:2]).float()
        copied = torch.zeros(3, 4).mT.mT.clone()
        launch(half.contiguous(), x.mT.contiguous(), copied)
        return copied, half * 2

    operator = Operator(operate)
    for i in range(4):
        rows = torch.rand(8, 3).double()[2 * i % 4 :][:4]  # that begin elsewhere in their memory
        operator.check(torch.rand(3, 4), rows)
    assert operator.calls == 2


@pytest.mark.parametrize("part", [lambda two: two[0], lambda two: two[1:].expand(2, 12)])
def test_an_output_of_more_memory(part):
    def operate(x, y):
        two = torch.empty(2, 12)
        launch(x, y, two[0])
        launch(y, two[0], two[1])
        return part(two)

    operator = Operator(operate)
    for _ in range(4):
        assert operator.check(*pair(12)).untyped_storage().nbytes() == 4 * 24
    assert operator.calls == 2


def test_two_outputs_of_one_memory():
    def operate(x, y):
        out = torch.empty(3, 4)
        launch(x, y, out)
        return out, out.T

    operator = Operator(operate)
    for _ in range(4):
        operator.check(*pair(3, 4))
    assert operator.calls == 2


def test_the_workspace_is_one_tensor_with_room_for_all(monkeypatch):
    sizes = (1, 63, 64, 65, 200)

    def operate(x, y):
        parts = [x.new_empty(n) for n in sizes]
        for i, part in enumerate(parts):
            launch(x, y, part, factor=float(i))
        outs = [x.new_empty(n) for n in sizes]
        for part, out in zip(parts, outs, strict=True):
            launch(part, y, out)
        return tuple(outs)

    operator = Operator(operate)
    allocated = []
    for _ in range(3):
        operator.check(*pair(200))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a[0]) or empty(*a, **k))
    operator.taped(*pair(200))
    assert allocated == [256 + 256 + 256 + 512 + 1024]


def test_a_workspace_of_strided_tensors():
    assert recording.Layout(torch.Size((2, 3)), (10, 1), torch.float16).num_bytes() == 2 * 13


def test_descriptors():
    def run(*given):
        *before, x, y, out, length, factor, constant = given
        assert type(x) is TensorDescriptor
        shown = list(x.shape), list(x.strides), list(x.block_shape), x.padding
        assert shown == ([2, 4], [4, 1], [1, 4], "nan")
        add(*before, x.base, y, out, length, factor, constant)

    operator = Operator(lambda x, y: described(x, y, run))
    for _ in range(4):
        operator.check(torch.rand(4, 4), torch.rand(2, 4))
    assert operator.calls == 2


def test_threads_have_descriptors_of_their_own():
    both = threading.Barrier(2, timeout=10)

    def run(*given):
        both.wait()
        add(*given)

    operator = Operator(lambda x, y: described(x, y, run))
    pairs = [(torch.full((4, 4), float(i)), torch.rand(2, 4)) for i in range(2)]
    for _ in range(2):
        operator.taped(*pairs[0])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: operator.taped(*pair), pairs))
    for out, (x, y) in zip(found, pairs, strict=True):
        assert torch.equal(out, x[2:] + y)
    assert operator.calls == 2


def test_a_launcher_may_call_another():
    """A tape would not tell of its launches."""
    inner = Operator(summed)
    for _ in range(3):
        inner.taped(*pair(4))
    outer = Operator(lambda x, y: inner.taped(inner.taped(x, y), y))
    for _ in range(4):
        outer.check(*pair(4))
    assert outer.calls == 2


def test_what_other_threads_launch_is_not_taped():
    def operate(x, y):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(launch, *pair(4), torch.empty(4)).result()
        return summed(x, y)

    operator = Operator(operate)
    for _ in range(4):
        operator.check(*pair(4))
    assert operator.calls == 2


NOTHING = {
    "allocated": lambda x, y: x.new_empty(0, 2, 3).permute(2, 0, 1),
    "view": lambda x, y: y[4:],
    "taken": lambda x, y: y[4:].double(),
}


@pytest.mark.parametrize("operate", NOTHING.values(), ids=NOTHING)
def test_tensors_without_elements(operate):
    operator = Operator(operate)
    for _ in range(4):
        operator.check(torch.rand(0, 4), torch.rand(4))
    assert operator.calls == 2


@torch.inference_mode()
def test_a_view_of_one_of_two_tensors_in_one_memory():
    operator = Operator(lambda x, y: summed(x.view_as(y), y.view_as(x).double().float()))
    for i in range(4):
        operator.check(*(torch.rand(2, 4) if i < 2 else pair(4)))
    assert operator.calls == 2


@pytest.mark.parametrize("can_be_taped", [True, False])
def test_no_tape_keeps_a_tensor(can_be_taped):
    """Also without the collection of garbage, which a server may switch off."""
    operator = Operator(summed if can_be_taped else lambda x, y: torch.zeros_like(x).add_(y))
    gc.disable()
    try:
        for _ in range(4):
            tensors = pair(4)
            out = operator.taped(*tensors)
            storages = [StorageWeakRef(t.untyped_storage()) for t in (*tensors, out)]
            del tensors, out
            assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


def test_a_tape_holds_the_compiled_kernels_that_it_starts():
    """Triton unloads the code of a kernel that nobody holds."""

    class Compiled:
        pass

    kernel = Compiled()
    alive = weakref.ref(kernel)

    def operate(x, y):
        out = torch.empty_like(x)
        launch(x, y, out, compiled=alive())
        return out

    operator = Operator(operate)
    for _ in range(2):
        operator.taped(*pair(4))
    del kernel
    gc.collect()
    assert alive()
    del operator
    gc.collect()
    assert not alive()


def test_another_default_device_changes_nothing():
    operator = Operator(lambda x, y: summed(x, y))
    for _ in range(2):
        operator.taped(*pair(4))
    x, y = pair(4)
    with torch.device("meta"):
        out = operator.taped(x, y)
    assert torch.equal(out, x + y)
    assert operator.calls == 2


def test_an_output_may_be_missing():
    operator = Operator(lambda x, y: (summed(x, y), None))
    for _ in range(4):
        out, missing = operator.taped(*pair(4))
        assert out.shape == (4,)
        assert missing is None
    assert operator.calls == 2


def test_threads_play_one_tape():
    operator = Operator(summed)
    operator.taped(*pair(50))
    operator.taped(*pair(50))

    def run(seed):
        x, y = torch.full((50,), float(seed)), torch.arange(50.0)
        return torch.equal(operator.taped(x, y), x + y)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(500)))
    finally:
        sys.setswitchinterval(interval)
    assert operator.calls == 2


@pytest.mark.parametrize("inference", [True, False])
def test_in_inference_mode(inference):
    operator = Operator(summed)
    with torch.inference_mode(inference):
        outputs = [operator.check(*pair(4)) for _ in range(4)]
    assert [out.is_inference() for out in outputs] == [inference] * 4
    assert operator.calls == 2


def test_a_tape_does_not_import_pytorch_s_compiler():
    """That takes a second, and may happen while a CUDA graph is recorded."""
    code = (
        "import sys, torch;"
        "from emanet_triton.kernels import recording, relaunch, tape;"
        "relaunch.has_fast_way, relaunch.settings = lambda device: True, tuple;"
        "launcher = tape.taped(lambda x: (x.double(), x.new_empty(3))[0]);"
        "found = [launcher(torch.ones(3)) for _ in range(2)];"
        "print(*{'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
