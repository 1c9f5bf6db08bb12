"""Which tile a convolution takes."""

from emanet_triton.kernels.conv import tiles as conv_tiles


def test_tiles_are_chosen_by_shape():
    def blocks(channels, outputs, pixels, **options):
        tile = conv_tiles.tile("conv_rows", "sm_90", "bf16", channels, outputs, pixels, **options)
        return tile.meta["BLOCK_O"], tile.meta["BLOCK_C"]

    assert blocks(512, 512, 128 * 256) == (256, 64)
    assert blocks(512, 512, 97 * 97) == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="fp32") == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="bf16") == (256, 64)
    for channels, block in ((64, 64), (256, 64), (512, 128)):
        flat = conv_tiles.tile("conv_rows", "sm_90", "bf16", channels, 512, 128 * 256, flat=True)
        assert (flat.meta["BLOCK_M"], flat.meta["BLOCK_O"]) == (block, 128)
    assert blocks(256, 128, 128 * 256) == (128, 64)
    assert blocks(256, 64, 128 * 256) == (64, 64)
    odd = conv_tiles.tile("conv_pointers", "sm_90", "bf16", 32, 64, 512 * 1024)
    assert odd.meta["BLOCK_C"] == 32
    for outputs, block in ((19, 32), (32, 32), (33, 64), (72, 64)):
        taps = conv_tiles.tile("conv_taps", "sm_90", "bf16", 3, outputs, 512 * 1024)
        assert taps.meta["BLOCK_O"] == block


def test_amd_has_no_tf32x3_and_takes_full_precision():
    for kernel in ("conv_pointers", "conv_taps"):
        tile = conv_tiles.tile(kernel, "gfx942", "fp32", 64, 64, 64, "tf32x3")
        assert tile.meta["PRECISION"] == "ieee"
