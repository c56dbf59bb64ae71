# SPDX-License-Identifier: Apache-2.0
"""A terminal that encodes ASCII only, and names, texts and prompts that hold other characters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.runs import SMALL, configuration, write_config, write_run

RTN = [{"class_path": "omniq.stages.RTN"}]
ASCII = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
NO_UTF8 = {**ASCII, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # files are ASCII too where no encoding is named


def omniq(args: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "omniq", *args], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder ``größe-模型`` with model, text and a run's configuration in it."""
    folder = tmp_path / "größe-模型"
    folder.mkdir()
    write_run(folder, model=SMALL)
    shutil.copy(folder / "text.txt", folder / "テキスト.txt")
    return folder


def test_run_with_foreign_names_on_ascii_terminal_finishes(foreign: Path) -> None:
    content = configuration(foreign, stages=RTN, export={"prompt": "été 模"})
    content["evaluation"] = {**content["evaluation"], "source": text(foreign)}
    done = omniq([*write_config(foreign / "run.yaml", {**content, "data": data(foreign)})], ASCII)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint says: '?t? ?" in done.stdout
    recipe = yaml.safe_load((foreign / "run/model/recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["model"]["path"] == str(foreign / "source")
    for command in (["report"], ["export", "--out", str(foreign / "zweit-ö")]):
        done = omniq([command[0], "--run", str(foreign / "run"), *command[1:]], ASCII)
        assert done.returncode == 0, done.stderr


def test_run_where_files_are_ascii_by_default_finishes_or_names_the_encoding(tmp_path: Path, foreign: Path) -> None:
    args = write_run(tmp_path, model=SMALL, stages=RTN, evaluation=None, export={"prompt": "été 模"})
    done = omniq(args, NO_UTF8)
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((tmp_path / "run/model/recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["export"]["prompt"] == "été 模"
    done = omniq(["quantize", "--config", str(tmp_path / "run.yaml"), "--model.path", str(foreign)], NO_UTF8)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def text(folder: Path) -> dict[str, object]:
    return {"class_path": "omniq.data.LocalText", "init_args": {"path": str(folder / "テキスト.txt")}}


def data(folder: Path) -> dict[str, object]:
    return {"source": text(folder), "samples": 3, "length": 24, "held_out": 1}


def test_error_and_help_on_ascii_terminal_are_printed(tmp_path: Path) -> None:
    done = omniq(["report", "--run", str(tmp_path / "été")], ASCII)
    assert done.returncode == 2
    assert "\\xe9t\\xe9 is not a run directory" in done.stderr
    done = omniq(["quantize", "--help"], ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model.path" in done.stdout
