# SPDX-License-Identifier: Apache-2.0
"""Each file of configs/data is a complete section, and a later file replaces an earlier one."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from omniq.data import Calibration, Evaluation, Stdlib

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def sections(data: Calibration, evaluation: Evaluation) -> None:
    """The two sections of a run that text belongs to."""


def parse(*arguments: str) -> tuple[Calibration, Evaluation]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(sections, as_positional=False)
    made = parser.instantiate(parser.parse_args([*arguments]))
    return made.data, made.evaluation


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_data_config_parses_and_its_override_works(file):
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    override = next(line for line in head if "Override" in line).split("example: ")[1].split()
    assert any(f"--config configs/data/{file.name}" in line for line in head)
    plain, changed = parse("--config", str(file)), parse("--config", str(file), *override)
    assert plain[1] == changed[1]
    assert plain[0] != changed[0]


def test_data_config_later_file_replaces_earlier_source():
    data, evaluation = parse("--config", str(CONFIGS / "local.yaml"), "--config", str(CONFIGS / "stdlib.yaml"))
    assert data == Calibration(Stdlib(), held_out=4)
    assert evaluation == Evaluation(Stdlib("held-out"))
