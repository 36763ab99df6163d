"""README and docs/ are held to the code: flags, constants, shapes, links, the test command.

`python tests/test_docs.py` writes docs/flags.md anew.
"""

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when run as a script

import train  # noqa: E402
from support.flags import get_args_parser  # noqa: E402

SCRIPTS = "test predict tools/check_data tools/export tools/app tools/recipe".split()
PARSERS = {"train.py": get_args_parser(train.Settings, "train.py")} | {
    f"{name}.py": import_module(name.replace("/", ".")).get_args_parser() for name in SCRIPTS
}
# Of torchrun, prepare.py, bench.py, and another repository's scripts.
OTHER_FLAGS = {"--nproc_per_node", "--download", "--photos", "--beside", "--profile"}
OTHER_FLAGS |= {"--model", "--input", "--scale", "--validation", "--amp"}
ENVIRONMENT = {"CARVANA_DIR", "OMP_WAIT_POLICY"}
README, FLAGS, CI = ROOT / "README.md", ROOT / "docs" / "flags.md", ROOT / ".ci" / "run"
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), ROOT / "weights" / "README.md"]


def flags_page():
    """docs/flags.md: each script's flags as a table, from its parser."""
    page = "# Flags\n\nWritten by `python tests/test_docs.py`, from the scripts' parsers.\n"
    for script, parser in PARSERS.items():
        page += f"\n## {script}\n\n| flag | |\n|---|---|\n"
        actions = (action for group in parser._action_groups for action in group._group_actions)
        page += "".join(table_row(action) for action in actions if action.dest != "help")
    return page


def table_row(action):
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = "\\|".join(map(str, action.choices or [action.metavar or action.dest.upper()]))
    value = {0: "", "?": f"[{value}]"}.get(action.nargs, value)
    text = action.help.replace("|", "\\|").replace("%%", "%")
    return f"| {f'{names} {value}'.strip()} | {text} |\n"


def test_the_page_of_flags_is_what_the_parsers_say():
    assert FLAGS.read_text() == flags_page()


def test_readme_is_short_and_its_test_command_is_what_ci_runs():
    command = CI.read_text().strip().splitlines()[-1]
    assert command.startswith("pip install") and f"\n{command}\n" in README.read_text()
    assert len(README.read_text().splitlines()) <= 150


def test_the_table_of_shapes_is_what_model_py_prints(capsys):
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
    assert capsys.readouterr().out in (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for file, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]*))?\)", text):
        target = page.parent / file if file else page
        headings = re.findall("^#+ (.*)", target.read_text(), re.M) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
        assert target.exists() and (not anchor or anchor in slugs), f"{file}#{anchor}"

    constants = set(re.findall(r"`([A-Z][A-Z_]{3,})(?: = [^`]*)?`", text)) - ENVIRONMENT
    assert not {name for name in constants if not hasattr(train, name)}
    known = OTHER_FLAGS.union(*(parser._option_string_actions for parser in PARSERS.values()))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) - known
    files = re.findall(r"(?:support|tools|data|tests|weights)/\w+\.(?:py|pth)", text)
    assert not [file for file in files if not (ROOT / file).exists()]


if __name__ == "__main__":
    FLAGS.write_text(flags_page())
