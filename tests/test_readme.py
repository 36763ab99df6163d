"""README's tables and commands are kept true here.

`python tests/test_readme.py` prints the tables of flags, ready to be pasted.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import check_data  # noqa: E402
import export  # noqa: E402
import predict  # noqa: E402
import test as evaluation  # noqa: E402
import train  # noqa: E402
from model import UNet, describe  # noqa: E402
from settings import get_args_parser  # noqa: E402

PARSERS = {
    "train.py": get_args_parser(vars(train)),
    "check_data.py": check_data.get_args_parser(),
    "test.py": evaluation.get_args_parser(),
    "predict.py": predict.get_args_parser(),
    "export.py": export.get_args_parser(),
    "bench.py": bench.get_args_parser(),
}
README = ROOT / "README.md"


def flags_table(parser):
    """A parser's flags as a Markdown table, one row each."""
    rows = ["| flag | |", "|---|---|"]
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
                if action.choices:
                    value = " " + "\\|".join(map(str, action.choices))
                flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
                flags, value = (flags, value) if flags else (f"{action.metavar} ...", "")
                text = action.help.replace("|", "\\|").replace("%%", "%")
                rows.append(f"| {flags}{value} | {text} |")
    return "\n".join(rows)


@pytest.mark.parametrize("script", PARSERS)
def test_the_tables_of_flags_are_those_of_help(script):
    assert flags_table(PARSERS[script]) in README.read_text()


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert ci.startswith("pip install") and ci.endswith("-m pytest")
    assert f"\n{ci}\n" in README.read_text()


def test_the_table_of_shapes_is_that_of_model_py():
    assert describe(UNet().eval()) in README.read_text()


def test_the_constants_named_in_readme_exist():
    text = README.read_text()
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?: = [^`]*)?`", text))
    assert named and not {name for name in named if not hasattr(train, name)} - {"CARVANA_DIR"}


def test_files_that_readme_shows_or_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    for script, parser in PARSERS.items():
        print(f"{script}\n\n{flags_table(parser)}\n")
