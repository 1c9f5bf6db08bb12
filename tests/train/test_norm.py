"""Batch norm over processes against one batch norm on all images, by two processes with gloo."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from emanet_triton.train.norm import RanksBatchNorm2d, synchronise


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def images():
    return torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def network():
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Sequential(norm)


def outcome(model, x):
    """Output, gradient of a loss and running statistics, all float32."""
    x.requires_grad_()
    out = model(x)
    (out.sin() * out).sum().backward()
    norm = model[0]
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad, *buffers]


def rank_main(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = network()
    synchronise(model, torch.device("cpu"))
    torch.save(outcome(model, images()[2 * rank : 2 * rank + 2].clone()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_batch_norm(tmp_path):
    mp.spawn(rank_main, (free_port(), tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    out, grad, weight, bias, *buffers = outcome(network(), images())
    for part, (mine, theirs) in enumerate(((out, 0), (grad, 1))):
        both = torch.cat([rank[part] for rank in ranks])
        assert torch.allclose(both, mine, rtol=1e-4, atol=1e-5), theirs
    assert torch.allclose(ranks[0][2] + ranks[1][2], weight, rtol=1e-5, atol=1e-4)
    assert torch.allclose(ranks[0][3] + ranks[1][3], bias, rtol=1e-5, atol=1e-4)
    for rank in ranks:
        for got, want in zip(rank[4:], buffers, strict=True):
            assert torch.allclose(got.double(), want.double(), rtol=1e-6)


def test_names_tensors_and_evaluation_stay():
    model, plain = network(), network()
    synchronise(model, torch.device("cpu"))
    assert type(model[0]) is RanksBatchNorm2d
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
