"""``examples/serve.py`` in a process of its own. ``make test-serve`` runs these tests."""

import csv
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from emanet_triton import class_names, create_model, fuse, overlay, segment
from emanet_triton.data.picture import decode_picture
from emanet_triton.data.png import encode_png
from emanet_triton.data.scenes.generate import generate_scene
from examples import load_test
from examples.load_test import Served

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(package, reason="install it by: make test-serve")

SERVE = Path(__file__).parents[2] / "examples" / "serve.py"
DEMO = ("--ckpt", "emanet_demo", "--device", "cpu", "--threads", "1")
WAITING = ("--batch-size", "64", "--wait-ms", "600000")  # until a signal or the time ends it
SECONDS = 60.0  # for what should happen soon, on a busy machine


def scene(number: int = 0) -> bytes:
    """A JPEG file, of one of three sizes."""
    image, _ = generate_scene(number, 96 + 32 * (number % 3), 256)
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


@pytest.fixture(scope="module")
def labels_of():
    """Computes the labels of a file in this process."""
    torch.set_num_threads(1)
    network = fuse(create_model("emanet_demo", pretrained=True))
    return lambda file: segment(network, decode_picture(file, "it"))


@pytest.fixture(scope="module")
def served():
    limits = ("--max-bytes", "300000", "--max-pixels", "50000")
    with Served(*DEMO, *limits, "--batch-size", "4", "--wait-ms", "100") as served:
        served.wait_until_ready()
        yield served


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def decoded(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)


def detail(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["detail"]


def form(*files: bytes) -> tuple[bytes, dict[str, str]]:
    """The body and the header of a form with a number and files."""
    body = io.BytesIO()
    body.write(b'--XX\r\nContent-Disposition: form-data; name="number"\r\n\r\n7\r\n')
    for file in files:
        body.write(b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n')
        body.write(file + b"\r\n")
    body.write(b"--XX--\r\n")
    return body.getvalue(), {"Content-Type": "multipart/form-data; boundary=XX"}


def test_clients_at_once_get_their_own_labels_and_share_batches(served, labels_of):
    files = [scene(i) for i in range(24)]
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda file: served.ask("/segment", file), files))
    for file, (status, png) in zip(files, answers, strict=True):
        assert status == 200
        assert np.array_equal(decoded(png), labels_of(file))
    assert served.metric("emanet_batch_images_sum") == 24
    assert served.metric("emanet_batch_images_count") < 24


def test_overlay_and_shares(served, labels_of):
    file = scene()
    labels = labels_of(file)
    status, png = served.ask("/segment?format=overlay", file)
    assert (status, png) == (200, encode_png(overlay(decode_picture(file, "it"), labels)))
    status, text = served.ask("/segment?format=json", file)
    answer = json.loads(text)
    assert (status, answer["height"], answer["width"]) == (200, *labels.shape)
    assert [each["name"] for each in answer["classes"]] == list(class_names())
    for each in answer["classes"]:
        assert each["share"] == pytest.approx((labels == each["index"]).mean())
    assert served.ask("/segment?format=jpeg", file)[0] == 422


def test_a_form(served, labels_of):
    connection = served.connect()
    for files, expected in (((scene(),), 200), ((), 422), ((scene(), scene(1)), 422)):
        connection.request("POST", "/segment", *form(*files))
        response = connection.getresponse()
        content = response.read()
        assert response.status == expected
        if expected == 200:
            assert np.array_equal(decoded(content), labels_of(scene()))
        else:
            assert f"1 file, got {len(files)}" in json.loads(content)["detail"]
    connection.request("POST", "/segment", b"no form", form()[1])
    assert connection.getresponse().status == 400
    assert served.metric('emanet_requests_total{status="400"}') == 1
    connection.close()


def test_refused_pictures(served):
    file = scene()
    status, text = detail(served.ask("/segment", file[: len(file) // 2]))
    assert (status, "the picture: not a readable JPEG" in text) == (422, True)
    status, text = detail(served.ask("/segment", b"no picture"))
    assert (status, "expected an intact JPEG, PNG, WebP" in text) == (422, True)
    large = encode_png(np.zeros((200, 251), np.uint8))
    status, text = detail(served.ask("/segment", large))
    assert (status, "251x200, at most 50000 pixels are read" in text) == (422, True)


@pytest.mark.parametrize("megabytes", [0.3, 20])
def test_a_request_that_is_too_large(served, megabytes):
    """The client gets the answer although it has sent everything first."""
    status, text = detail(served.ask("/segment", bytes(int(megabytes * 1e6) + 1)))
    assert (status, text) == (413, "a request has at most 300000 bytes (--max-bytes)")


def test_metrics(served):
    from prometheus_client.parser import text_string_to_metric_families

    assert served.ask("/segment", scene())[0] == 200
    text = served.ask("/metrics")[1].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["emanet_requests"].type == "counter"
    assert families["emanet_request_seconds"].type == "histogram"
    assert served.metric('emanet_requests_total{status="200"}') >= 1
    assert served.metric("emanet_network_seconds_total") > 0
    assert served.metric("emanet_queue") == served.metric("emanet_unanswered") == 0


def test_a_full_queue_a_client_that_goes_away_and_the_time_limit():
    options = ("--queue", "2", "--timeout-s", "8")
    with Served(*DEMO, *WAITING, *options) as served, ThreadPoolExecutor(1) as pool:
        served.wait_until_ready()
        gone = served.connect()
        gone.request("POST", "/segment", scene())
        late = pool.submit(served.ask, "/segment", scene(1))
        until(lambda: served.metric("emanet_queue") == 2)
        connection = served.connect()
        connection.request("POST", "/segment", scene(2))
        response = connection.getresponse()
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "2 requests have no answer yet" in json.loads(response.read())["detail"]
        gone.close()
        until(lambda: served.metric("emanet_unanswered") == 1)
        assert served.metric('emanet_requests_total{status="499"}') == 1
        assert detail(late.result()) == (504, "no answer within 8 s (--timeout-s)")
        assert served.metric("emanet_queue") == served.metric("emanet_unanswered") == 0
        assert served.metric("emanet_batch_images_count") == 0


def test_health_before_the_first_picture_and_a_signal_then():
    with Served(*DEMO, "--scale", "3072x3072") as served:
        assert detail(served.ask("/health")) == (503, "the service is starting")
        assert detail(served.ask("/segment", scene())) == (503, "the service is starting")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(SECONDS) == 0


def test_a_signal_ends_the_service_after_the_last_answer(labels_of):
    files = [scene(3 * i) for i in range(3)]
    with Served(*DEMO, "--batch-size", "64", "--wait-ms", "4000") as served:
        served.wait_until_ready()
        assert detail(served.ask("/health")) == (200, "ready")
        with ThreadPoolExecutor(3) as clients:
            answers = [clients.submit(served.ask, "/segment", file) for file in files]
            until(lambda: served.metric("emanet_queue") == 3)
            served.process.send_signal(signal.SIGTERM)
            until(lambda: detail(served.ask("/health")) == (503, "the service is stopping"))
            assert detail(served.ask("/segment", scene())) == (503, "the service is stopping")
        for file, answer in zip(files, answers, strict=True):
            status, png = answer.result()
            assert status == 200
            assert np.array_equal(decoded(png), labels_of(file))
        assert served.process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("signals", "grace", "code"), [(2, "600", 128 + signal.SIGTERM), (1, "0.2", 1)]
)
def test_a_service_that_may_not_wait(signals, grace, code):
    """A second signal, or a short time for the last answers."""
    with Served(*DEMO, *WAITING, "--grace-s", grace) as served:
        served.wait_until_ready()
        client = served.connect()
        client.request("POST", "/segment", scene())
        until(lambda: served.metric("emanet_queue") == 1)
        for _ in range(signals):
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)  # two signals of one moment would be one
        assert served.process.wait(SECONDS) == code
        client.close()


def test_an_image_whose_logits_are_not_finite(tmp_path):
    """Classifiers of huge weights overflow where the features are larger than a black picture's."""
    model = create_model("emanet_demo", pretrained=True)
    bright = generate_scene(0, 256, 512)[0]
    black = np.zeros_like(bright)
    largest = [largest_logit(model, image) for image in (black, bright)]
    assert largest[0] < 0.9 * largest[1]
    factor = torch.finfo(torch.float32).max / (largest[0] * largest[1]) ** 0.5
    model.decode_head.conv_seg.weight.data *= factor
    model.decode_head.conv_seg.bias.data *= factor
    torch.save(model.state_dict(), tmp_path / "huge.pth")
    options = ("--ckpt", str(tmp_path / "huge.pth"), "--model", "emanet_demo", "--threads", "1")
    with Served(*options, "--device", "cpu") as served:
        served.wait_until_ready()
        for image, expected in ((bright, 500), (black, 200), (bright, 500)):
            status, content = served.ask("/segment", encode_png(image))
            assert status == expected
            assert (b"logits of the network are not finite" in content) == (expected == 500)
        assert served.ask("/health")[0] == 200


def largest_logit(model, image: np.ndarray) -> float:
    from emanet_triton import Predictor

    return Predictor(model, model.protocol).first_logits(image).abs().max().item()


def refused(*options: str) -> str:
    """The message of a service that does not start."""
    command = [sys.executable, str(SERVE), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_bad_options(tmp_path):
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"no checkpoint")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be used" in refused(*DEMO, "--port", port)
    wrong = ("--ckpt", str(damaged), "--model", "emanet_demo", "--port", "0")
    assert "expected a PyTorch" in refused(*wrong)


def test_the_load_test(tmp_path):
    path = tmp_path / "load.csv"
    options = ["--model", "emanet_demo", "--seconds", "1", "--turns", "1", "--threads", "1"]
    assert load_test.main([*options, "--precision", "fp32", "--csv", str(path)]) == 0
    (row,) = csv.DictReader(io.StringIO(path.read_text()))
    assert int(row["answers"]) >= int(row["clients"])
    assert row["wrong answers"] == "0"


def test_the_load_test_counts_wrong_and_lost_answers(served):
    pictures = [load_test.Picture(scene(), np.empty(0), b"another")]
    clients = load_test.Clients(served, pictures)
    clients.run(1, 0.1)
    assert clients.wrong == len(clients.seconds) > 0
    with Served(*DEMO) as ended:
        ended.process.kill()
        ended.process.wait()
        clients = load_test.Clients(ended, pictures)
        clients.run(1, 0.1)
        assert clients.wrong == len(clients.seconds) > 0
