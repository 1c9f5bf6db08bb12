"""A toy problem for the examples: find a red and a green square on grey noise."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton import EMAttention

CLASSES = ("background", "red", "green")
SIZE = 64  # pixels of an image in each direction


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images, float [count, 3, SIZE, SIZE], and labels, int64 [count, SIZE, SIZE]."""
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        for index in (1, 2):  # the second square may hide a part of the first
            y, x = torch.randint(SIZE // 2, (2,), generator=generator).tolist()
            label[y : y + 24, x : x + 24] = index
        for index in (1, 2):
            image[index - 1][label == index] += 2
    return images, labels


def train(network: nn.Module, steps: int = 40, batch_size: int = 4) -> None:
    """Train a network from images to logits of their size, and print what happens.

    The network's EM attention moves its bases in each step, without a gradient.
    """
    generator = torch.Generator().manual_seed(0)
    (attention,) = (module for module in network.modules() if isinstance(module, EMAttention))
    first = attention.bases.clone()
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    network.train()
    for step in range(1, steps + 1):
        images, labels = squares(batch_size, generator)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 10 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}")
    print(f"the bases moved by {(attention.bases - first).norm():.3f}")
