"""Every kind of file computes what the evaluation computes, and says what it is."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from exports import PADDED, PROTOCOLS, WHOLE, check_labels, pictures, tiny, wrong_labels
from torch_version import needs_free_sizes

import emanet_triton
from emanet_triton import export
from emanet_triton.deploy import formats, verify
from emanet_triton.deploy.program import METADATA, Request, default_size, make_program
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import Description
from emanet_triton.models.zoo import ZOO

ABOUT = Description("emanet_demo", tuple("abcde"), WHOLE, None, {})
FREE = [(1, (64, 128)), (3, (37, 52)), (1, (150, 40)), (2, (40, 261))]


def is_fine(exported):
    assert exported.checks
    assert all(check.passed for check in exported.checks)
    return all(file.stat().st_size for file in exported.files)


@pytest.fixture(scope="module", params=PROTOCOLS)
def free(request):
    """A protocol, a model, and the program from images of all sizes to labels."""
    protocol = PROTOCOLS[request.param]
    model = tiny(protocol)
    wanted = Request(
        model, protocol, "image-to-labels", "fp32", (64, 128), None, True, "standard", ABOUT
    )
    return protocol, model, make_program(wanted)


@needs_free_sizes
def test_a_program_for_all_sizes(free):
    protocol, model, program = free
    labels = program.exported.module()
    for batch, size in FREE:
        images = pictures(batch, size)
        assert wrong_labels(model, protocol, images, labels(images)) == 0


def test_onnx_for_all_sizes(free):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    protocol, model, program = free
    content = formats.onnx_model(program)
    session = runtime.InferenceSession(content.SerializeToString())
    for batch, size in FREE:
        images = pictures(batch, size)
        (labels,) = session.run(None, {"images": images.numpy()})
        assert wrong_labels(model, protocol, images, torch.from_numpy(labels)) == 0

    onnx.checker.check_model(content)
    assert [(each.domain, each.version) for each in content.opset_import] == [("", formats.OPSET)]
    assert {node.domain for node in content.graph.node} == {""}
    given, found = content.graph.input[0], content.graph.output[0]
    axes = [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim]
    assert (given.name, axes) == ("images", ["batch", "height", "width", 3])
    axes = [axis.dim_param for axis in found.type.tensor_type.shape.dim]
    assert (found.name, axes) == ("labels", ["batch", "height", "width"])
    (text,) = (each.value for each in content.metadata_props if each.key == METADATA)
    about = json.loads(text)
    assert about["classes"] == list("abcde")
    shape = ["batch", "height", "width", 3]
    assert about["input"] == {"dtype": "uint8", "shape": shape, "values": "RGB, 0 to 255"}


def test_logits_of_all_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "logits.onnx"
    exported = export(tiny(), file, to="onnx", dynamic=True)
    assert is_fine(exported)
    compared = [(check.batch, check.size) for check in exported.checks]
    assert compared == [(1, (64, 128)), (2, (33, 63)), (3, (42, 16))]
    assert exported.files == (file,) == tuple(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "suffix", "precision"),
    [("onnx", ".onnx", "fp16"), ("openvino", ".xml", "fp32"), ("openvino", ".xml", "fp16")],
)
def test_logits_of_one_size(tmp_path, to, suffix, precision):
    pytest.importorskip(formats.FORMATS[to].runtime)
    file = tmp_path / f"logits{suffix}"
    (tmp_path / "logits.bin").write_text("mine")
    if to == "openvino":
        with pytest.raises(InputError, match=r"logits\.bin: exists already"):
            export(tiny(), file, to=to)
    exported = export(tiny(), file, to=to, precision=precision, batch=2, overwrite=True)
    assert is_fine(exported)
    (check,) = exported.checks
    assert (check.batch, check.size) == (2, (64, 128))
    assert exported.files[0] == file
    assert {*exported.files, tmp_path / "logits.bin"} == set(tmp_path.iterdir())


def test_a_program_of_standard_operators_needs_no_import(tmp_path):
    file = tmp_path / "labels.pt2"
    model = tiny()
    exported = export(model, file, to="torch", part="image-to-labels", size=(50, 70))
    assert is_fine(exported) and exported.notes == ()
    images = pictures(1, (50, 70))[0]
    torch.save(images, tmp_path / "image.pt")
    code = (
        "import sys, torch; sys.modules['emanet_triton'] = None;"
        f"extra = {{{METADATA!r}: ''}};"
        f"program = torch.export.load({str(file)!r}, extra_files=extra);"
        f"labels = program.module()(torch.load({str(tmp_path / 'image.pt')!r}));"
        f"torch.save((labels, extra), {str(tmp_path / 'labels.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    labels, extra = torch.load(tmp_path / "labels.pt")
    assert wrong_labels(model, WHOLE, images[None], labels[None]) == 0
    assert json.loads(extra[METADATA])["operators"] == "standard"


def test_a_program_of_own_operators_says_so(tmp_path):
    exported = export(tiny(), tmp_path / "logits.pt2", to="torch", operators="own")
    assert is_fine(exported)
    assert "must import emanet_triton" in exported.notes[0]
    program = torch.export.load(tmp_path / "logits.pt2")
    assert "emanet_triton.em_attention_block" in str(program.graph)


def test_a_program_of_a_plain_model_does_not_fix_the_backend():
    with torch.no_grad():
        program = torch.export.export(tiny(), (torch.zeros(1, 3, 32, 32),))
    (node,) = (n for n in program.graph.nodes if "em_attention" in str(n.target))
    assert "auto" in node.args


def test_weights(tmp_path):
    name = "emanet_demo"
    model = emanet_triton.create_model(name, pretrained=True)
    about = replace(ABOUT, model=name, classes=tuple(c.name for c in ZOO[name].dataset.classes))
    file = tmp_path / "weights.safetensors"
    assert is_fine(export(model, file, to="safetensors", size=(32, 64), about=about))
    again = emanet_triton.create_model(name, checkpoint=file)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_a_model_says_what_it_is(tmp_path):
    model = emanet_triton.create_model("emanet_demo")
    about = {"model": "emanet_demo", "classes": list(emanet_triton.class_names())}
    own = tiny()
    for network, wanted in (model, about), (own, {"model": None, "classes": None}):
        request = Request(
            network, WHOLE, "logits", "fp32", (32, 32), None, False, "standard", network.description
        )
        assert wanted.items() <= request.description().items()
    file = tmp_path / "weights.safetensors"
    model.protocol = replace(model.protocol, base_scale=(96, 48))
    assert is_fine(export(model, file, to="safetensors", size=(32, 64)))
    again = emanet_triton.create_model(checkpoint=file)
    assert again.description == model.description
    assert again.protocol == model.protocol


def test_weights_of_another_project_without_a_description(tmp_path):
    model, file = tiny(), tmp_path / "weights.safetensors"
    model.architecture = replace(model.architecture, layout="paddleseg")
    assert is_fine(export(model, file, to="safetensors", size=(32, 64)))
    assert read_checkpoint(file).layout == "paddleseg"


def test_a_package_of_aotinductor(tmp_path):
    file = tmp_path / "logits.pt2"
    exported = export(tiny(), file, to="aoti", size=(32, 48), about=ABOUT)
    assert is_fine(exported) and "compiled for a cpu" in exported.notes[0]
    package = torch._inductor.aoti_load_package(str(file))
    assert json.loads(package.get_metadata()[METADATA])["model"] == "emanet_demo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx", "precision": "bf16"}, "no bfloat16 convolution"),
        ({"to": "openvino", "precision": "bf16"}, "INFERENCE_PRECISION_HINT=bf16"),
        ({"to": "onnx", "operators": "own"}, "expected --operators standard"),
        ({"to": "safetensors", "part": "labels"}, "the model's weights alone"),
        ({"to": "safetensors", "batch": 2}, "no batch"),
        ({"to": "safetensors", "protocol": replace(WHOLE, base_scale=(64, 32))}, "no batch"),
        ({"to": "torch", "size": (8, 64)}, "size of 8x64 pixels is too small"),
        ({"to": "torch", "part": "labels", "protocol": replace(WHOLE, base_scale=None)}, "--size"),
        (
            {"to": "torch", "part": "image-to-labels", "dynamic": True, "protocol": PADDED},
            "does not both resize images and pad them to a size; expected --scale native",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, options, message):
    suffix = formats.FORMATS[options["to"]].suffix
    with pytest.raises(InputError, match=message) as raised:
        export(tiny(), tmp_path / f"file{suffix}", **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "tflite"}, "to must be one of onnx"),
        ({"to": "torch", "part": "features"}, "part must be one of logits"),
        ({"to": "torch", "precision": "int8"}, "precision must be one of fp32"),
        ({"to": "torch", "operators": "mine"}, "operators must be one of standard"),
        ({"to": "torch", "batch": 0}, "batch must be an int of at least 1"),
        ({"to": "torch", "batch": True}, "batch must be an int of at least 1"),
        ({"to": "torch", "size": 64}, "size must be"),
        ({"to": "torch", "size": (64.0, 64)}, "size must be"),
        ({"to": "torch", "size": (64, 64, 3)}, "size must be"),
        ({"to": "torch", "batch": 2, "dynamic": True}, "not dynamic"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(tiny(), tmp_path / "file.pt2", **options)


def test_models_that_cannot_be_exported(tmp_path):
    file = tmp_path / "file.pt2"
    with pytest.raises(ValueError, match=r"call model\.eval"):
        export(tiny().train(), file, to="torch")
    with pytest.raises(ValueError, match="not fused"):
        export(emanet_triton.fuse(tiny()), file, to="torch")
    model = tiny()
    model.decode_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hook"):
        export(model, file, to="torch")


def test_names_of_files(tmp_path):
    file = tmp_path / "file.pt2"
    with pytest.raises(InputError, match=r"ends in \.onnx"):
        export(tiny(), file, to="onnx")
    file.write_text("mine")
    with pytest.raises(InputError, match=r"file\.pt2: exists already"):
        export(tiny(), file, to="torch")
    assert file.read_text() == "mine"
    assert is_fine(export(tiny(), file, to="torch", size=(32, 32), overwrite=True))
    with pytest.raises(InputError, match=r"file\.pt2: expected a folder that can be written"):
        export(tiny(), file / "inside.pt2", to="torch")


@needs_free_sizes
def test_padding_of_all_sizes(tmp_path):
    native = replace(PADDED, base_scale=None)
    options = {"part": "labels", "dynamic": True, "size": (43, 60)}
    exported = export(tiny(native), tmp_path / "labels.pt2", to="torch", **options)
    assert [check.size for check in exported.checks] == [(43, 60), (22, 29), (20, 16)]
    assert is_fine(exported)


def test_a_file_with_wrong_results_is_not_kept(tmp_path, monkeypatch):
    right = formats.FORMATS["torch"]
    monkeypatch.setitem(
        formats.FORMATS,
        "torch",
        replace(right, run=lambda *given: lambda x: right.run(*given)(x) * 1.001),
    )
    with pytest.raises(
        InputError, match=r"not kept.* 1 image of 32x32: logits, relative error 1\.0e-03"
    ):
        export(tiny(), tmp_path / "file.pt2", to="torch", size=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    link, file = tmp_path / "link.pt2", tmp_path / "folder" / "file.pt2"
    file.parent.mkdir()
    file.write_text("mine")
    file.chmod(0o600)
    link.symlink_to(file)
    exported = export(tiny(), link, to="torch", size=(32, 32), overwrite=True)
    assert is_fine(exported) and exported.files == (link,)
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    file = tmp_path / "file.pt2"
    right = formats.FORMATS["torch"]

    def write(request, path):
        right.write(request, path)
        file.write_text("mine")

    monkeypatch.setitem(formats.FORMATS, "torch", replace(right, write=write))
    with pytest.raises(InputError, match=r"file\.pt2: exists already"):
        export(tiny(), file, to="torch", size=(32, 32))
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_logits_that_are_not_finite_cannot_be_compared(tmp_path):
    model = tiny()
    model.decode_head.conv_seg.weight.data.fill_(3e38)
    for part in ("logits", "labels"):
        with pytest.raises(InputError, match="cannot be compared: the logits of the network are"):
            export(model, tmp_path / "file.pt2", to="torch", part=part, size=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_labels_have_eight_bits(tmp_path):
    model = tiny()
    model.num_classes = 256
    with pytest.raises(InputError, match="at most 255 classes, got 256"):
        export(model, tmp_path / "file.pt2", to="torch", part="labels")


def test_results_of_another_shape_or_dtype_are_wrong():
    wanted = torch.ones(1, 2, 3, 4)
    for got in (torch.ones(1, 1, 1, 1), torch.ones(1, 2, 3, 4, dtype=torch.float64)):
        assert not verify.logits_check(got, wanted, 1, (24, 32), "fp32").passed
    images = pictures(1, (32, 48))
    (right,) = emanet_triton.Predictor(tiny(), WHOLE).results(list(images.numpy()))
    assert check_labels(tiny(), WHOLE, images, right).passed
    for got in (right[:, :1], right.int(), torch.full_like(right, 255)):
        check = check_labels(tiny(), WHOLE, images, got)
        assert not check.passed
        assert check.beyond == 32 * 48


def test_labels_are_wrong_only_beyond_near_ties():
    images = pictures(1, (64, 128))
    predictor = emanet_triton.Predictor(tiny(), WHOLE)
    (labels,), (probabilities,) = predictor.results(list(images.numpy()), probabilities=True)
    best = probabilities.topk(2, dim=0)
    margin = best.values[0] - best.values[1]
    for pixel, beyond in ((margin.argmin(), 0), (margin.argmax(), 1)):
        changed = labels.clone()
        changed.view(-1)[pixel] = best.indices[1].flatten()[pixel]
        check = check_labels(tiny(), WHOLE, images, changed[None])
        assert check.beyond == beyond and check.passed == (beyond == 0)
        assert check.error == 1 / labels.numel()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript is needed.*: pip install '\.\[export\]'$"):
        export(tiny(), tmp_path / "file.onnx", to="onnx")


def test_without_a_runtime_nothing_is_compared(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(
        formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], runtime="no_such_runtime")
    )
    exported = export(tiny(), tmp_path / "file.onnx", to="onnx", size=(32, 32))
    assert exported.checks == ()
    assert "no_such_runtime is missing" in exported.notes[0]


def test_default_sizes():
    assert default_size(WHOLE, "logits") == (64, 128)
    slide = PROTOCOLS["slide"]
    assert default_size(slide, "logits") == slide.crop
    assert default_size(slide, "labels") == (65, 129)


def test_default_sizes_where_images_keep_their_own():
    own = replace(WHOLE, base_scale=None)
    padded = replace(own, pad_size=(48, 64))
    assert default_size(padded, "logits") == (48, 64)
    assert default_size(padded, "image-to-labels", any_size=True) == (48, 64)
    assert default_size(own, "logits", any_size=True) == (512, 512)
    for protocol, part in (own, "logits"), (padded, "image-to-labels"), (padded, "labels"):
        with pytest.raises(InputError, match="expected --size, such as"):
            default_size(protocol, part)
