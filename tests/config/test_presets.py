# SPDX-License-Identifier: Apache-2.0
"""Presets: the stages that a name and a scheme choose, and what the settings of the user change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from omniq.cli.command import main
from omniq.config import presets
from omniq.config.parse import parse_run, resolve
from omniq.config.presets import PRESETS, fitting_scheme, recipe_of
from omniq.config.run import Model, Run
from omniq.data import HubText, LocalText, Stdlib
from omniq.errors import UserError
from omniq.stages import LearnedRounding, QuantEase
from tests.helpers.runs import QUICK, SMALL, configuration, write_config, write_text
from tests.helpers.tiny import save_tiny

MODEL = {"model": {"path": "x"}}


def names(run: Run) -> list[str]:
    return [type(stage).__name__ for stage in run.stages]


def chosen(*options: str, preset: str | None = None, settings: dict[str, Any] | None = None) -> Run:
    return resolve([], {**MODEL, **(settings or {})}, options, preset)[0]


@pytest.mark.parametrize(
    ("preset", "scheme", "stages"),
    [
        ("fast", "W4A16g128", ["QuantEase"]),
        ("balanced", "W3A16g64", ["QuantEase", "LearnedRounding"]),
        ("best", "W2A16", ["QuantEase", "LearnedRounding", "EndToEnd"]),
        ("fast", "W8A8", ["SmoothQuant"]),
        ("balanced", "W4A4KV4", ["OmniQuant", "LearnedRounding"]),
        ("best", "W4A16KV4", ["OmniQuant", "LearnedRounding", "EndToEnd"]),
    ],
)
def test_preset_chooses_stages_for_scheme(preset: str, scheme: str, stages: list[str]) -> None:
    for run in (
        chosen("--scheme.name", scheme, preset=preset),
        chosen(f"--scheme.name={scheme}", preset=preset),
        chosen(f"--scheme={{name: {scheme}}}", preset=preset),
        parse_run([], {**MODEL, "scheme": {"name": scheme}}, preset=preset)[0],
    ):
        assert names(run) == stages
        assert run.scheme.name == scheme
        run.check()


def test_preset_file_for_same_scheme_precedes_same_bits_and_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "RECIPES", tmp_path)
    for name in ("best-w3a16g64", "best-w3a16", "best-w4a4"):
        (tmp_path / f"{name}.yaml").touch()
    found = {name: recipe_of("best", name).stem for name in ("W3A16g64", "w3a16g128", "W3A16", "W2A16g64", "W4A4KV4")}
    assert found == {
        "W3A16g64": "best-w3a16g64",
        "w3a16g128": "best-w3a16",
        "W3A16": "best-w3a16",
        "W2A16g64": "best",
        "W4A4KV4": "best-activations",
    }


def test_preset_without_text_calibrates_on_c4() -> None:
    run = chosen("--scheme.name", "W4A16")
    assert isinstance(run.data.source, HubText)
    assert run.data.source.path == "allenai/c4"
    assert run.data.samples == 128


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"data": {"source": "omniq.data.Stdlib"}}, []),
        ({}, ["--data.source", "omniq.data.Stdlib"]),
        ({}, ["--data", "{source: omniq.data.Stdlib}"]),
    ],
)
def test_preset_with_text_of_user_takes_only_that(settings: dict[str, Any], options: Sequence[str]) -> None:
    run = chosen("--scheme.name", "W4A16", *options, settings=settings)
    assert run.data.source == Stdlib()
    assert run.evaluation is None


def test_preset_is_overridden_by_files_and_options(tmp_path: Path) -> None:
    more = "stages+: [{class_path: omniq.stages.QuantEase, init_args: {start: previous}}]"
    (tmp_path / "a.yaml").write_text(f"seed: 5\n{more}\ndata: {{source: Stdlib, samples: 7}}\n")
    options = ["--stages.LearnedRounding.epochs", "3", "--scheme.name", "W3A16"]
    run, _ = resolve([tmp_path / "a.yaml"], MODEL, options, "balanced")
    quantease, rounding, last = run.stages
    assert isinstance(quantease, QuantEase)
    assert isinstance(rounding, LearnedRounding)
    assert isinstance(last, QuantEase)
    assert (quantease.start, last.start) == ("weights", "previous")
    assert (rounding.epochs, rounding.token_weights, run.seed, run.data.samples) == (3, "relative", 5, 7)


def test_stages_without_preset_take_no_preset() -> None:
    settings = {"stages": ["omniq.stages.RTN"], "data": {"source": "Stdlib"}}
    run = chosen(settings=settings)
    assert names(run) == ["RTN"]
    assert run.scheme.name == "W4A16"
    assert names(chosen("--stages", "[omniq.stages.RTN]", settings={"data": settings["data"]})) == ["RTN"]


def test_unknown_preset_is_refused_with_the_three_names() -> None:
    with pytest.raises(UserError, match=r"--preset 'better' is unknown: give fast, balanced or best"):
        chosen(preset="better")


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_beside_list_of_stages_is_refused(preset: str) -> None:
    with pytest.raises(UserError, match=f"--preset {preset} and stages: both give a list of stages; remove one"):
        chosen(preset=preset, settings={"stages": ["omniq.stages.RTN"]})
    with pytest.raises(UserError, match=f"--preset {preset} and stages: both give a list of stages"):
        chosen("--stages=[omniq.stages.RTN]", preset=preset)


def test_preset_of_other_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--preset", "best", "--model.path", "x"]) == 2
    assert "--preset best: omniq evaluate has no presets; remove the option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "scheme"),
    [
        ({"hidden_size": 256, "intermediate_size": 384}, "W4A16g128"),
        ({"hidden_size": 128, "intermediate_size": 192}, "W4A16g64"),
        ({"hidden_size": 64, "intermediate_size": 160}, "W4A16g32"),
        ({"hidden_size": 64, "intermediate_size": 144}, "W4A16"),
    ],
)
def test_fitting_scheme_has_largest_group_that_divides_widths(
    tmp_path: Path, sizes: dict[str, int], scheme: str
) -> None:
    assert fitting_scheme(Model(str(save_tiny(tmp_path, **sizes)))) == scheme


def test_quantize_without_recipe_takes_balanced_preset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model, a text and a folder suffice."""
    save_tiny(tmp_path / "source", **SMALL)
    write_text(tmp_path / "text.txt")
    content = configuration(tmp_path, **QUICK)
    for key in ("stages", "scheme", "evaluation"):
        del content[key]
    options = ["--stages.QuantEase.sweeps", "3", "--stages.LearnedRounding.epochs", "1"]
    assert main([*write_config(tmp_path / "run.yaml", content), *options]) == 0
    assert "preset balanced: W4A16g32 by QuantEase, LearnedRounding" in caplog.text
    run, _ = parse_run([tmp_path / "run/config.yaml"])
    assert names(run) == ["QuantEase", "LearnedRounding"]
    assert run.scheme.name == "W4A16g32"
    assert isinstance(run.data.source, LocalText)
    assert main([*write_config(tmp_path / "run.yaml", content), *options]) == 0  # the same command continues the run
