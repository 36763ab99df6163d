import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import importlib.util
import numpy, torch
import utils
torch.manual_seed(0)
model = torch.hub.load({root!r}, "unet_carvana", source="local", pretrained=True)
assert not model.training and model(torch.rand(1, 3, 40, 60)).shape == (1, 1, 40, 60)
random = torch.hub.load({root!r}, "unet_carvana", source="local", pretrained=False, features=(4, 8))
assert random.features == (4, 8)
predictor = torch.hub.load({root!r}, "predictor", source="local", height=32, width=48)
mask = predictor.mask({photo!r})
assert mask.shape == (48, 72) and set(numpy.unique(mask)) <= {{0, 255}}
assert utils.MINE
import utils as again
assert again.MINE
assert importlib.util.find_spec("model") is None, importlib.util.find_spec("model")
print("all is well")
"""


def test_hub_loads_both_entries_beside_files_of_the_same_names(photos, tmp_path):
    (tmp_path / "utils.py").write_text("MINE = True")
    program = PROGRAM.format(root=str(ROOT), photo=str(min(photos.iterdir())))
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-W", "error", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "all is well"), done.stderr
