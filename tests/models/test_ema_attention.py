"""The EM attention layer: mmseg's vectors, its moving average, and its errors."""

import golden_data
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emanet_triton import EMAttention

GOLDEN = golden_data.vectors("ema_module")
CASES = sorted({int(key.split("_")[0]) for key in GOLDEN})


def golden_layer(case: int) -> tuple[EMAttention, torch.Tensor]:
    bases = torch.from_numpy(GOLDEN[f"{case}_bases"])
    layer = EMAttention(bases.shape[1], bases.shape[2], int(GOLDEN[f"{case}_stages"]))
    layer.bases.copy_(bases)
    return layer, torch.from_numpy(GOLDEN[f"{case}_x"])


@pytest.mark.parametrize("case", CASES)
def test_reconstruction(case):
    layer, x = golden_layer(case)
    got = layer.eval()(x)
    want = torch.from_numpy(GOLDEN[f"{case}_y"])
    assert golden_data.relative_error(got, want) <= 1e-5
    torch.testing.assert_close(layer.bases, torch.from_numpy(GOLDEN[f"{case}_bases"]))


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_bases_as_mmseg_does(case):
    layer, x = golden_layer(case)
    layer.train()(x)
    want = torch.from_numpy(GOLDEN[f"{case}_bases_after_train_step"])
    assert golden_data.relative_error(layer.bases, want) <= 1e-5


def _one_rank(rank: int, address: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    layer, x = golden_layer_for_ranks()
    for step in range(3):
        layer(x[step, 2 * rank : 2 * rank + 2])
    torch.save(layer.bases, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def golden_layer_for_ranks() -> tuple[EMAttention, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    layer = EMAttention(24, 6).train()
    bases = torch.randn(1, 24, 6, generator=generator)
    layer.bases.copy_(torch.nn.functional.normalize(bases, dim=1))
    return layer, torch.randn(3, 4, 24, 5, 7, generator=generator)


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    mp.spawn(_one_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    layer, x = golden_layer_for_ranks()
    before = layer.bases.clone()
    for step in range(3):
        layer(x[step])
    assert not torch.allclose(layer.bases, before, atol=1e-3)
    torch.testing.assert_close(first, layer.bases, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_a_batch_that_is_not_finite_leaves_the_bases(value):
    layer, x = golden_layer_for_ranks()
    before = layer.bases.clone()
    bad = x[0].clone()
    bad[1, 0, 0, 0] = value
    layer(bad)
    assert torch.equal(layer.bases, before)
    layer(x[0])
    assert not torch.equal(layer.bases, before)


def _one_rank_with_an_overflow(rank: int, address: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    layer, x = golden_layer_for_ranks()
    if rank == 1:
        x[0, 2, 0, 0, 0] = float("inf")
    for step in range(2):
        layer(x[step, 2 * rank : 2 * rank + 2])
    torch.save(layer.bases, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_leave_the_bases_where_one_has_an_overflow(tmp_path):
    arguments = (str(tmp_path / "store"), str(tmp_path))
    mp.spawn(_one_rank_with_an_overflow, args=arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    layer, x = golden_layer_for_ranks()
    layer(x[1])  # the other step is left out
    torch.testing.assert_close(first, layer.bases, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_passes_and_leaves_the_bases(training):
    layer = EMAttention(8, 3).train(training)
    before = layer.bases.clone()
    assert layer(torch.zeros(0, 8, 4, 5)).shape == (0, 8, 4, 5)
    assert torch.equal(layer.bases, before)


def test_no_gradient_flows_and_training_does_not_raise():
    layer = EMAttention(8, 3).train()
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    assert not layer(x).requires_grad
    (x + layer(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_a_base_that_no_position_takes_becomes_zero():
    layer = EMAttention(2, 2, num_stages=1).eval()
    layer.bases.copy_(torch.tensor([[[300.0, -300.0], [0.0, 0.0]]]))
    x = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    torch.testing.assert_close(
        layer(x)[0, :, 0, 0], torch.nn.functional.normalize(x[0, :, 0, 0], dim=0)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype_and_large_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = EMAttention(64, 8).eval()
    x = 60 * torch.randn(1, 64, 9, 9, generator=generator)
    half = layer(x.to(dtype))
    assert half.dtype == dtype
    # Rounding the output is all that differs from float32 arithmetic on the rounded input.
    want = layer(x.to(dtype).float())
    assert golden_data.relative_error(half, want) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "must be integers of at least 1, got 0, 64 and 3"),
        ({"channels": 8, "num_stages": 0}, "must be integers of at least 1, got 8, 64 and 0"),
        ({"channels": 8, "num_stages": 2.5}, "must be integers of at least 1, got 8, 64 and 2.5"),
        ({"channels": 2049}, "expected at most 2048 channels and 256 bases, got 2049 and 64"),
        ({"channels": 8, "num_bases": 257}, "at most 2048 channels and 256 bases, got 8 and 257"),
        ({"channels": 8, "momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1.5"),
    ],
    ids=["channels", "stages", "half a stage", "many channels", "many bases", "momentum"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMAttention(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 4, 4), (8, 4, 4)], ids=["channels", "rank"])
def test_bad_features(shape):
    with pytest.raises(ValueError, match=r"features must be \[B, 8, H, W\], got \["):
        EMAttention(8, 3)(torch.zeros(shape))
