import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("tool, flags", [("black", ["--check", "-q"]), ("ruff", ["check", "-q"])])
def test_the_code_is_formatted_and_linted(tool, flags):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (requirements-extra.txt)")
    command = [sys.executable, "-m", tool, *flags, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
