# SPDX-License-Identifier: Apache-2.0
"""A run killed between two stages ends in the bits of an uninterrupted run, for the stage list of every recipe.

Whatever a later stage sees of an earlier one is read from a file after a kill. Two lists of three stages are added to
those of the recipes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.killing import Attempts
from tests.helpers.runs import QUICK, SMALL, outcome, write_run

ROOT = Path(__file__).resolve().parents[2]
QUICKER = {"epochs": 2, "sweeps": 3}  # of the settings that a stage has, for a test that takes seconds


def stage(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"omniq.stages.{name}", "init_args": settings}


def quicker(entry: dict[str, Any]) -> dict[str, Any]:
    """The same stage with fewer epochs or sweeps."""
    settings = dict(entry.get("init_args", {}))
    settings |= {key: value for key, value in QUICKER.items() if key in settings}
    return {**entry, "init_args": settings}


def recipes() -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Stages and scheme of every recipe with more than one stage, by file."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if len(content.get("stages", [])) > 1:
            scheme = {**content.get("scheme", {})}
            scheme["name"] = scheme.get("name", "W4A16").partition("g")[0] + "g16"
            found[path.stem] = ([quicker(entry) for entry in content["stages"]], scheme)
    return found


LISTS = recipes() | {
    "GPTQ, LearnedRounding": ([stage("GPTQ"), stage("LearnedRounding", epochs=2)], {"name": "W3A16g16"}),
    "QuantEase, LearnedRounding, symmetric": (
        [stage("QuantEase", sweeps=3), stage("LearnedRounding", epochs=2)],
        {"name": "W4A16", "symmetric": True},
    ),
    "AWQ, QuantEase, LearnedRounding": (
        [stage("AWQ"), stage("QuantEase", sweeps=3), stage("LearnedRounding", epochs=2)],
        {"name": "W3A16g16"},
    ),
    "OutlierSuppression, OmniQuant, LearnedRounding": (
        [stage("OutlierSuppression"), stage("OmniQuant", epochs=1), stage("LearnedRounding", epochs=1)],
        {"name": "W4A8"},
    ),
}


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    with Attempts(tmp_path_factory.mktemp("boundaries")) as made:
        yield made


@pytest.mark.parametrize("name", LISTS)
def test_run_killed_at_each_stage_boundary_has_the_bits_of_a_whole_run(
    name: str, attempts: Attempts, tmp_path: Path
) -> None:
    stages, scheme = LISTS[name]
    command = write_run(tmp_path, model=SMALL, stages=stages, scheme=scheme, **QUICK)
    whole = attempts.run(command, tmp_path / "whole")
    assert whole.status == 0, whole.output
    expected = outcome(tmp_path / "whole")
    for block in range(2):
        for number in range(len(stages) - 1):
            killed = attempts.run(command, tmp_path / "killed", aim=("after", f"current/{block:03d}.{number}.block"))
            assert killed.killed, killed.output
    last = attempts.run(command, tmp_path / "killed")
    assert last.status == 0, last.output
    assert outcome(tmp_path / "killed") == expected
