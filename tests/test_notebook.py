"""The scripts in a notebook, whose kernel is imitated here: no test needs one."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, write_pairs

import predict
from support.command_line import arguments
from support.errors import BadInput
from support.progress import ProgressBar

MAINS = ["train.py", "test.py", "predict.py", "data/prepare.py"]
MAINS += [f"tools/{path.name}" for path in (ROOT / "tools").glob("[a-z]*.py")]


@pytest.fixture
def kernel(monkeypatch):
    """Let this process look like a notebook's kernel."""
    ipython = ModuleType("IPython")
    ipython.get_ipython = object
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/path/kernel.json"])


def test_a_kernels_own_arguments_are_no_flags(kernel):
    assert arguments() == []
    assert arguments([Path("car.jpg"), "--batch-size", 2]) == ["car.jpg", "--batch-size", "2"]
    with pytest.raises(BadInput, match="the following arguments are required: PHOTO"):
        predict.main()


def test_a_script_has_its_arguments_also_where_ipython_runs_it(kernel, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3"])
    sys.modules["__main__"].__file__ = "train.py"  # as %run has it
    assert arguments() == ["--epochs", "3"]
    sys.modules["IPython"].get_ipython = lambda: None  # imported by a library, in a plain script
    assert arguments() == ["--epochs", "3"]


@pytest.mark.parametrize("script", MAINS)
def test_each_main_takes_its_words_from_one_function(script):
    source = (ROOT / script).read_text()
    assert "arguments(argv)" in source and "sys.argv" not in source
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert "arguments" in names


def test_a_notebook_shows_a_bar_and_other_output_a_line_a_minute(kernel, capsys):
    assert list(ProgressBar(range(3), "scoring", delay=0)) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and "scoring:   0%|" in err
    sys.modules["IPython"].get_ipython = lambda: None
    assert list(ProgressBar(range(3), "scoring")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


CELLS = """
import sys
from types import ModuleType

kernel = ModuleType("ipykernel.zmqshell")
ipython = ModuleType("IPython")
ipython.get_ipython = object
ipython.version_info = (9, 0)
sys.modules |= {"ipykernel.zmqshell": kernel, "IPython": ipython, "ipywidgets": None}
sys.argv = ["ipykernel_launcher.py", "-f", "/path/kernel.json"]

import predict, test, train
assert train.main() == 0
assert test.main() == 0
assert predict.main(["car.jpg"]) == 0
"""


@pytest.mark.slow
def test_a_notebooks_cells_train_evaluate_and_predict_without_a_warning(tmp_path):
    for folder in ("support", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("demo"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    photos, _ = write_pairs(tmp_path / "data")
    shutil.copy(min(photos.iterdir()), tmp_path / "car.jpg")
    source = (tmp_path / "train.py").read_text()
    for edit in ("NUM_EPOCHS = 1", "IMAGE_HEIGHT = 32", "IMAGE_WIDTH = 48", "FEATURES = (4, 8)"):
        name = edit.partition(" = ")[0]
        source = source.replace(f"\n{name} = ", f"\n{edit}  # ", 1)
    (tmp_path / "train.py").write_text(source)
    command = [sys.executable, "-c", CELLS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert "Dice score:" in done.stdout and (tmp_path / "predictions" / "car_mask.png").exists()
