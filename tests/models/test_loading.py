"""Loading checkpoints into networks: everything fits, or nothing is loaded."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import save, tiny_emanet, weights
from golden_data import listed_keys

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.loading import load_into
from emanet_triton.models.zoo import ZOO


def read_tiny(folder: Path, **options) -> Checkpoint:
    return read_checkpoint(save(tiny_emanet(**options).state_dict(), folder / "tiny.pth"))


def test_loads_every_entry(tmp_path):
    checkpoint = read_tiny(tmp_path)
    model = tiny_emanet()
    load_into(model, checkpoint)
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint.state_dict[key]), key


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_floats_to_the_model(tmp_path, stored):
    state_dict = {
        key: value.to(stored) if value.is_floating_point() else value
        for key, value in tiny_emanet().state_dict().items()
    }
    checkpoint = read_checkpoint(save(state_dict, tmp_path / "x.pth"))
    assert checkpoint.state_dict["backbone.stem.0.weight"].dtype == stored
    model = tiny_emanet()
    load_into(model, checkpoint)
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.int64 if "num_batches" in key else torch.float32)
        assert torch.equal(value, state_dict[key].to(value.dtype)), key


def test_shares_its_tensors_with_a_model_without_memory_of_its_own(tmp_path):
    checkpoint = read_tiny(tmp_path)
    with torch.device("meta"):
        model = tiny_emanet()
    load_into(model, checkpoint, share=True)
    for key, value in model.state_dict().items():
        assert value.data_ptr() == checkpoint.state_dict[key].data_ptr(), key


def test_a_released_checkpoint_is_read_again(tmp_path):
    checkpoint = read_tiny(tmp_path)
    want = dict(checkpoint.state_dict)
    checkpoint.release()
    assert not checkpoint.state_dict
    model = tiny_emanet()
    load_into(model, checkpoint)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    with checkpoint.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="its SHA-256 begins with"):
        load_into(model, checkpoint)


def mismatch(model: torch.nn.Module, checkpoint: Checkpoint) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_into(model, checkpoint)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[key]), f"{key} was loaded"
    return str(error.value)


def test_lists_each_kind_of_mismatch_and_loads_nothing(tmp_path):
    checkpoint = read_tiny(tmp_path)
    state_dict = checkpoint.state_dict
    del state_dict["backbone.stem.1.running_mean"]
    state_dict["extra.weight"] = torch.ones(1)
    state_dict["decode_head.conv_cat.bn.bias"] = torch.ones(9)
    state_dict["decode_head.conv_cat.bn.weight"] = torch.ones(8, dtype=torch.int64)
    state_dict["decode_head.conv_cat.bn.num_batches_tracked"] = torch.tensor(1j)
    assert mismatch(tiny_emanet(), checkpoint) == (
        f"{checkpoint.path}: does not fit the model\n"
        "missing from the file (1):\n"
        "  backbone.stem.1.running_mean\n"
        "left over in the file (1):\n"
        "  extra.weight\n"
        "of another shape or type (3):\n"
        "  decode_head.conv_cat.bn.weight: file int64, model float32\n"
        "  decode_head.conv_cat.bn.bias: file [9], model [8]\n"
        "  decode_head.conv_cat.bn.num_batches_tracked: file complex64, model int64"
    )


@pytest.mark.parametrize("share", [False, True])
def test_the_auxiliary_head_may_be_missing(tmp_path, share):
    checkpoint = read_tiny(tmp_path)
    for key in [key for key in checkpoint.state_dict if key.startswith("auxiliary_head")]:
        del checkpoint.state_dict[key]
    model = tiny_emanet()
    want = {**model.state_dict(), **checkpoint.state_dict}
    want = {key: value.clone() for key, value in want.items()}
    with pytest.warns(UserWarning) as caught:
        load_into(model, checkpoint, share)
    assert [str(w.message) for w in caught] == [
        f"{checkpoint.path}: has no auxiliary head, which only training uses; none is loaded"
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, want[key]), key


def test_a_meta_model_gets_zeros_for_a_missing_auxiliary_head(tmp_path):
    checkpoint = read_tiny(tmp_path)
    for key in [key for key in checkpoint.state_dict if key.startswith("auxiliary_head")]:
        del checkpoint.state_dict[key]
    with torch.device("meta"):
        model = tiny_emanet()
    with pytest.warns(UserWarning, match="has no auxiliary head, .*; none is loaded$"):
        load_into(model, checkpoint, share=True)
    assert not model.auxiliary_head.conv_seg.weight.any()


def test_a_meta_model_has_no_memory_to_copy_to(tmp_path):
    with torch.device("meta"):
        model = tiny_emanet()
    with pytest.raises(ValueError, match="a model on the meta device has no memory for weights"):
        load_into(model, read_tiny(tmp_path))


def test_a_weight_that_cannot_be_written_leaves_all_others_alone(tmp_path):
    model = tiny_emanet()
    bias = model.decode_head.conv_seg.bias
    bias.data = torch.zeros(1).expand(19)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_into(model, read_tiny(tmp_path))
    assert str(raised.value) == (
        "decode_head.conv_seg.bias is expanded: several of its elements share memory"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_of_inference_mode_is_written_there_only(tmp_path):
    checkpoint = read_tiny(tmp_path)
    with torch.inference_mode():
        model = tiny_emanet()
    with pytest.raises(ValueError) as raised:
        load_into(model, checkpoint)
    assert str(raised.value) == (
        "backbone.stem.0.weight was made in inference mode and can be written there only; make "
        "the model outside torch.inference_mode"
    )
    with torch.inference_mode():
        load_into(model, checkpoint)
        for key, value in model.state_dict().items():
            assert torch.equal(value, checkpoint.state_dict[key]), key


def test_a_loss_beside_a_wrapped_network_is_left_out(tmp_path):
    """As a Lightning module keeps it."""
    weights = tiny_emanet().state_dict()
    content = {f"model.{key}": value for key, value in weights.items()}
    content["criterion.weight"] = torch.ones(19)
    path = save(content, tmp_path / "x.pth")
    model = tiny_emanet()
    with pytest.warns(UserWarning) as caught:
        load_into(model, read_checkpoint(path))
    assert [str(w.message) for w in caught] == [
        f"{path}: leaves out 1 of its entries, which no network uses, first criterion.weight"
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_half_an_auxiliary_head_is_refused(tmp_path):
    checkpoint = read_tiny(tmp_path)
    del checkpoint.state_dict["auxiliary_head.conv_seg.bias"]
    assert mismatch(tiny_emanet(), checkpoint) == (
        f"{checkpoint.path}: does not fit the model\n"
        "missing from the file (1):\n"
        "  auxiliary_head.conv_seg.bias"
    )


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        ["decode_head.loss_decode.class_weight", "auxiliary_head.loss_decode.0.class_weight"],
        ["ce_loss.weight"],
        ["criterion.weight"],
        ["loss_fn.weight", "loss.weight", "loss_function.weight"],
        ["val_iou.confmat"],
        ["mean", "std"],
        ["model.mean", "model.std"],
        ["data_preprocessor.mean", "data_preprocessor.std"],
    ],
    ids=lambda keys: keys[0],
)
def test_what_a_training_puts_beside_the_network_is_left_out(tmp_path, keys, share):
    state_dict = tiny_emanet().state_dict()
    extras = {key: torch.ones(19) for key in keys}
    checkpoint = read_checkpoint(save({**extras, **state_dict}, tmp_path / "x.pth"))
    model = tiny_emanet()
    with pytest.warns(UserWarning) as caught:
        load_into(model, checkpoint, share)
    assert [str(w.message) for w in caught] == [
        f"{checkpoint.path}: leaves out {len(keys)} of its entries, which no network uses, "
        f"first {keys[0]}"
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key]), key


def test_a_loss_alone_is_no_auxiliary_head(tmp_path):
    state_dict = {
        key: value
        for key, value in tiny_emanet().state_dict().items()
        if not key.startswith("auxiliary_head.")
    }
    state_dict["auxiliary_head.loss_decode.class_weight"] = torch.ones(19)
    path = save(state_dict, tmp_path / "x.pth")
    with pytest.warns(UserWarning) as caught:
        load_into(tiny_emanet(), read_checkpoint(path))
    assert [str(w.message) for w in caught] == [
        f"{path}: leaves out 1 of its entries, which no network uses, "
        "first auxiliary_head.loss_decode.class_weight",
        f"{path}: has no auxiliary head, which only training uses; none is loaded",
    ]


@pytest.mark.parametrize("part", ["backbone", "decode_head", "auxiliary_head"])
def test_what_the_network_lacks_inside_its_parts_is_an_error(tmp_path, part):
    checkpoint = read_tiny(tmp_path)
    checkpoint.state_dict[f"{part}.more.weight"] = torch.ones(1)
    assert mismatch(tiny_emanet(), checkpoint) == (
        f"{checkpoint.path}: does not fit the model\n"
        "left over in the file (1):\n"
        f"  {part}.more.weight"
    )


def test_names_another_architecture(tmp_path):
    message = mismatch(tiny_emanet(blocks=(1, 1, 3, 1)), read_tiny(tmp_path))
    assert message.count("\n  ") == 9
    assert "missing from the file (30):\n  backbone.layer3.1.conv1.weight\n" in message
    assert "\n  ... and 22 more\n" in message
    assert message.endswith(
        "\nThe file's backbone has 1-1-1-1 blocks, the model's 1-1-3-1: "
        "the file is of another architecture."
    )


def test_names_another_class_count(tmp_path):
    message = mismatch(tiny_emanet(num_classes=21), read_tiny(tmp_path))
    assert "decode_head.conv_seg.weight: file [19, 8, 1, 1], model [21, 8, 1, 1]" in message
    assert message.endswith(
        "\nThe file is for 19 classes, the model for 21; create_model takes num_classes=, "
        "and the commands eval, predict and export take --data FILE.toml with the classes."
    )


def test_names_a_file_of_no_emanet(tmp_path):
    checkpoint = read_checkpoint(save(weights(), tmp_path / "x.pth"))
    message = mismatch(tiny_emanet(), checkpoint)
    assert "left over in the file (3):\n  conv.weight\n" in message
    assert message.endswith(
        "The file's backbone has no blocks, the model's 1-1-1-1: "
        "the file is of another architecture."
    )


@pytest.mark.parametrize(("name", "other"), [("r50", "r101"), ("r101", "r50")])
def test_published_structure_fits_its_network_alone(name, other):
    state_dict = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in listed_keys(name)
    }
    checkpoint = Checkpoint(Path("x.pth"), "0" * 64, state_dict, {})
    networks = {}
    for key in (name, other):
        entry = ZOO[f"emanet_{key}-d8_512x1024_80k_cityscapes"]
        with torch.device("meta"):
            networks[key] = EMANet(entry.architecture, entry.protocol)
    assert list(networks[name].state_dict()) == list(state_dict)
    message = mismatch(networks[other], checkpoint)
    blocks = {"r50": "3-4-6-3", "r101": "3-4-23-3"}
    assert f"has {blocks[name]} blocks, the model's {blocks[other]}:" in message
    assert ("missing" if name == "r50" else "left over") + " " in message
