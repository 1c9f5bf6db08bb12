"""What is behind the page, without gradio and without a browser; ``browser.py`` has these."""

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from emanet_triton import create_model, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.overlay import overlay
from emanet_triton.data.picture import read_picture
from emanet_triton.data.png import write_png
from emanet_triton.data.scenes.generate import VAL_SEEDS, generate_scene
from emanet_triton.errors import InputError
from emanet_triton.models.entries import DEMO
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import list_models
from emanet_triton.web import __main__ as command
from emanet_triton.web import page, texts
from emanet_triton.web.desk import Desk
from emanet_triton.web.segmenter import Choice, Result, Segmenter, precisions, protocol_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def image():
    return cv2.resize(generate_scene(VAL_SEEDS[0])[0], (128, 64), interpolation=cv2.INTER_AREA)


@pytest.fixture
def path(image, tmp_path):
    write_png(tmp_path / "scene.png", image)
    return tmp_path / "scene.png"


@pytest.fixture
def overlays(tmp_path):
    (tmp_path / "overlays").mkdir()
    return page.Overlays(tmp_path / "overlays", kept=3)


def result_of(image, labels) -> Result:
    return Result(image, labels, CITYSCAPES, Choice(DEMO), 0.5, "fused")


def test_areas_are_sorted_and_leave_out_what_is_no_class():
    labels = np.full((10, 10), 255, np.uint8)
    labels[:2], labels[2:5], labels[5, 0], labels[6, 0] = 0, 10, 2, 1
    found = texts.areas(labels, CITYSCAPES)
    assert [(area.name, area.percent) for area in found] == [
        ("sky", 30),
        ("road", 20),
        ("sidewalk", 1),
        ("building", 1),
    ]
    assert found[0].color == CITYSCAPES.classes[10].color


def test_the_list_of_areas():
    listed = texts.area_list(
        [texts.Area("a<b", (1, 2, 3), 99.96), texts.Area("small", (4, 5, 6), 0.04)]
    )
    assert "rgb(1, 2, 3)" in listed
    assert "a&lt;b</span><b>100.0 %" in listed
    assert "small</span><b>&lt; 0.1 %" in listed


def test_the_summary_names_the_time_and_the_choices():
    labels = np.zeros((4, 6), np.uint8)
    summary = texts.summary(result_of(None, labels), "cpu")
    assert "<b>0.500 s</b> for 6×4 pixels on cpu" in summary
    assert "emanet_demo, fp32, single view, protocol&#x27;s size, fused network" in summary


def test_only_the_demonstration_is_called_useless_on_photos():
    notes = {name: texts.model_note(name) for name in list_models()}
    assert [name for name, note in notes.items() if "useless" in note] == [DEMO]
    assert "is downloaded" in notes[list_models()[0]]


def test_a_picture_is_answered(path, image, overlays):
    chosen = Choice(DEMO, ms_flip=True, own_size=True)
    result, drawn, summary, listed = page.answer(Segmenter(CPU), overlays, path, chosen, 0.4)
    network = verified_fuse(create_model(DEMO, pretrained=True))
    protocol = protocol_of(network, chosen)
    labels = segment(network, image, ms_flip=True, protocol=protocol)
    np.testing.assert_array_equal(result.labels, labels)
    wanted = overlay(image, labels, CITYSCAPES, alpha=0.4, legend=False)
    np.testing.assert_array_equal(read_picture(Path(drawn)), wanted)
    assert "ms+flip, own size, fused network" in summary
    assert texts.areas(labels, CITYSCAPES)[0].name in listed


def test_the_size_for_the_network():
    network = create_model(DEMO)
    assert protocol_of(network, Choice(DEMO)) is network.protocol
    own = protocol_of(network, Choice(DEMO, own_size=True))
    assert own.base_scale is None
    assert own.ratios == network.protocol.ratios


def test_errors_are_one_line_and_the_page_goes_on(path, overlays, tmp_path, monkeypatch, capfd):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    segmenter, wrong = Segmenter(CPU), tmp_path / "wrong.png"
    wrong.write_bytes(b"no picture")

    def problem(file, model=DEMO):
        result, drawn, summary, listed = page.answer(segmenter, overlays, file, Choice(model), 0.5)
        assert (result, drawn, listed) == (None, None, "")
        assert summary.count("problem") == 1 and "\n" not in summary
        return summary

    assert "there is no picture" in problem(None)
    assert "wrong.png: not a readable picture" in problem(wrong)
    assert str(tmp_path) not in problem(wrong)
    assert "cannot be downloaded" in problem(path, list_models()[0])
    assert capfd.readouterr().err.count("Traceback") == 0
    assert page.answer(segmenter, overlays, path, Choice(DEMO), 0.5)[0] is not None
    assert "cannot be downloaded" in problem(path, list_models()[0])

    def broken(*_):
        raise RuntimeError("the device is <lost>\nmore")

    segmenter._load = broken
    assert "RuntimeError: the device is &lt;lost&gt;" in problem(path)
    assert "Traceback" in capfd.readouterr().err


def test_old_overlays_are_deleted(image, overlays, tmp_path):
    result = result_of(image, np.zeros(image.shape[:2], np.uint8))
    paths = [Path(overlays.draw(result, alpha)) for alpha in (0, 0.25, 0.5, 0.75, 1)]
    assert sorted((tmp_path / "overlays").iterdir()) == sorted(paths[2:])
    assert len(set(paths)) == 5
    assert (read_picture(paths[4]) == CITYSCAPES.classes[0].color).all()


def test_one_network_is_kept():
    segmenter = Segmenter(CPU)
    first = segmenter._load(DEMO, "fp32")
    assert segmenter._load(DEMO, "fp32") is first
    gone = weakref.ref(first)
    del first
    assert next(segmenter._load(DEMO, "bf16").parameters()).dtype == torch.bfloat16
    gc.collect()
    assert gone() is None


def test_precisions():
    assert precisions(CPU) == ["fp32", "bf16"]
    assert precisions(torch.device("cuda")) == ["fp32", "bf16", "fp16"]


def test_the_desk_works_in_order_and_keeps_errors_to_the_caller():
    desk, done = Desk(), []

    def work(name):
        done.append((name, threading.current_thread()))
        if name == "bad":
            raise InputError("bad")
        if name == "end":
            raise KeyboardInterrupt
        return name

    names = ("first", "bad", "cancelled", "last", "end")
    futures = {name: desk.ask(work, name) for name in names}
    futures["cancelled"].cancel()
    with pytest.raises(KeyboardInterrupt):
        desk.work()
    assert done == [(name, threading.current_thread()) for name in names if name != "cancelled"]
    assert futures["first"].result() == "first"
    assert futures["last"].result() == "last"
    with pytest.raises(InputError, match="bad"):
        futures["bad"].result()


def test_without_gradio(tmp_path):
    """One message says what to install. Nothing before it needs gradio."""
    code = "import sys; sys.modules['gradio'] = None"  # what find_spec then says
    (tmp_path / "sitecustomize.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "emanet_triton.web", "--no-browser"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: the page needs the package gradio; install it: pip install '.[web]'\n"
    )


def test_an_old_gradio(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(command, "package_version", lambda name: "5.49.1")
    assert command.main(["--no-browser"]) == 2
    assert "gradio 5.49.1 is too old for the page" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "expected a number of 0 to 65535, got '65536'"),
        (["--device", "nowhere"], "--device nowhere: no such device here"),
        (["--share"], "unrecognized arguments: --share"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "_require_gradio", lambda: None)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(monkeypatch, capsys):
    monkeypatch.setattr(command, "_require_gradio", lambda: None)
    with command.socket.socket() as other:
        other.bind((page.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert command.main(["--port", str(port), "--device", "cpu"]) == 2
    assert f"--port {port}: cannot be used (Address already in use)" in capsys.readouterr().err


def test_a_port_that_another_program_takes_before_the_page_does(monkeypatch, capsys):
    monkeypatch.setattr(command, "_require_gradio", lambda: None)
    monkeypatch.setattr(command, "_draw_scenes", lambda folder: [])
    with command.socket.socket() as other:

        def serve(_, __, port, *___):
            other.bind((page.HOST, port))
            other.listen()
            raise OSError(f"Cannot find empty port in range: {port}-{port}.")  # as gradio does

        monkeypatch.setattr(command.page, "serve", serve)
        assert command.main(["--no-browser", "--device", "cpu"]) == 2
    assert "cannot be used (Address already in use); expected" in capsys.readouterr().err


def test_an_error_of_serving_that_is_not_the_ports(monkeypatch):
    monkeypatch.setattr(command, "_require_gradio", lambda: None)
    monkeypatch.setattr(command, "_draw_scenes", lambda folder: [])

    def serve(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(command.page, "serve", serve)
    with pytest.raises(OSError, match="No space left"):
        command.main(["--no-browser", "--device", "cpu"])


def test_the_page_is_served_until_ctrl_c(monkeypatch, capsys, tmp_path):
    served, opened, closed = [], [], []

    def serve(segmenter, desk, port, folder, examples):
        served.append((port, folder))
        assert [read_picture(path).shape for path in examples] == [(256, 512, 3)] * 3
        assert {path.parent for path in examples} == {folder}
        desk.ask(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        return lambda: closed.append(True)

    monkeypatch.setattr(command, "_require_gradio", lambda: None)
    monkeypatch.setattr(page, "serve", serve)
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    assert command.main(["--device", "cpu"]) == 2
    ((port, folder),) = served
    assert opened == [f"http://127.0.0.1:{port}/"]
    output, errors = capsys.readouterr()
    assert output == f"The page is at {opened[0]} (Ctrl-C ends it).\n"
    assert errors == "the page is closed\n"
    assert closed and not folder.exists()
