# SPDX-License-Identifier: Apache-2.0
"""Stage list and scheme of each recipe in ``configs/``, made so small that a run takes a second."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKER = {"epochs": 2, "sweeps": 3}  # in place of a recipe's own
GROUP = "g16"  # divides the widths of the tiny models


def stage(name: str, **settings: Any) -> dict[str, Any]:
    """An entry of ``stages``."""
    return {"class_path": f"omniq.stages.{name}", "init_args": settings}


def recipe_sections() -> dict[str, dict[str, Any]]:
    """The sections ``stages`` and ``scheme`` of every recipe, by file name, with fewer epochs and sweeps."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "stages" not in content:
            continue
        stages = []
        for entry in content["stages"]:
            settings = dict(entry.get("init_args", {}))
            settings |= {key: value for key, value in QUICKER.items() if key in settings}
            stages.append({**entry, "init_args": settings})
        scheme = {**content.get("scheme", {})}
        name, group, _ = scheme.get("name", "W4A16").partition("g")
        found[path.stem] = {"stages": stages, "scheme": {**scheme, "name": name + (GROUP if group else "")}}
    return found


LONGER: dict[str, dict[str, Any]] = {
    "gptq-rounding": {
        "stages": [stage("GPTQ"), stage("LearnedRounding", epochs=2)],
        "scheme": {"name": "W3A16g16"},
    },
    "quantease-rounding-symmetric": {
        "stages": [stage("QuantEase", sweeps=3), stage("LearnedRounding", epochs=2)],
        "scheme": {"name": "W4A16", "symmetric": True},
    },
    "awq-quantease-rounding": {
        "stages": [stage("AWQ"), stage("QuantEase", sweeps=3), stage("LearnedRounding", epochs=2)],
        "scheme": {"name": "W3A16g16"},
    },
    "quantease-end_to_end": {
        "stages": [stage("QuantEase", sweeps=3), stage("EndToEnd", epochs=3, lr=1e-2, memory="model")],
        "scheme": {"name": "W3A16g16"},
    },
    "rtn-end_to_end-streamed-twice": {
        "stages": [stage("RTN"), *2 * [stage("EndToEnd", epochs=2, lr=1e-2, memory="block")]],
        "scheme": {"name": "W4A8"},
    },
    "outlier_suppression-omniquant-rounding": {
        "stages": [stage("OutlierSuppression"), stage("OmniQuant", epochs=1), stage("LearnedRounding", epochs=1)],
        "scheme": {"name": "W4A8"},
    },
}
"""Lists beside the recipes': other pairs of stages that hand codes on, and lists of three stages."""
