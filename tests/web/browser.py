"""The page in a real browser: Chromium without a window. ``make test-web`` runs these tests.

``make test-web SCREENSHOT=docs/demo_page.png`` also writes the picture of the documentation.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from page_server import Server
from PIL import Image

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.overlay import ALPHA, overlay
from emanet_triton.data.png import write_png
from emanet_triton.data.scenes.generate import VAL_SEEDS, generate_scene
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import list_models
from emanet_triton.web import texts
from emanet_triton.web.page import MS_FLIP, OWN, SINGLE
from emanet_triton.web.segmenter import Choice, Segmenter

sync_api = pytest.importorskip("playwright.sync_api", reason="install it by: make test-web")
pytest.importorskip("gradio", reason="install it by: make test-web")

ROOT = Path(__file__).parents[2]
SCENE_SEED = VAL_SEEDS[50]  # none of the page's own scenes
CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a webcam
)
TIMEOUT = 120_000  # milliseconds: enough for a network on a busy machine


@pytest.fixture(scope="module")
def chromium():
    """The path of Chromium; where apt-get may install it, it is installed."""
    if shutil.which("chromium") is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(install, check=False)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    """Chromium with a new profile."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=chromium,
            args=CHROMIUM,
            viewport={"width": 1200, "height": 900},
        )
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, just opened. No request may go to another host, and none may fail.

    Older versions of gradio ask another host for a script, which the page's policy refuses.
    """
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    urls, failed, refused = [], [], set()
    page.on("request", lambda request: urls.append(request.url))
    page.on("response", lambda got: failed.append(got.url) if got.status >= 400 else None)
    page.on("requestfailed", lambda sent: refused.add(sent.url) if sent.failure == "csp" else None)
    page.goto(server.address)
    page.wait_for_selector("#picture img")
    yield page
    page.close()
    sent = set(urls) - refused
    hosts = {urlsplit(url).netloc for url in sent if urlsplit(url).scheme not in ("data", "blob")}
    assert len(urls) > 20
    assert hosts == {urlsplit(server.address).netloc}
    assert failed == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The path of a generated scene, and its pixels."""
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    image, _ = generate_scene(SCENE_SEED)
    write_png(path, image)
    return path, image


@pytest.fixture(scope="module")
def segmenter():
    import torch

    return Segmenter(torch.device("cpu"))


def upload(page, path: Path) -> None:
    page.click("#picture button[aria-label='Remove Image']")
    page.wait_for_selector("#picture img", state="detached")
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture button[aria-label='Remove Image']")


def source(page) -> str | None:
    shown = page.query_selector("#classes img")
    return shown and shown.get_attribute("src")


def picture_after(page, act) -> np.ndarray:
    """The pixels of the overlay that appears after an action, uint8 RGB [H, W, 3]."""
    before = source(page)
    act()
    page.wait_for_function(
        "old => { const shown = document.querySelector('#classes img');"
        " return shown && shown.getAttribute('src') != old; }",
        arg=before,
    )
    got = page.request.get(source(page))
    assert got.headers["content-type"] == "image/png"
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(got.body(), np.uint8), 1), cv2.COLOR_BGR2RGB)


def segment(page) -> np.ndarray:
    return picture_after(page, lambda: page.click("#start"))


def set_opacity(page, value: float) -> None:
    page.fill("#opacity input[type=number]", str(value))
    page.press("#opacity input[type=number]", "Enter")


def choose(page, name: str) -> None:
    page.click(f'label:has-text("{name}")')


def choose_model(page, name: str) -> None:
    page.click("input[aria-label='Model']")
    page.click(f"ul[role=listbox] li:has-text('{name}')")


def problem_after(page, act) -> str:
    act()
    page.wait_for_selector("#summary .problem")
    return page.inner_text("#summary")


def expected(segmenter, image, alpha: float = ALPHA, **choice) -> np.ndarray:
    result = segmenter(image, Choice(DEMO, **choice))
    return overlay(image, result.labels, CITYSCAPES, alpha=alpha, legend=False)


def test_a_scene_is_segmented_to_the_bit(page, scene, segmenter):
    path, image = scene
    assert page.inner_text("#note").strip() == texts.DEMO_NOTE
    upload(page, path)
    np.testing.assert_array_equal(segment(page), expected(segmenter, image))
    assert re.match(r"\d+\.\d{3} s for 512×256 pixels on cpu", page.inner_text("#summary"))
    found = texts.areas(segmenter(image, Choice(DEMO)).labels, CITYSCAPES)
    listed = page.inner_text("#areas ul").split("\n")
    assert [line for line in listed if "%" not in line] == [area.name for area in found]
    assert listed[1] == f"{found[0].percent:.1f} %"


def test_the_slider_does_not_run_the_network(page, scene, segmenter):
    path, image = scene
    upload(page, path)
    segment(page)
    summary = page.inner_text("#summary")
    got = picture_after(page, lambda: set_opacity(page, 0.2))
    np.testing.assert_array_equal(got, expected(segmenter, image, alpha=0.2))
    box = page.query_selector("#opacity input[type=range]").bounding_box()
    middle = box["y"] + box["height"] / 2

    def drag():
        page.mouse.move(box["x"] + 0.2 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"], middle)
        page.mouse.up()

    got = picture_after(page, drag)
    for _ in range(50):  # the pictures of a drag come one after the other
        got = cv2.imdecode(np.frombuffer(page.request.get(source(page)).body(), np.uint8), 1)
        if np.array_equal(got[:, :, ::-1], expected(segmenter, image, alpha=1)):
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the slider's last picture never came")
    assert page.inner_text("#summary") == summary  # with the time of the only run


def test_ms_flip_own_size_and_bf16(page, scene, segmenter, tmp_path):
    image = cv2.resize(scene[1], (300, 200))
    write_png(tmp_path / "small.png", image)
    upload(page, tmp_path / "small.png")
    choose(page, MS_FLIP)
    np.testing.assert_array_equal(segment(page), expected(segmenter, image, ms_flip=True))
    choose(page, SINGLE)
    choose(page, OWN)
    np.testing.assert_array_equal(segment(page), expected(segmenter, image, own_size=True))
    choose(page, "bf16")
    wanted = expected(segmenter, image, own_size=True, precision="bf16")
    np.testing.assert_array_equal(segment(page), wanted)
    assert "bf16, single view, own size, fused network" in page.inner_text("#summary")


@pytest.mark.parametrize("kind", ["rotated.jpg", "grey.png", "alpha.webp"])
def test_other_kinds_of_pictures(page, scene, segmenter, tmp_path, kind):
    picture, path = Image.fromarray(scene[1]), tmp_path / kind
    if kind == "rotated.jpg":
        exif = picture.getexif()
        exif[274] = 6  # a camera that was turned: shown after a quarter turn to the right
        picture.save(path, exif=exif, quality=95)
        pixels = np.asarray(Image.open(path).transpose(Image.Transpose.ROTATE_270))
    else:
        picture = picture.convert("L" if kind == "grey.png" else "RGBA")
        picture.save(path, lossless=True)
        pixels = np.asarray(picture.convert("RGB"))
    upload(page, path)
    got = segment(page)
    # Decoders of JPEG differ by a little.
    difference = np.abs(got.astype(int) - expected(segmenter, pixels).astype(int))
    assert got.shape == pixels.shape
    assert np.median(difference) <= 1 and (difference > 8).mean() < 0.01


def test_the_webcam(page):
    page.click("#picture button[aria-label='Remove Image']")
    page.click("#picture button[aria-label='Capture from camera']")
    page.click("#picture button:has-text('Click to Access Webcam')")
    page.wait_for_timeout(2000)
    page.click("#picture button[aria-label='capture photo']")
    page.wait_for_selector("#picture img")
    height, width, _ = segment(page).shape
    assert f"for {width}×{height} pixels" in page.inner_text("#summary")


def test_the_drawn_scenes(page, segmenter):
    page.click("#scenes button.gallery-item >> nth=1")
    page.wait_for_function("document.querySelector('#picture img').src.includes('scene_2')")
    image, _ = generate_scene(VAL_SEEDS[1])
    np.testing.assert_array_equal(segment(page), expected(segmenter, image))


def test_a_wrong_file_is_named_and_the_page_goes_on(page, scene, segmenter, tmp_path):
    (tmp_path / "wrong.png").write_bytes(b"no picture")
    upload(page, tmp_path / "wrong.png")
    message = problem_after(page, lambda: page.click("#start"))
    assert message.startswith("wrong.png: not a readable picture") and "Traceback" not in message
    assert source(page) is None
    upload(page, scene[0])
    np.testing.assert_array_equal(segment(page), expected(segmenter, scene[1]))


def test_a_published_model_without_a_network(page, scene, segmenter):
    upload(page, scene[0])
    choose_model(page, list_models()[0])
    page.wait_for_function("document.querySelector('#note').innerText.includes('downloaded')")
    message = problem_after(page, lambda: page.click("#start"))
    assert "cannot be downloaded" in message and "Traceback" not in message
    assert "\n" not in message.strip()
    choose_model(page, DEMO)
    np.testing.assert_array_equal(segment(page), expected(segmenter, scene[1]))


def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 390, "height": 844})
    segment(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390


def test_the_memory_stays_flat(page, server):
    def both():
        for precision in ("fp32", "bf16"):
            choose(page, precision)
            segment(page)

    both()
    both()
    before = server.memory()
    for _ in range(5):
        both()
    assert server.memory() - before < 64 * 2**20


def test_the_browser_refuses_other_hosts(page):
    refused = page.evaluate(
        "fetch('http://example.com/').then(() => 'answered', error => error.message)"
    )
    assert refused == "Failed to fetch"


def test_the_screenshot(page, request):
    target = request.config.getoption("--screenshot", None)
    if target is None:
        pytest.skip("wanted only with --screenshot")
    page.set_viewport_size({"width": 1100, "height": 780})
    segment(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    shot = cv2.imdecode(np.frombuffer(page.screenshot(full_page=True), np.uint8), 1)
    # 256 colours take a fifth of the bytes; this choice keeps the small areas of the legend.
    picture = Image.fromarray(shot[:, :, ::-1]).quantize(256, Image.Quantize.MAXCOVERAGE, 5)
    picture.save(ROOT / target, optimize=True)
    assert (ROOT / target).stat().st_size <= 200_000


def test_ctrl_c_during_a_run_ends_it_at_once(browser, tmp_path, scene):
    """With a page open and the network running. The server has talked to this machine only."""
    server = Server(tmp_path)
    page = browser.new_page()
    page.goto(server.address)
    page.wait_for_selector("#picture img")
    image = cv2.resize(scene[1], (4000, 2000))
    write_png(tmp_path / "large.png", image)
    upload(page, tmp_path / "large.png")
    choose(page, MS_FLIP)
    choose(page, OWN)
    page.click("#start")
    page.wait_for_timeout(5000)
    code, output, seconds = server.stop()
    page.close()
    assert (code, output) == (2, "the page is closed\n")
    assert seconds < 15
    assert list(server.temporary.iterdir()) == []
    assert set((tmp_path / "connected").read_text().split()) <= {"127.0.0.1", "localhost"}


def test_the_server_talks_to_this_machine_only_and_leaves_nothing(server):
    code, output, _ = server.stop()
    assert (code, output) == (2, "the page is closed\n")
    assert list(server.temporary.iterdir()) == []
    connected = set((server.folder / "connected").read_text().split())
    assert connected <= {"127.0.0.1", "localhost"}
