"""The networks of the suites are the published ones, as the zoo describes them."""

from emanet_triton.bench.networks import (
    MODELS,
    NETWORKS,
    architecture,
    make_protocol,
    published_figures,
)
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import ZOO


def test_sizes_come_from_the_zoo():
    assert NETWORKS == ("r50", "r101")
    for network in NETWORKS:
        entry = ZOO[f"emanet_{network}-d8_769x769_80k_cityscapes"]
        assert architecture(network) == entry.architecture
    assert architecture(DEMO) == ZOO[DEMO].architecture


def test_a_tiny_network_has_the_same_layers():
    tiny = architecture("r101", tiny=True)
    assert tiny.blocks == architecture("r101").blocks
    assert tiny.base_channels < architecture("r101").base_channels


def test_published_figures_are_of_each_network_and_mode():
    found = {(network, mode): figures for network, mode, figures in published_figures()}
    assert list(found) == [(n, m) for m in ("whole", "slide") for n in NETWORKS]
    assert found["r101", "slide"].miou == 79.62


def test_protocols_for_images_of_the_published_size_are_the_published_ones():
    for (_, mode), name in MODELS.items():
        assert make_protocol(mode, (1024, 2048)) == ZOO[name].protocol
