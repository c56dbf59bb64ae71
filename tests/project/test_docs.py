# SPDX-License-Identifier: Apache-2.0
"""omniq understands the commands in the documents and in the heads of recipes."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from omniq.cli.command import arguments_of, evaluate, export, report, verify
from omniq.cli.lightning_run import COMMANDS
from omniq.config.parse import Arguments, resolve
from omniq.export import find_format

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def lines(path: Path) -> list[str]:
    """Of the code in a document, or of the comment above a recipe; after a backslash the next line belongs to one."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    else:
        text = "".join(re.findall(r"^```\w*$(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    return text.replace("\\\n", " ").splitlines()


def commands(path: Path) -> list[list[str]]:
    """Command lines from the subcommand on, such as ``["quantize", "--config", …]``, without their comments."""
    pattern = rf"\b(?:omniq|lightning run) ((?:{'|'.join(COMMANDS)}) -.*)"
    found = [match[1] for line in lines(path) if (match := re.search(pattern, line))]
    return [shlex.split(command, comments=True) for command in found]


def overrides(path: Path) -> list[list[str]]:
    """Options that the head of a recipe suggests, on a line of their own or after a colon."""
    found = [match[1] for line in lines(path) if (match := re.fullmatch(r"(?:.*:)? +(--\S.*)", line))]
    return [shlex.split(options) for options in found]


@pytest.fixture
def _beside_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes, and the two files that the README has its reader make."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs/w3a16g128.yaml", tmp_path / "mine.yaml")
    shutil.copy(ROOT / "configs/data/local.yaml", tmp_path / "text.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_beside_a_reader")
@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_are_understood(path: Path) -> None:
    given = commands(path)
    if path in RECIPES:
        given += [[*given[0], *options] for options in overrides(path)]
    for name, *options in given:
        arguments = Arguments.sort(option for option in options if option != "--print_config")
        if name != "quantize":
            arguments_of({"evaluate": evaluate, "export": export, "verify": verify, "report": report}[name], arguments)
        else:
            run, _ = resolve(arguments.configs, {}, arguments.options, arguments.preset)
            run.check()
            if run.export.format != "none":
                find_format(run.export.format).codec(run.scheme).check(outliers=bool(run.stored_beside_codes))
