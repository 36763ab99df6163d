"""The structure: which way imports go, and which packages they need."""

import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, write_pairs

FIVE = ("model.py", "dataset.py", "utils.py", "train.py", "test.py")
FILES = [path for part in (".", "support", "tools", "data") for path in (ROOT / part).glob("*.py")]
BELOW = {"support", "model", "dataset", "utils"}
MAY_IMPORT = dict.fromkeys(("model", "dataset", "utils", "test"), BELOW) | {
    "support": {"support"},
    "train": BELOW | {"data.draw_demo"},
    "predict": BELOW,
    "hubconf": BELOW | {"predict"},
    "data": BELOW | {"data"},
}
MAY_IMPORT["tools"] = {*MAY_IMPORT, "tools"}
PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless"}


def imports(path):
    """{name: whether it is imported with the file, not in a function} of all that it imports."""
    tree, found = ast.parse(path.read_text()), {}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found[module + alias.name] = found.get(module + alias.name) or node not in inside
    return found


def part_of(path):
    """The folder or the file at the top that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_packages_are_required(path):
    lists = [(ROOT / f"requirements{which}.txt").read_text() for which in ("", "-extra")]
    required, optional = (set(re.findall(r"^[\w-]+", text, re.MULTILINE)) for text in lists)
    for name, at_start in imports(path).items():
        module = name.partition(".")[0]
        if module in MAY_IMPORT:
            assert f"{name}.".startswith(tuple(f"{m}." for m in MAY_IMPORT[part_of(path)])), name
        elif module not in sys.stdlib_module_names:
            needed = at_start and part_of(path) != "tools"
            assert PACKAGES.get(module, module) in required | (set() if needed else optional), name


def test_the_five_files_can_be_imported_without_the_tools(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in MAY_IMPORT]:
        monkeypatch.delitem(sys.modules, name)  # to be imported anew
    monkeypatch.setitem(sys.modules, "tools", None)
    for name in FIVE:
        importlib.import_module(name.removesuffix(".py"))


@pytest.mark.slow
def test_the_five_files_train_and_evaluate_without_the_tools(tmp_path):
    write_pairs(tmp_path / "pairs")
    for path in (path for path in FILES if part_of(path) not in ("tools", "predict", "hubconf")):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for command in ([*"train.py --data-dir pairs --epochs 1".split(), *SMALL], ["test.py"]):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
