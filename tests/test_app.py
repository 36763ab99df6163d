import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, draw_pair
from PIL import Image

import app
from checkpoints import SHIPPED
from files import BadInput
from predictor import Predictor

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [  # nothing that looks for hosts outside
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="gradio is in requirements-extra.txt")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is in requirements-extra.txt"
    )
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install the package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page's address, served by `python app.py`."""
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    command = [sys.executable, "-u", "app.py", "--checkpoint", "weights/unet_carvana_small.pth"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as server:
        timer = threading.Timer(120, server.kill)
        timer.start()
        found = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)), None)
        timer.cancel()
        yield found and found.group().rstrip("/")
        server.kill()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened; `requests` is what it asked for."""
    page = browser.new_page(viewport={"width": 1200, "height": 720})
    page.set_default_timeout(60_000)
    page.asked_for = []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def read_picture(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def shown(page, which):
    """The address of the picture shown as mask or cutout."""
    return page.wait_for_selector(f"#{which} img").get_attribute("src")


def test_a_photo_is_dropped_and_its_mask_appears(page, address, tmp_path):
    assert address.startswith("http://127.0.0.1:")
    photo = draw_pair(np.random.default_rng(0), (480, 320))[0]
    photo.save(tmp_path / "my car.jpg")
    upload(page, tmp_path / "my car.jpg")
    files = {}
    for which in ("mask", "cutout"):
        assert "my" in shown(page, which)
        button = page.get_by_text({"mask": "Mask", "cutout": "Cut-out"}[which] + " as PNG")
        with page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename.endswith(f"_{which}.png")
        download.value.save_as(tmp_path / f"{which}.png")
        files[which] = read_picture(tmp_path / f"{which}.png")
    mask = Predictor(ROOT / SHIPPED, "cpu").mask(tmp_path / "my car.jpg")
    assert np.array_equal(files["mask"], mask)
    assert files["cutout"].shape == (320, 480, 4)
    page.screenshot(path=tmp_path / "page.png")
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked_for)

    before = shown(page, "mask")
    slider = page.locator("input[type=range]")
    slider.focus()
    for _ in range(30):
        slider.press("ArrowRight")
    slider.dispatch_event("pointerup")
    page.wait_for_function(
        "before => document.querySelector('#mask img').src != before", arg=before
    )


def test_a_bad_file_is_answered_with_the_same_line_as_on_the_shell(page, tmp_path):
    (tmp_path / "bad.jpg").write_text("no photo")
    upload(page, tmp_path / "bad.jpg")
    page.get_by_text("bad.jpg: cannot be read as an image (not an image): copy it again").wait_for()
    assert page.locator("#mask img").count() == 0


def test_a_file_that_is_too_large_is_refused(page, tmp_path):
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(60_000_000)
    upload(page, tmp_path / "large.jpg")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_too_many_pixels_are_refused_before_they_are_decoded(network, tmp_path):
    Image.new("1", (8192, 8192)).save(tmp_path / "large.png")
    with pytest.raises(BadInput, match="8192x8192 is more than 50 megapixels"):
        app.answer(Predictor(network, "cpu"), tmp_path / "large.png")


def test_without_gradio_a_line_says_what_to_install(call, network, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = call(app.main, "--checkpoint", network)
    assert code == 2 and "pip install gradio" in err
