# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniq.cli.command import main
from tests.helpers.runs import configuration, write_config


@pytest.fixture
def refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused at once, and returns what was said."""

    def run(*options: str, config: dict[str, Any] | None = None) -> str:
        out = tmp_path / "run"
        args = ["quantize", "--config", str(folder / "run.yaml"), "--out", str(out)]
        if config is not None:
            args = [*write_config(tmp_path / "config.yaml", {**configuration(folder), **config}), "--out", str(out)]
        capfd.readouterr()
        assert main([*args, *options]) == 2
        said, errors = capfd.readouterr()
        assert errors.startswith("omniq: ")
        assert errors.count("\n") == 1, errors
        assert errors.endswith("\n")
        assert said == ""
        assert not out.exists()
        return errors

    return run
