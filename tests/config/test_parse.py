# SPDX-License-Identifier: Apache-2.0
"""Settings that are null, settings of earlier releases, and options of named stages."""

import logging
from argparse import ArgumentError
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from omniq.calibration.outlier_settings import OutlierSettings
from omniq.config.parse import Arguments, parse_run, run_of
from omniq.config.run import Export
from omniq.errors import UserError
from omniq.export.registry import FORMATS
from omniq.run.fingerprint import fingerprint

RUN: dict[str, Any] = {
    "model": {"path": "x"},
    "data": {"source": {"class_path": "omniq.data.Stdlib"}},
    "stages": [{"class_path": "omniq.stages.QuantEase"}],
    "evaluation": {"source": {"class_path": "omniq.data.Stdlib"}},
}
OPTIONAL = {"model.gguf_file", "data.seed", "evaluation", "evaluation.max_windows", "export.prompt", "blocks"}
OPTIONAL |= {"data.bos", "evaluation.bos"}
OPTIONAL |= {f"stages.0.{name}" for name in ("clipping", "outliers", "outlier_columns")}
OPTIONAL |= {f"stages.0.outlier_{name}" for name in ("support", "method")}
KEYS = [
    *("model", "model.path", "model.gguf_file", "model.attention", "model.trust_remote_code", "data", "data.source"),
    *(
        "data.samples",
        "data.length",
        "data.held_out",
        "data.seed",
        "data.add_special_tokens",
        "data.bos",
        "scheme",
        "scheme.name",
    ),
    *("scheme.symmetric", "scheme.dtype", "scheme.activation_range", "stages", "callbacks", "trainer", "evaluation"),
    *(
        "evaluation.source",
        "evaluation.length",
        "evaluation.max_windows",
        "evaluation.add_special_tokens",
        "evaluation.bos",
        "export",
    ),
    *("export.format", "export.max_shard_size", "export.verify", "export.prompt", "out", "seed", "streams", "batch"),
    *("save_streams_every", "blocks", "matmul", "compile"),
    *(f"stages.0.{name}" for name in ("sweeps", "start", "grid", "clipping", "damping", "act_order", "outliers")),
    *(f"stages.0.{name}" for name in ("refit_scales", "precision", "true_sequential", "batch_size", "token_weights")),
]


def with_null(key: str) -> dict[str, Any]:
    content = yaml.safe_load(yaml.safe_dump(RUN))
    if key.startswith("stages.0."):
        content["stages"][0]["init_args"] = {key.removeprefix("stages.0."): None}
        return content
    section, _, name = key.partition(".")
    if name:
        content.setdefault(section, {})[name] = None
    else:
        content[section] = None
    return content


@pytest.mark.parametrize("key", KEYS)
def test_parse_run_null_is_accepted_for_optional_settings_only(key: str) -> None:
    if key in OPTIONAL:
        parse_run([], with_null(key))
        return
    with pytest.raises(UserError) as caught:
        parse_run([], with_null(key))
    assert str(caught.value) == f"{key}: null is not allowed: give a value or remove the line"


def quantease(**settings: Any) -> dict[str, Any]:
    return {**RUN, "stages": [{"class_path": "omniq.stages.QuantEase", "init_args": settings}]}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({}, {}),
        ({"outliers": 0.0, "outlier_columns": False, "outlier_support": "magnitude", "outlier_method": "masked"}, {}),
        ({"outliers": 1}, {"outliers": {"fraction": 0.01}}),
        ({"outliers": 0.7}, {"outliers": {"fraction": 0.007}}),
        ({"outliers": 3.0, "outlier_columns": True}, {"outliers": {"fraction": 0.03, "columns": True}}),
        ({"outliers": 50, "outlier_method": "algorithm3"}, {"outliers": {"fraction": 0.5, "method": "algorithm3"}}),
        ({"outliers": 2.0, "outlier_support": "loss"}, {"outliers": {"fraction": 0.02, "support": "loss"}}),
    ],
)
def test_quantease_outliers_in_both_spellings_have_one_fingerprint(
    earlier: dict[str, Any], now: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The fingerprint has the keys that runs of the earlier release have recorded."""
    with caplog.at_level(logging.WARNING, "omniq"):
        run, settings = parse_run([], quantease(**earlier))
    assert ("use outliers.fraction" in caplog.text) == bool(earlier.get("outliers"))
    again, same = parse_run([], quantease(**now))
    (stage,), (other,) = run.stages, again.stages
    given, same_as = stage.outliers, other.outliers  # type: ignore[attr-defined]
    assert (given is None) == (same_as is None)
    if given is not None:  # 0.7 / 100 is not 0.007 to the last bit
        assert replace(given, fraction=same_as.fraction) == same_as
        assert given.fraction == pytest.approx(same_as.fraction, rel=1e-15)
    recorded = fingerprint(settings)
    assert recorded == fingerprint(same)
    assert recorded["stages.0.init_args.outliers"] == earlier.get("outliers", 0.0)
    defaults = {"outlier_columns": False, "outlier_support": "magnitude", "outlier_method": "masked"}
    for name, default in defaults.items():
        assert recorded[f"stages.0.init_args.{name}"] == earlier.get(name, default)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"outliers": 0.01}, "outliers 0.01 of QuantEase is ambiguous: write outliers.fraction 0.0001 to keep 0.01 %"),
        ({"outliers": 0.5}, "write outliers.fraction 0.005 to keep 0.5 % of the weights, or outliers.fraction 0.5"),
        ({"outliers": 51}, "outliers 51.0 of QuantEase is outside 0 to 50 per cent: write outliers.fraction 0.01"),
        ({"outliers": {"fraction": 1}}, "outliers.fraction 1.0 of QuantEase is outside 0 to 0.5: give a fraction"),
        ({"outliers": {"fraction": 0}}, "outliers.fraction 0.0 of QuantEase is outside 0 to 0.5"),
        ({"outliers": {"fraction": ".nan"}}, "outliers.fraction nan of QuantEase is outside 0 to 0.5"),
        ({"outliers": {"fraction": 0.1}, "outlier_columns": True}, "outlier_columns of QuantEase is given beside"),
        ({"outliers": {"fraction": None}}, "stages.0.outliers.fraction: null is not allowed"),
    ],
)
def test_quantease_ambiguous_outliers_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_run([], quantease(**settings))
    assert reason in str(caught.value)


def test_outlier_settings_of_earlier_release_without_fraction_are_none() -> None:
    beside = {"columns": True, "support": None, "method": None}
    assert OutlierSettings.of_earlier_release(None, beside) is None
    assert OutlierSettings.of_earlier_release(0.0, beside) is None


def test_parse_run_model_dtype_of_earlier_run_is_accepted_when_auto() -> None:
    run, settings = parse_run([], {**RUN, "model": {"path": "x", "dtype": "auto"}})
    assert "dtype" not in vars(run.model)
    assert fingerprint(settings)["model.dtype"] == "auto"
    assert fingerprint(settings) == fingerprint(parse_run([], RUN)[1])
    with pytest.raises(UserError, match=r"model.dtype 'bfloat16' .* set trainer.precision"):
        parse_run([], {**RUN, "model": {"path": "x", "dtype": "bfloat16"}})


def test_arguments_sort_into_files_packages_and_options() -> None:
    line = ["--config", "a.yaml", "--seed", "3", "--allow_import=mine", "--config=b.yaml", "--allow_import", "yours"]
    line += ["--preset", "best"]
    assert Arguments.sort(line) == (["a.yaml", "b.yaml"], ["--seed", "3"], ["mine", "yours"], ["best"])
    with pytest.raises(UserError, match="--config has no value: give one, such as --config mine.yaml"):
        Arguments.sort(["--config"])


TWO = {**RUN, "stages": ["omniq.stages.OmniQuant", {"class_path": "QuantEase", "init_args": {"sweeps": 7}}]}


def test_option_of_named_stage_sets_that_stage() -> None:
    options = [
        "--stages.OmniQuant.epochs",
        "3",
        "--stages.OmniQuant.clipping.initial=omniq.quantizers.clipping.Searched",
    ]
    run, _ = run_of(
        TWO, [*options, "--stages.QuantEase.init_args.outliers.fraction", "0.01", "--stages.damping", "0.5"]
    )
    first, last = map(vars, run.stages)
    assert first["epochs"] == 3
    assert type(first["clipping"].initial).__name__ == "Searched"
    assert (last["sweeps"], last["damping"], last["outliers"].fraction) == (7, 0.5, 0.01)
    assert TWO["stages"][0] == "omniq.stages.OmniQuant"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--stages.RTN.x", "3"], "--stages.RTN.x: the list of stages is OmniQuant, QuantEase: name a stage that"),
        (["--stages.OmniQuant.epochs"], "--stages.OmniQuant.epochs has no value: give one"),
    ],
)
def test_option_of_missing_stage_is_refused(options: list[str], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        run_of(TWO, options)
    assert reason in str(caught.value)


def test_option_of_repeated_stage_is_refused() -> None:
    with pytest.raises(UserError, match="the list of stages has 2 stages RTN: name a stage that occurs once"):
        run_of({**RUN, "stages": ["omniq.stages.RTN"] * 2}, ["--stages.RTN.clipping", "null"])


def test_option_unknown_to_named_stage_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'epoch' is not accepted"):
        run_of(TWO, ["--stages.OmniQuant.epoch", "3"])


def test_choices_of_export_format_are_those_of_registry() -> None:
    """The choices are written out, because the registry imports torch and ``--help`` must not."""
    assert set(get_args(get_type_hints(Export)["format"])) == {*FORMATS, "none"}
