import torch

from emanet_triton.kernels.conv.shape import ConvShape


def test_flops_and_bytes_of_a_layer():
    half = torch.float16
    layer = ConvShape(1, 512, 128, 256, 256, 3, 1, 2, half, torch.float32, half, True)
    pixels = 128 * 256
    assert layer.pixels == pixels
    assert layer.flops == 2 * pixels * 256 * 512 * 9
    assert layer.bytes == 2 * 512 * pixels + 2 * 256 * 512 * 9 + 4 * 256 + (4 + 2) * 256 * pixels


def test_strides_round_the_size_up():
    layer = ConvShape(2, 3, 5, 8, 4, 1, 2, 1, torch.float32, None, torch.float32, False)
    assert layer.pixels == 2 * 3 * 4
    assert layer.flops == 2 * 24 * 4 * 3
    assert layer.bytes == 4 * (2 * 3 * 40 + 12 + 4 + 24 * 4)
