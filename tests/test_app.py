import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, assert_refused, draw_pair
from PIL import Image

from predict import Predictor
from tools import app
from utils import SHIPPED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
QUIET += " disable-component-update disable-sync"  # nothing that looks for hosts outside


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="gradio is in requirements-extra.txt")
    reason = "playwright is in requirements-extra.txt"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: install the package chromium")
    flags = [f"--{flag}" for flag in QUIET.split()]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    """The page's address, served by `python tools/app.py` from another folder."""
    command = [sys.executable, "-u", ROOT / "tools" / "app.py", "--checkpoint", SHIPPED]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as server:
        timer = threading.Timer(120, server.kill)
        timer.start()
        found = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)), None)
        timer.cancel()
        yield found and found.group().rstrip("/")
        server.terminate()
        server.wait()
        assert list(folder.iterdir()) == []  # nothing is left of the photos


@pytest.fixture
def page(browser, address):
    """The page, freshly opened; `asked_for` is what it asked for."""
    page = browser.new_page(viewport={"width": 1200, "height": 720})
    page.set_default_timeout(60_000)
    page.asked_for = []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    yield page
    page.close()


@pytest.mark.slow
def test_a_photo_is_dropped_and_its_mask_appears(page, address, tmp_path):
    assert address.startswith("http://127.0.0.1:")
    photo = tmp_path / "my car.jpg"
    draw_pair(np.random.default_rng(0), (480, 320))[0].save(photo)
    page.set_input_files("input[type=file]", photo)
    files = {}
    for which, name in (("mask", "Mask"), ("cutout", "Cut-out")):
        before = page.wait_for_selector(f"#{which} img").get_attribute("src")
        with page.expect_download() as download:
            page.get_by_text(f"{name} as PNG").click()
        assert download.value.suggested_filename.endswith(f"_{which}.png")
        download.value.save_as(tmp_path / which)
        files[which] = np.asarray(Image.open(tmp_path / which))
    assert np.array_equal(files["mask"], Predictor(SHIPPED, "cpu").mask(photo))
    assert files["cutout"].shape == (320, 480, 4)
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked_for)

    slider = page.locator("input[type=range]")
    slider.focus()
    for _ in range(30):
        slider.press("ArrowRight")
    slider.dispatch_event("pointerup")
    changed = "before => document.querySelector('#cutout img').src != before"
    page.wait_for_function(changed, arg=before)


@pytest.mark.slow
def test_bad_and_too_large_files_are_answered_in_a_line(page, tmp_path):
    (tmp_path / "bad.jpg").write_text("no photo")
    page.set_input_files("input[type=file]", tmp_path / "bad.jpg")
    page.get_by_text("bad.jpg: cannot be read as an image (not an image): copy it again").wait_for()
    assert page.locator("#mask img").count() == 0
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(60_000_000)
    page.reload()
    page.set_input_files("input[type=file]", tmp_path / "large.jpg")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()


def test_without_gradio_a_line_says_what_to_install(call, network, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(call(app.main, "--checkpoint", network), "pip install gradio")
