# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a run: the settings that must not change between start and resume."""

import re
from typing import Any

import yaml

from omniq.config.earlier import as_recorded

# Sections and keys that may change between start and resume. They do not affect the result of the calibration, or a
# digest of the content replaces the path.
FREE_KEYS = (
    *("out", "export", "evaluation", "callbacks", "config"),
    *("model.path", "model.gguf_file", "data.source.init_args.path"),
    *("streams", "save_streams_every"),
)
BINDING_TRAINER_KEYS = ("precision",)
# Settings that fingerprints of earlier versions lack, with the value that those versions used.
LATER_KEYS = {
    "compile": False,
    "scheme.rules": [],
    "scheme.zero_points": "any",
    "scheme.scale_bits": None,
    "data.bos": None,
}
LATER_STAGE_KEYS = {"held_out": 0.0, "patience": 3}


def fingerprint(settings: str) -> dict[str, Any]:
    """Return the settings that determine the result, flattened to dotted keys."""
    flat = _flatten(as_recorded(yaml.safe_load(settings)))
    # Trainer arguments are named as in YAML that gives no class for the Trainer.
    named = {key.replace("trainer.init_args.", "trainer.", 1): value for key, value in flat.items()}
    return {key: value for key, value in named.items() if not _free(key) and not _later(key, value)}


def _free(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "trainer":
        return rest not in BINDING_TRAINER_KEYS
    return any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)


def _later(key: str, value: Any) -> bool:
    setting = re.fullmatch(r"stages\.\d+\.init_args\.(\w+)", key)
    later = (setting[1], value) in LATER_STAGE_KEYS.items() if setting else False
    return later or (key, value) in LATER_KEYS.items()


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {k: v for key, child in node.items() for k, v in _flatten(child, f"{prefix}{key}.").items()}
    if isinstance(node, list) and node:
        return {k: v for i, child in enumerate(node) for k, v in _flatten(child, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): node}
