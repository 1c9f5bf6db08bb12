"""Models for the Hugging Face Hub: folders, a local stand-in for the Hub, and the model card."""

import copy
import functools
import http.server
import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_eval
import torch
from torch import nn
from trained_files import CLASSES, TRAINED, write_trained

from emanet_triton import create_model, fuse, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.errors import InputError
from emanet_triton.models import zoo
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import description_in
from emanet_triton.models.entries import DEMO
from emanet_triton.models.protocol import Protocol

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="install it by: pip install '.[hub]'"
)
from emanet_triton.hub import HubEMANet  # noqa: E402 (it needs huggingface_hub)

IMAGES = torch.rand(1, 3, 40, 72, generator=torch.Generator().manual_seed(0))
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def trained(tmp_path) -> HubEMANet:
    """A model of three classes, as emanet-triton train writes it."""
    return HubEMANet.from_checkpoint(write_trained(tmp_path / "best.safetensors"))


@pytest.fixture
def folder(tmp_path, trained) -> Path:
    trained.save_pretrained(tmp_path / "beach")
    return tmp_path / "beach"


def same(first: nn.Module, second: nn.Module) -> bool:
    with torch.inference_mode():
        return torch.equal(first(IMAGES), second(IMAGES))


def test_a_folder_gives_the_same_model_again(tmp_path, folder, trained):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    again = HubEMANet.from_pretrained(folder)
    assert not again.training
    assert same(again, trained)
    assert same(again, create_model(checkpoint=tmp_path / "best.safetensors"))
    assert again.description == trained.description
    assert again.description.info["mIoU"] == TRAINED.info["mIoU"]
    assert (again.num_classes, again.protocol) == (len(CLASSES), TRAINED.protocol)
    for key, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_weights_alone_are_a_checkpoint_for_all_commands(folder, trained):
    path = folder / "model.safetensors"
    assert description_in(path) == trained.description
    assert same(create_model(checkpoint=path), trained)
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = safetensors.load_file(path)
    assert theirs.keys() == trained.state_dict().keys()
    assert all(torch.equal(theirs[key], value) for key, value in trained.state_dict().items())


def test_config_json_says_all_that_the_network_needs(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == tiny_eval.NAME
    assert config["classes"] == list(CLASSES)
    assert config["protocol"]["base_scale"] == [48, 24]
    assert config["dataset"]["name"] == "Beach"


def test_the_shipped_model(tmp_path):
    model = HubEMANet.from_checkpoint(DEMO)
    model.save_pretrained(tmp_path / "demo")
    again = HubEMANet.from_pretrained(tmp_path / "demo")
    plain = create_model(DEMO, pretrained=True)
    assert same(again, plain)
    assert same(fuse(again), fuse(plain))
    assert again.description.classes == tuple(each.name for each in CITYSCAPES.classes)
    image = (255 * IMAGES[0].permute(1, 2, 0)).byte().numpy()
    assert (segment(again, image, fuse=True) == segment(plain, image, fuse=True)).all()
    assert "license: apache-2.0" in (tmp_path / "demo" / "README.md").read_text()


def test_changes_after_reading_are_saved(tmp_path, folder):
    model = HubEMANet.from_pretrained(folder)
    model.protocol = Protocol((96, 48))
    nn.init.ones_(model.decode_head.conv_seg.bias)
    model.half().save_pretrained(tmp_path / "changed")
    assert (
        read_checkpoint(tmp_path / "changed" / "model.safetensors")
        .state_dict["decode_head.conv_seg.bias"]
        .equal(torch.ones(3, dtype=torch.float16))
    )
    again = HubEMANet.from_pretrained(tmp_path / "changed")
    assert again.protocol == Protocol((96, 48))
    assert again.description == replace(TRAINED, protocol=Protocol((96, 48)), info={})
    assert same(again, copy.deepcopy(model).float())


def test_a_changed_network_is_not_fused(trained):
    trained.decode_head.register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match="decode_head has a forward hook"):
        fuse(trained)

    class Other(HubEMANet):
        pass

    with pytest.raises(ValueError, match="fuse takes an EMANet, got Other"):
        fuse(Other(TRAINED).eval())


def test_the_card_of_a_training(folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "emanet_triton"
    assert card.data.pipeline_tag == "image-segmentation"
    assert {"emanet", "image-segmentation", "semantic-segmentation"} <= set(card.data.tags)
    assert card.data.license is None
    assert "| 3 classes of Beach | sea, sand, sky |" in card.text
    assert "| mIoU of this file in its training's validation | 41.25, after iteration 300 |" in (
        card.text
    )
    assert "resized to fit into 48x24 pixels; the network sees the whole image |" in card.text


def test_the_card_of_published_weights(tmp_path, monkeypatch):
    path = tiny_eval.write_checkpoint(tmp_path)
    digits = read_checkpoint(path).sha256[:8]
    slide = Protocol((64, 32), "slide", (32, 48), (16, 24))
    entry = replace(zoo.ZOO[tiny_eval.NAME], source="mmseg", sha256=digits, protocol=slide)
    monkeypatch.setitem(zoo.ZOO, tiny_eval.NAME, entry)
    model = HubEMANet.from_checkpoint(path)
    card = model.generate_model_card("you/streets")
    assert card.data.license == "apache-2.0"
    assert "| 19 classes of Cityscapes | road, sidewalk, " in card.text
    assert "published it | 50.0 on Cityscapes val, 60.0 with 6 scales and mirroring |" in card.text
    assert "; the network sees overlapping windows of 48x32 pixels |" in card.text
    assert f"`tiny.pth`, SHA-256 `{digits}" in card.text
    assert 'HubEMANet.from_pretrained("you/streets")' in card.text
    nn.init.ones_(model.decode_head.conv_seg.bias)
    changed = model.generate_model_card()
    assert changed.data.license is None
    assert "tiny.pth" not in changed.text
    assert "mmsegmentation" not in changed.text
    monkeypatch.setitem(zoo.ZOO, tiny_eval.NAME, replace(entry, sha256="00000000"))
    other = HubEMANet.from_checkpoint(path).generate_model_card(license="mit")
    assert "mmsegmentation" not in other.text
    assert other.data.license == "mit"


def test_other_checkpoints_need_what_they_do_not_say(tmp_path):
    path = tiny_eval.write_checkpoint(tmp_path, "mine.pth", num_classes=3)
    with pytest.raises(InputError, match=r"mine\.pth: neither its name nor its hash"):
        HubEMANet.from_checkpoint(path)
    with pytest.raises(InputError, match="The file is for 3 classes, the model for 19"):
        HubEMANet.from_checkpoint(path, tiny_eval.NAME)
    broken = tmp_path / "broken.pth"
    torch.save(
        {"meta": {"emanet_triton": "{"}, "state_dict": torch.load(path)["state_dict"]}, broken
    )
    with pytest.raises(InputError, match=r"broken\.pth: its description of a model is broken"):
        HubEMANet.from_checkpoint(broken, tiny_eval.NAME)
    data = tmp_path / "beach.toml"
    data.write_text(
        'images = "i/{split}/{name}.png"\nlabels = "l/{split}/{name}.png"\n'
        'classes = ["sea", "sand", "sky"]\n'
    )
    model = HubEMANet.from_checkpoint(path, tiny_eval.NAME, str(data))
    assert model.description.classes == CLASSES


class Repository(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder as the Hub serves those of the repository you/beach."""

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/you/beach/resolve/main"))

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(folder, monkeypatch):
    """The address of a Hub with the repository you/beach."""
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Repository, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_repository(tmp_path, trained, endpoint):
    cache = {"cache_dir": tmp_path / "cache"}
    model = HubEMANet.from_pretrained("you/beach", endpoint=endpoint, **cache)
    assert same(model, trained)
    assert same(HubEMANet.from_pretrained("you/beach", local_files_only=True, **cache), trained)


def test_what_is_uploaded(trained, monkeypatch):
    uploads = []

    def upload(self, repo_id, folder_path, **options):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        uploads.append((repo_id, names, (Path(folder_path) / "README.md").read_text()))
        return "address"

    made = huggingface_hub.RepoUrl("https://huggingface.co/you/beach")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **options: made)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert trained.push_to_hub("you/beach", private=True) == "address"
    [(repo_id, names, card)] = uploads
    assert (repo_id, names) == ("you/beach", FILES)
    assert 'from_pretrained("you/beach")' in card


def refusal(source: object, **options: object) -> str:
    with pytest.raises(InputError) as raised:
        HubEMANet.from_pretrained(source, **options)
    return str(raised.value)


@pytest.mark.parametrize("source", ["you/none", "no such name!", "/no/folder", "a\0b"])
def test_what_cannot_be_downloaded(tmp_path, source):
    message = refusal(source, local_files_only=True, cache_dir=tmp_path)
    assert message.startswith(
        f"{source}: there is no such folder, and config.json of a repository of this name cannot "
        "be downloaded ("
    )
    assert "\n" not in message


def test_an_interrupted_download(monkeypatch):
    def fail(*_, **options):
        raise huggingface_hub.errors.HfHubHTTPError.__bases__[0]("peer closed connection")

    monkeypatch.setattr("emanet_triton.hub.hf_hub_download", fail)
    assert refusal("you/beach").endswith("cannot be downloaded (peer closed connection)")


def test_a_folder_that_cannot_be_written(tmp_path, trained):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: expected a folder that can be written"):
        trained.save_pretrained(tmp_path / "file")


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    odd = replace(TRAINED, info={"iteration": "many", "mIoU": math.nan})
    model = HubEMANet.from_checkpoint(write_trained(tmp_path / "best.safetensors", odd))
    assert model.description.info.keys() == {"file", "sha256"}
    assert "training's validation" not in model.generate_model_card().text


def test_damaged_folders(tmp_path, folder):
    config, weights = folder / "config.json", folder / "model.safetensors"
    text = config.read_text()
    config.write_text(text.replace('"iteration": 300', '"iteration": 301'))
    assert refusal(folder) == f"{weights}: describes another model than {config}"
    config.write_text("{")
    assert refusal(folder).startswith(f"{config}: its description of a model is broken (")
    config.write_bytes(b"\xff")
    assert refusal(folder).startswith(f"{config}: 'utf-8' codec can't decode byte")
    config.write_text(text.replace(f'"{tiny_eval.NAME}"', '"unknown"'))
    write_trained(weights, {})  # weights that say nothing of themselves
    assert refusal(folder).startswith(f"{config}: unknown model 'unknown'; expected a model such")
    config.write_text(text)
    assert HubEMANet.from_pretrained(folder).num_classes == len(CLASSES)
    write_trained(weights, {"emanet_triton": "{"})
    assert refusal(folder).startswith(f"{weights}: its description of a model is broken (")
    write_trained(weights, {}, num_classes=4)
    assert refusal(folder).startswith(f"{weights}: does not fit the model")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert refusal(folder).startswith(f"{weights}: cannot be read (")
    weights.unlink()
    assert refusal(folder).startswith(f"{weights}: no such file")
    config.unlink()
    assert refusal(folder) == f"{config}: cannot be read (No such file or directory)"


def test_other_networks(monkeypatch):
    other = type("Other", (zoo.Network,), {})
    monkeypatch.setitem(zoo.ZOO, "other", replace(zoo.ZOO[tiny_eval.NAME], network=other))
    with pytest.raises(InputError, match="expected an EMANet, but other is another network"):
        HubEMANet(replace(TRAINED, model="other"))


@pytest.mark.parametrize("count", [0, 256])
def test_too_few_or_too_many_classes(count):
    with pytest.raises(InputError, match=f"expected 1 to 255 classes, got {count}"):
        HubEMANet(replace(TRAINED, classes=("sea",) * count))
