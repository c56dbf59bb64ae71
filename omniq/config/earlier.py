# SPDX-License-Identifier: Apache-2.0
"""Settings of earlier releases: what they are today, and why the same command continues an older run.

``model.dtype`` of ``omniq quantize`` could only be left at ``auto``: ``trainer.precision`` decides. QuantEase had four
settings of outliers, with their number in per cent, where it has one object today (``omniq.stages.quantease``). The
fingerprint of a run keeps the earlier spelling, so that the runs of both releases have the same one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omniq.errors import UserError

QUANTEASE = ("omniq.stages.QuantEase", "omniq.stages.quantease.QuantEase")


def without_earlier_settings(content: Mapping[str, Any], options: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings and options of a run without ``model.dtype: auto``.

    Raises:
        UserError: ``model.dtype`` is something else.
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
                f"model.dtype {dtype!r} is not a setting of omniq quantize any more: leave it out, and set "
                "trainer.precision to choose the dtype of the computations"
            )
    return content, [option for option in options if not option.startswith("--model.dtype=")]


def as_recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved settings in the spelling that fingerprints have."""
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
        per_cent, of_object = round(outliers["fraction"] * 100, 10), outliers
    else:
        per_cent, of_object = outliers or 0.0, {}
    flat: dict[str, Any] = {"outliers": per_cent}
    for name, default in (("columns", False), ("support", "magnitude"), ("method", "masked")):
        earlier = given.pop(f"outlier_{name}", None)
        flat[f"outlier_{name}"] = of_object.get(name, default) if earlier is None else earlier
    return {**stage, "init_args": {**given, **flat}}
