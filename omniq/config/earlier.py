# SPDX-License-Identifier: Apache-2.0
"""Translate settings of earlier releases, so that the same command continues an older run.

``model.dtype`` of ``omniq quantize`` accepted no value but ``auto``, because ``trainer.precision`` decides the dtype.
QuantEase had four settings for outliers, with their number in percent, and now has one object
(``omniq.stages.quantease``). The fingerprint of a run keeps the earlier spelling, so that equal runs of both releases
have equal fingerprints.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omniq.errors import UserError

QUANTEASE = ("omniq.stages.QuantEase", "omniq.stages.quantease.QuantEase")


def without_earlier_settings(content: Mapping[str, Any], options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Remove ``model.dtype: auto`` from the settings and options of a run.

    Raises:
        UserError: ``model.dtype`` has another value.
    """
    content, options, given = dict(content), list(options), []
    if isinstance(content.get("model"), Mapping):
        content["model"] = dict(content["model"])
        given.append(content["model"].pop("dtype", "auto"))
    if "--model.dtype" in options[:-1]:
        at = options.index("--model.dtype")
        given.append(options[at + 1])
        del options[at : at + 2]
    given += [option.partition("=")[2] for option in options if option.startswith("--model.dtype=")]
    for dtype in given:
        if dtype != "auto":
            raise UserError(
                f"model.dtype {dtype!r} is no longer a setting of omniq quantize: remove it, and set "
                "trainer.precision to choose the dtype of the computations"
            )
    return content, [option for option in options if not option.startswith("--model.dtype=")]


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert resolved settings to the spelling that fingerprints use."""
    recorded = {**settings}
    if isinstance(recorded.get("model"), Mapping):
        recorded["model"] = {"dtype": "auto", **recorded["model"]}
    if isinstance(recorded.get("stages"), list):
        recorded["stages"] = [_stage_as_recorded(stage) for stage in recorded["stages"]]
    return recorded


def _stage_as_recorded(stage: Any) -> Any:
    if not isinstance(stage, Mapping) or stage.get("class_path") not in QUANTEASE:
        return stage
    given = {**(stage.get("init_args") or {})}
    outliers = given.pop("outliers", None)
    if isinstance(outliers, Mapping):
        percent, settings_of_object = round(outliers["fraction"] * 100, 10), outliers
    else:
        percent, settings_of_object = outliers or 0.0, {}
    flat: dict[str, Any] = {"outliers": percent}
    for name, default in (("columns", False), ("support", "magnitude"), ("method", "masked")):
        earlier = given.pop(f"outlier_{name}", None)
        flat[f"outlier_{name}"] = settings_of_object.get(name, default) if earlier is None else earlier
    return {**stage, "init_args": {**given, **flat}}
