"""Resampling to labels, probabilities and confusion matrices against the map in float64."""

import pytest
import torch
from device import DEVICE, DTYPES, HALF
from subnormal import SubnormalResults, count_subnormal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.kernels.resample import eager as resample_torch
from emanet_triton.kernels.resample import gather as resample_triton
from emanet_triton.kernels.resample.op import (
    Taps,
    confusion_counts,
    resample_labels,
    resample_probabilities,
)

# batch, classes, positions, output, views, taps along rows and columns
CASES = {
    "one-pixel": (1, 19, 1, (1, 1), 1, (1, 1)),
    "one-class": (2, 1, 7, (3, 5), 1, (2, 2)),
    "row": (1, 19, 30, (1, 70), 1, (2, 3)),
    "column": (1, 150, 30, (18, 1), 2, (3, 1)),
    "views": (2, 19, 90, (3, 33), 3, (4, 6)),
    "64-classes": (1, 64, 20, (9, 32), 1, (2, 2)),
}
TORCH_CASES = {  # more tiles than the interpreter has time for
    "several-tiles": (1, 19, 60, (67, 260), 1, (2, 2)),
    "several-tiles-of-views": (2, 19, 60, (33, 129), 3, (3, 3)),
    "255-classes": (1, 255, 20, (3, 40), 1, (2, 2)),
    "150-classes-of-views": (1, 150, 60, (11, 140), 2, (3, 2)),
}
BACKENDS_AND_CASES = [
    *(("triton", name) for name in CASES),
    *(("torch", name) for name in CASES | TORCH_CASES),
]


def make_taps(
    views: int, taps: int, n_out: int, positions: int, seed: int, device: str = DEVICE
) -> Taps:
    """Random taps, of weights that sum to one; every other output lacks the last tap."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(positions, (views, taps, n_out), generator=generator)
    weight = torch.rand(index.shape, generator=generator)
    if taps > 1:
        weight[:, -1, ::2] = 0
    return Taps(index.int().to(device), (weight / weight.sum(1, keepdim=True)).to(device))


def make_problem(
    name: str, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> tuple[Tensor, Taps, Taps]:
    """Logits, rows and columns of a case; an offset of each add up to at most P - 1."""
    batch, classes, positions, (height, width), views, (row_taps, column_taps) = (
        CASES | TORCH_CASES
    )[name]
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(batch, classes, positions, generator=generator)
    half = (positions + 1) // 2
    rows = make_taps(views, row_taps, height, half, 1, device)
    columns = make_taps(views, column_taps, width, positions - half + 1, 2, device)
    return logits.to(device, dtype), rows, columns


def spread(logits: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Full-size logits of every view, [V, B, C, H, W], in the dtype of ``logits``."""
    index = rows.index[:, :, None, :, None] + columns.index[:, None, :, None, :]
    weight = rows.weight[:, :, None, :, None] * columns.weight[:, None, :, None, :].to(logits)
    tapped = logits[:, :, index.long()]  # [B, C, V, T, T, H, W]
    return (tapped * weight).sum((3, 4)).permute(2, 0, 1, 3, 4)


def assert_labels(got: Tensor, want: Tensor) -> None:
    """First maxima of scores [B, C, H, W], wherever the two best differ by more than 1e-5."""
    assert got.dtype == torch.uint8
    assert got.shape == want[:, 0].shape
    if want.shape[1] > 1:
        best = want.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 1e-5
        assert clear.double().mean() > 0.98  # logits of bfloat16 are often equal
        assert torch.equal(got[clear], want.argmax(1)[clear].to(torch.uint8))
    else:
        assert not got.any()


def assert_probabilities(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """At most twice the error of plain PyTorch in float32."""
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("backend", "name"), BACKENDS_AND_CASES)
def test_against_float64(backend, name, dtype):
    logits, rows, columns = make_problem(name, dtype)
    want = spread(logits.double(), rows, columns).softmax(2).mean(0)
    plain = spread(logits.float(), rows, columns).softmax(2).mean(0)
    assert_labels(resample_labels(logits, rows, columns, backend=backend), want)
    labels, got = resample_probabilities(logits, rows, columns, backend=backend)
    assert_labels(labels, want)
    assert torch.equal(labels, got.argmax(1).to(torch.uint8))
    assert_probabilities(got, want, plain)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("triton", "column"),
        ("torch", "views"),
        ("torch", "several-tiles-of-views"),
        ("torch", "150-classes-of-views"),
    ],
)
def test_the_average_of_logits(backend, name):
    logits, rows, columns = make_problem(name)
    want = spread(logits.double(), rows, columns).mean(0)
    plain = spread(logits, rows, columns).mean(0)
    how = {"average": "logits", "backend": backend}
    alone = resample_labels(logits, rows, columns, **how)
    assert_labels(alone, want)
    labels, got = resample_probabilities(logits, rows, columns, **how)
    assert_labels(labels, want)
    assert_probabilities(got, want.softmax(1), plain.softmax(1))
    other = spread(logits.double(), rows, columns).softmax(2).mean(0)
    assert not torch.equal(labels, other.argmax(1).byte())


def test_one_view_has_one_average():
    logits, rows, columns = make_problem("64-classes")
    how = {"backend": "torch"}
    labels, got = resample_probabilities(logits, rows, columns, average="logits", **how)
    want_labels, want = resample_probabilities(logits, rows, columns, **how)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert torch.equal(labels, want_labels)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_nothing(backend):
    arguments = make_problem("views")
    want = resample_probabilities(*arguments, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = resample_probabilities(*arguments, backend=backend)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_confusion(backend):
    logits, rows, columns = make_problem("views")
    labels = resample_labels(logits, rows, columns, backend=backend)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(20, labels.shape, generator=generator).to(torch.uint8)
    targets[targets == 19] = 255
    got = confusion_counts(targets.to(DEVICE), labels, 19, backend=backend).cpu()
    want = torch.zeros(19, 19, dtype=torch.int64)
    for target, label in zip(targets.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if target != 255:
            want[target, label] += 1
    assert got.dtype == torch.int64
    assert torch.equal(got[:-1].view(19, 19), want)
    assert got[-1] == 0


def test_confusion_of_more_pairs_than_a_histogram_has_bins():
    classes = 150
    generator = torch.Generator().manual_seed(3)
    shape = (2, 5000)
    targets, labels = torch.randint(classes + 6, shape, generator=generator).to(DEVICE, torch.uint8)
    targets[targets == classes + 5] = 255
    got = confusion_counts(targets, labels, classes, backend="triton")
    assert torch.equal(got, confusion_counts(targets, labels, classes, backend="torch"))
    assert (got > 0).sum() > 2000


@pytest.mark.parametrize("class_axis", [0, 1], ids=["classes-first", "classes-last"])
@pytest.mark.parametrize("name", ["views", "64-classes"])
def test_every_form_of_the_kernel_computes_the_same(name, class_axis, monkeypatch):
    arguments = make_problem(name)
    monkeypatch.setattr(resample_triton, "CLASS_AXIS", class_axis)
    alone = resample_labels(*arguments, backend="triton")
    labels, probabilities = resample_probabilities(*arguments, backend="triton")
    _, want = resample_probabilities(*arguments, backend="torch")
    assert_labels(alone, want)
    assert_labels(labels, want)
    assert (probabilities - want).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_everything_ignored(backend):
    labels = torch.zeros(2, 3, 33, dtype=torch.uint8, device=DEVICE)
    assert not confusion_counts(torch.full_like(labels, 255), labels, 19, backend=backend).any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_no_class_is_counted_last(backend):
    targets = torch.tensor([19, 254, 3, 4, 255], dtype=torch.uint8, device=DEVICE)
    labels = torch.tensor([0, 5, 19, 6, 77], dtype=torch.uint8, device=DEVICE)
    counts = confusion_counts(targets, labels, 19, backend=backend)
    assert counts[-1] == 3
    assert counts[4 * 19 + 6] == 1
    assert counts.sum() == 4


@pytest.mark.parametrize("views", [1, 2], ids=["single", "two-views"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_first_of_equal_classes(backend, views):
    logits = torch.zeros(1, 19, 6, device=DEVICE)
    logits[:, [4, 7, 18], 2:] = 1
    rows = Taps(torch.tensor([[[0, 2]]] * views).int(), torch.ones(views, 1, 2))
    columns = Taps(torch.tensor([[[0, 1, 1]]] * views).int(), torch.ones(views, 1, 3))
    rows, columns = (Taps(*(t.to(DEVICE) for t in axis)) for axis in (rows, columns))
    labels = resample_labels(logits, rows, columns, backend=backend)
    assert labels.tolist() == [[[0, 0, 0], [4, 4, 4]]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_logits_keep_finite_probabilities(backend):
    logits, rows, columns = make_problem("row")
    labels, got = resample_probabilities(1e4 * logits, rows, columns, backend=backend)
    torch.testing.assert_close(got.sum(1), torch.ones(1, 1, 70, device=DEVICE))
    assert_labels(labels, spread(1e4 * logits.double(), rows, columns).softmax(2).mean(0))


def test_no_probability_is_subnormal_however_far_logits_spread(one_thread):
    logits, rows, columns = make_problem("views", device="cpu")
    logits *= 30
    assert count_subnormal(spread(logits, rows, columns).softmax(2)) > 10
    with SubnormalResults() as results:
        resample_torch.resample(
            logits, [*rows, *columns], average="probabilities", probabilities=True
        )
    assert results.seen > 20
    assert results.found == []


def test_no_mean_of_probabilities_is_subnormal(one_thread):
    """One of twelve views gives a class a normal probability, of which a twelfth is not."""
    ones = torch.ones(12, 1, 1)
    rows = Taps(torch.arange(12, dtype=torch.int32)[:, None, None], ones)
    columns = Taps(torch.zeros(12, 1, 1, dtype=torch.int32), ones)
    logits = torch.zeros(1, 2, 12)
    logits[0, 1] = torch.tensor([-85.5] + [-200.0] * 11)
    faint = torch.softmax(logits, 1)[0, 1, 0]
    tiny = torch.finfo(torch.float32).tiny
    assert faint / 12 < tiny < faint
    with SubnormalResults() as results:
        resample_torch.resample(
            logits, [*rows, *columns], average="probabilities", probabilities=True
        )
    assert results.found == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_strides(backend, dtype):
    logits, rows, columns = make_problem("views", dtype)
    want = resample_labels(logits, rows, columns, backend=backend)
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    taps = [Taps(*(t.mT.contiguous().mT for t in axis)) for axis in (rows, columns)]
    assert not strided.is_contiguous()
    assert torch.equal(resample_labels(strided, *taps, backend=backend), want)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def resizing_taps(views: int, height: int, width: int) -> tuple[Taps, Taps]:
    """Taps of a bilinear resize of 32x48 logits, for every view the same."""
    axes = []
    for n_in, n_out, stride in ((32, height, 48), (48, width, 1)):
        source = torch.linspace(0, n_in - 1, n_out)
        low = source.long().clamp(max=n_in - 2)
        index = stride * torch.stack([low, low + 1]).int()
        weight = torch.stack([1 - (source - low), source - low])
        axes.append(Taps(index.expand(views, -1, -1), weight.expand(views, -1, -1)))
    return tuple(axes)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize(
    ("classes", "views"), [(19, 1), (19, 2), (150, 2)], ids=["single", "two-views", "150-classes"]
)
def test_the_torch_backend_makes_nothing_large(classes, views, average, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a mode sees its own thread only
    logits = torch.randn(1, classes, 32 * 48, generator=torch.manual_seed(0))
    rows, columns = resizing_taps(views, 1000, 900)
    with LargestTensor() as largest:
        resample_torch.resample(logits, (*rows, *columns), average=average, probabilities=False)
    assert 1000 * 900 <= largest.bytes <= classes * 1000 * 900 * 4 / 20


def test_threads_do_not_change_results(three_threads, monkeypatch):
    logits = torch.randn(2, 19, 32 * 48, generator=torch.manual_seed(0))
    taps = resizing_taps(2, 300, 200)
    monkeypatch.setattr(resample_torch, "STRIP_BYTES", 2**18)
    labels, got = resample_probabilities(logits, *taps, backend="torch")
    torch.set_num_threads(1)
    want_labels, want = resample_probabilities(logits, *taps, backend="torch")
    assert torch.equal(got, want)
    assert torch.equal(labels, want_labels)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["resample_labels", "resample_probabilities", "confusion_counts"])
def test_operators_are_registered_well(name, backend):
    logits, rows, columns = make_problem("column")
    if name == "confusion_counts":
        arguments = (*torch.zeros(2, 1, 18, 1, dtype=torch.uint8, device=DEVICE), 19)
    else:
        arguments = logits, *rows, *columns, "logits"
    operator = getattr(torch.ops.emanet_triton, name).default
    torch.library.opcheck(operator, (*arguments, backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph(backend):
    logits, rows, columns = make_problem("row")

    def labels_and_more(logits):
        return resample_labels(2 * logits, rows, columns, backend=backend) + 1

    compiled = torch.compile(labels_and_more, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), labels_and_more(logits))


def changed(**changes) -> tuple:
    """The arguments of a good call with some of them replaced."""
    logits, rows, columns = make_problem("row", device="cpu")
    good = {"logits": logits, "rows": rows, "columns": columns}
    return tuple((good | changes).values())


GOOD_ROWS = make_problem("row", device="cpu")[1]
BAD = {
    "two-dimensional": ({"logits": torch.zeros(19, 30)}, r"logits must be \[B, C, P\], only"),
    "empty": ({"logits": torch.zeros(1, 19, 0)}, r"only B may be 0, got \[1, 19, 0\]"),
    "integer": ({"logits": torch.zeros(1, 19, 30, dtype=torch.int32)}, "logits must be float32, "),
    "256-classes": ({"logits": torch.zeros(1, 256, 30)}, "at most 255 classes, got 256"),
    "flat-taps": ({"rows": Taps(torch.zeros(2).int(), torch.ones(2))}, r"rows.index must be \[V"),
    "unequal": ({"rows": Taps(GOOD_ROWS.index, torch.ones(1, 2, 3))}, "rows.weight must have one"),
    "double": ({"rows": Taps(GOOD_ROWS.index, GOOD_ROWS.weight.double())}, "rows must be int32"),
    "views": ({"rows": make_taps(2, 2, 4, 3, 0, "cpu")}, "one number of views, got 2 and 1"),
    "device": ({"logits": torch.zeros(1, 19, 30, device="meta")}, "must be on meta like logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        resample_labels(*changed(**changes))


def test_bad_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'gpu'"):
        resample_labels(*changed(), backend="gpu")


def test_bad_average():
    with pytest.raises(ValueError, match="average must be one of probabilities, logits, got 'sum"):
        resample_labels(*changed(), average="sum")


def test_bad_targets():
    labels = torch.zeros(1, 1, 70, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"targets must be uint8 \[1, 1, 70\], got torch\.uint8"):
        confusion_counts(torch.zeros(1, 70, dtype=torch.uint8), labels, 19)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        confusion_counts(torch.zeros(1, 1, 70, dtype=torch.int64), labels, 19)
