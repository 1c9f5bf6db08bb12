"""EMANet's head in other libraries, which ``make test-examples`` installs: it runs these tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_blocks import run_section

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "libraries.md"
SMALL = {"ema_channels": 16, "num_bases": 4, "channels": 8}


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize(
    ("script", "backbone"),
    [
        ("timm_backbone.py", "resnet18"),
        ("timm_backbone.py", "convnext_atto"),
        ("smp_encoder.py", "resnet18"),
        ("smp_encoder.py", "mobilenet_v2"),
    ],
)
def test_the_loss_falls_and_the_bases_move(script, backbone):
    command = [sys.executable, str(ROOT / "examples" / script), backbone]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    assert float(re.search(r"the bases moved by ([\d.]+)", done.stdout)[1]) > 1


@pytest.mark.parametrize(
    ("backbone", "stride", "size"),
    [
        ("resnet18", 8, (9, 13)),
        ("mobilenetv3_small_050", 16, (5, 7)),
        ("convnext_atto", 32, (2, 3)),
    ],
)
def test_a_timm_backbone_and_images_of_odd_sizes(backbone, stride, size):
    from timm_backbone import TimmEMANet

    network = TimmEMANet(backbone, 5, output_stride=stride, head=SMALL, pretrained=False).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.inference_mode():
        assert network.backbone(images)[0].shape[2:] == size
        assert network(images).shape == (2, 5, 65, 97)


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "tu-convnext_atto"])
def test_an_smp_model_saves_and_predicts(encoder, tmp_path):
    from smp_encoder import SmpEMANet

    torch.manual_seed(0)
    network = SmpEMANet(encoder, classes=5, output_stride=16, head=SMALL)
    images = torch.randn(2, 3, 64, 96)
    logits = network.predict(images)
    assert logits.shape == (2, 5, 64, 96)
    network.save_pretrained(tmp_path)
    again = SmpEMANet.from_pretrained(tmp_path)
    assert torch.equal(again.predict(images), logits)


def test_an_smp_encoder_can_be_frozen():
    from smp_encoder import SmpEMANet

    network = SmpEMANet("resnet18", classes=5, head=SMALL)
    network.freeze_encoder()
    network.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(weight.grad is None for weight in network.encoder.parameters())
    assert network.decoder.head.conv_seg.weight.grad.any()


@pytest.mark.parametrize("title", ["timm", "segmentation_models_pytorch"])
def test_the_page(title):
    run_section(PAGE, title)
