import subprocess
import sys

import pytest
from conftest import ROOT

# The caller has files of its own that are called as ours are.
START = f"""
import importlib.util, sys
import numpy, torch
import support, utils
from PIL import Image
limit = Image.MAX_IMAGE_PIXELS

def load(entry, **arguments):
    return torch.hub.load({str(ROOT)!r}, entry, source="local", **arguments)

def check_names():
    assert utils.MINE and support.MINE and Image.MAX_IMAGE_PIXELS == limit
    assert sys.modules["utils"] is utils and sys.modules["support"] is support
    for name in ("model", "predict", "tools"):
        assert name not in sys.modules and importlib.util.find_spec(name) is None, name

def answer(model):
    return model(torch.ones(1, 3, 40, 60))
"""

LOAD = """
model = load("unet_carvana", pretrained=True)
check_names()
assert not model.training and answer(model).shape == (1, 1, 40, 60)
random = load("unet_carvana", pretrained=False, features=(4, 8))
assert random.features == (4, 8) and type(random) is type(model)
mask = load("predictor", height=32, width=48).mask(PHOTO)
assert mask.shape == (48, 72) and set(numpy.unique(mask)) <= {0, 255}
check_names()
torch.save({"model": model, "answer": answer(model)}, "saved.pt")
assert type(torch.load("saved.pt", weights_only=False)["model"]) is type(model)
"""

AGAIN = """
load("unet_carvana", pretrained=False, features=(4, 8))
saved = torch.load("saved.pt", weights_only=False)
assert torch.allclose(answer(saved["model"]), saved["answer"], atol=1e-5)
check_names()
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hub_loads_beside_files_of_the_same_names_and_models_can_be_pickled(
    photos, tmp_path, processes
):
    for name in ("utils.py", "support.py"):
        (tmp_path / name).write_text("MINE = True")
    for part in (LOAD, AGAIN)[:processes]:
        (tmp_path / "main.py").write_text(f"PHOTO = {str(min(photos.iterdir()))!r}\n{START}{part}")
        command = [sys.executable, "-W", "error", "main.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
