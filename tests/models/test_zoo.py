"""The zoo: its table, and the models made from it."""

import hashlib
import http.server
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_eval
import torch

from emanet_triton import create_model, list_models
from emanet_triton.data.public import DATASETS
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint
from emanet_triton.models.chosen import choose
from emanet_triton.models.entries import (
    DEMO,
    OFFICIAL,
    SOURCES,
)
from emanet_triton.models.zoo import ZOO, model_info, name_of, read_published

PUBLISHED = {
    "emanet_r50-d8_512x1024_80k_cityscapes": (77.59, 79.44, 5.4, 4.58),
    "emanet_r101-d8_512x1024_80k_cityscapes": (79.10, 81.21, 6.2, 2.87),
    "emanet_r50-d8_769x769_80k_cityscapes": (79.33, 80.49, 8.9, 1.97),
    "emanet_r101-d8_769x769_80k_cityscapes": (79.62, 81.00, 10.1, 1.22),
}

COUNTS = {"mmseg": 4, "bdd100k": 5, "sssegmentation": 12, "official": 1, "paddleseg": 4}


def test_names():
    assert list_models(source="mmseg") == list(PUBLISHED) == list_models()[:4]
    assert list_models(source="emanet_triton") == [DEMO]


@pytest.mark.parametrize(("source", "count"), COUNTS.items())
def test_models_of_each_source(source, count):
    names = list_models(source=source)
    assert len(names) == count
    project = SOURCES[source]
    for name in names:
        info = model_info(name)
        assert (info.name, info.source, info.project) == (name, source, project)
        assert name in list_models(source=info.source, dataset=info.dataset, depth=info.depth)
        assert info.url is None or info.url.startswith("https://")
        assert info.path is not None and info.path.name.startswith(name)
        assert list_models(source=source, depth=info.depth).count(name) == 1
        assert len(info.classes) == len(ZOO[name].dataset.classes)


def test_filters():
    of_sets = [list_models(dataset=key) for key in DATASETS]
    assert sorted(name for names in of_sets for name in names) == sorted(list_models())
    assert list_models(dataset="voc2012", source="sssegmentation", depth=101) == [
        "emanet_resnet101os8_voc",
        "emanet_resnet101os16_voc",
    ]
    assert model_info("emanet_resnet50os16_ade20k").stride == 16
    for filters in ({"dataset": "pascal"}, {"source": "timm"}, {"depth": 18}):
        (value,) = filters.values()
        with pytest.raises(InputError, match=f"unknown .* '{value}'; expected one of: "):
            list_models(**filters)


def test_published_figures_of_the_other_projects():
    """As their own pages say; BDD100K: val and test, PaddleSeg: one view, flip, ms+flip."""
    figures = {name: ZOO[name].published for name in list_models() if ZOO[name].published}
    bdd = [(p.miou, p.miou_test) for n, p in figures.items() if ZOO[n].source == "bdd100k"]
    assert bdd == [
        (62.05, 54.52),
        (62.30, 55.46),
        (81.64, 81.16),
        (82.18, 81.36),
        (83.14, 82.55),
    ]
    paddle = {
        n: (p.miou, p.miou_flip, p.miou_ms_flip)
        for n, p in figures.items()
        if ZOO[n].source == "paddleseg"
    }
    assert paddle == {
        "emanet_resnet50_os8_cityscapes_1024x512_80k": (79.05, 79.34, 80.82),
        "emanet_resnet101_os8_cityscapes_1024x512_80k": (80.00, 80.23, 80.76),
        "emanet_resnet50_os8_voc12aug_512x512_40k": (78.60, 78.90, 79.55),
        "emanet_resnet101_os8_voc12aug_512x512_40k": (79.47, 79.97, 80.51),
    }
    table = {
        "voc": [75.29, 74.86, 76.43, 76.19],
        "ade20k": [41.77, 41.46, 44.39, 43.97],
        "cityscapes": [77.96, 76.73, 79.54, 77.54],
    }
    for dataset, row in table.items():
        backbones = ("resnet50os8", "resnet50os16", "resnet101os8", "resnet101os16")
        names = [f"emanet_{backbone}_{dataset}" for backbone in backbones]
        assert [figures[name].miou for name in names] == row
    assert figures[OFFICIAL].miou == 80.51


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_entries(name):
    entry = ZOO[name]
    published = entry.published
    figures = (published.miou, published.miou_ms_flip, published.memory_gb, published.fps)
    assert figures == PUBLISHED[name]
    assert entry.file == f"{name}_20200901_100301-{entry.sha256}.pth"
    base = "https://download.openmmlab.com/mmsegmentation/v0.5/emanet"
    assert entry.url == f"{base}/{name}/{entry.file}"
    assert entry.architecture.blocks == ((3, 4, 6, 3) if "r50" in name else (3, 4, 23, 3))
    assert entry.protocol.mode == ("slide" if "769" in name else "whole")


def test_the_demonstration_is_part_of_the_package_and_small():
    checkpoint = read_published(DEMO)
    assert checkpoint.path.stat().st_size < 4e6
    assert name_of(checkpoint) == DEMO
    assert not create_model(DEMO, pretrained=True).training


def test_create_model_with_classes_and_checkpoint(tmp_path):
    assert create_model("tiny", num_classes=7).decode_head.conv_seg.out_channels == 7
    model = create_model("tiny", checkpoint=tiny_eval.write_checkpoint(tmp_path))
    want = tiny_eval.tiny_network().state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, want[key]), key
    assert not model.training
    assert model.protocol == ZOO["tiny"].protocol


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_pytorch_change_no_model(tmp_path, device, dtype):
    path = tiny_eval.write_checkpoint(tmp_path)
    want = tiny_eval.tiny_network().state_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = create_model("tiny", checkpoint=path)
    finally:
        torch.set_default_dtype(before)
    for key, value in model.state_dict().items():
        assert value.device.type == "cpu", key
        assert value.dtype == want[key].dtype, key
        assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("given", ["weights", "checkpoint"])
def test_under_inference_mode_a_model_is_made_of_ordinary_tensors(tmp_path, given):
    checkpoint = tiny_eval.write_checkpoint(tmp_path) if given == "checkpoint" else None
    with torch.inference_mode():
        model = create_model("tiny", checkpoint=checkpoint)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    model.train()(torch.randn(2, 3, 32, 32))[0].sum().backward()


def test_unknown_name():
    with pytest.raises(InputError, match="unknown model 'emanet_dem'; expected a model such as"):
        create_model("emanet_dem")
    with pytest.raises(InputError, match=f"such as {DEMO} .*--list` prints all"):
        create_model("emanet_dem")


@pytest.mark.parametrize("text", ["emanet_r50", "emanet_r50-d8_769x769", "emanet_r101-d8"])
def test_the_names_that_begin_with_a_text_come_first(text):
    with pytest.raises(InputError) as raised:
        create_model(text)
    first = [name for name in PUBLISHED if name.startswith(text)]
    said = re.findall(r"emanet_r\w+-d8_\w+|emanet_\w+", str(raised.value).partition("such as ")[2])
    assert said[: len(first)] == first
    assert all(name.startswith(text) for name in said)


def test_names_that_resemble_a_text():
    for text in ("emanet_r5-d8_769x769_80k_cityscapes", "emanet_r50_d8_769x769_80k_cityscapes"):
        with pytest.raises(InputError, match="such as emanet_r50-d8_769x769_80k_cityscapes or "):
            create_model(text)
    with pytest.raises(InputError, match=f"such as {next(iter(PUBLISHED))} "):
        create_model("")


IMPOSSIBLE = {
    "both": (
        {"checkpoint": "x", "pretrained": True},
        "give either checkpoint or pretrained=True, not both",
    ),
    "none": ({"num_classes": 0}, "num_classes must be an int in 1 to 255, got 0"),
    "text": ({"num_classes": "5"}, "num_classes must be an int in 1 to 255, got '5'"),
    "true": ({"num_classes": True}, "num_classes must be an int in 1 to 255, got True"),
    "float": ({"num_classes": 2.0}, "num_classes must be an int in 1 to 255, got 2.0"),
}


@pytest.mark.parametrize(("arguments", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError) as raised:
        create_model("tiny", **arguments)
    assert str(raised.value) == message


@pytest.fixture
def published_tiny(tmp_path, monkeypatch):
    """The tiny model, published on a local server that counts its requests."""
    body = tiny_eval.write_checkpoint(tmp_path).read_bytes()
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # the name that http.server calls
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = replace(
        ZOO["tiny"],
        url=f"http://127.0.0.1:{server.server_port}/tiny.pth",
        sha256=hashlib.sha256(body).hexdigest()[:8],
    )
    monkeypatch.setitem(ZOO, "tiny", entry)
    yield requests
    server.shutdown()
    server.server_close()


def test_pretrained_downloads_once_and_then_works_offline(published_tiny):
    want = tiny_eval.tiny_network().state_dict()
    for _ in range(2):
        got = create_model("tiny", pretrained=True).state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert published_tiny == ["/tiny.pth"]


def test_the_hash_is_checked_whenever_the_cached_file_is_opened(published_tiny):
    create_model("tiny", pretrained=True)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "tiny.pth"
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    with pytest.raises(InputError, match=f"tiny.pth: .*{ZOO['tiny'].sha256}"):
        create_model("tiny", pretrained=True)


def test_the_file_of_another_variant_is_refused_by_its_name(tmp_path):
    """The weights of output strides 8 and 16 have the same shapes."""
    path = tmp_path / "emanet_resnet50os16_voc.pth"
    with pytest.raises(InputError, match="is a checkpoint of emanet_resnet50os16_voc, not of ema"):
        create_model("emanet_resnet50os8_voc", checkpoint=path)
    path.touch()
    with pytest.raises(InputError, match="_voc, not of --model emanet_resnet50os8_voc"):
        choose(str(path), "emanet_resnet50os8_voc")


def test_the_file_of_the_same_network_with_another_protocol_gives_a_warning(tmp_path):
    path = tmp_path / ZOO["emanet_r50-d8_512x1024_80k_cityscapes"].file
    path.touch()
    other = "emanet_r50-d8_769x769_80k_cityscapes"
    match = "is named like the file of emanet_r50-d8_512x1024.*, not of emanet_r50-d8_769x769"
    with pytest.warns(UserWarning, match=match):
        choose(str(path), other)
    with pytest.warns(UserWarning, match=match), pytest.raises(InputError, match="is empty"):
        create_model(other, checkpoint=path)


def test_the_official_file_needs_no_name(tmp_path):
    checkpoint = Checkpoint(tmp_path / "final.pth", "0" * 64, {}, {}, "official")
    assert name_of(checkpoint) == OFFICIAL
