# SPDX-License-Identifier: Apache-2.0
"""The front door in Python: the same two things a user does on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from omniq.cli.quiet import quiet, quiet_transformers
from omniq.config.parse import parse_run
from omniq.errors import UserError
from omniq.models.transformers_io import open_weights
from omniq.storage.atomic import expanded


def quantize(
    model: str | Path,
    *,
    config: str | Path | Sequence[str | Path] = (),
    allow_import: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Quantize a model and write a checkpoint, as ``omniq quantize`` does; the same call continues a run.

        omniq.quantize("meta-llama/Llama-2-7b-hf", config="configs/w3a16g128.yaml", out="checkpoints/llama-w3")
        omniq.quantize("my-model", scheme={"name": "W4A16"}, stages=[{"class_path": "omniq.stages.RTN"}], data=…)

    Args:
        model: a folder, a GGUF file, a hub name, or ``package:name/file.gguf``.
        config: YAML files to start from; a later file replaces a list or a class whole.
        allow_import: packages whose classes the settings may name, beside omniq and Lightning.
        **settings: sections as in YAML, on top of the files.

    Returns:
        The run directory; the checkpoint is its folder ``model``.

    Raises:
        UserError: something cannot be done as asked, in one line.
    """
    from omniq.run import loop

    quiet()
    quiet_transformers()
    configs = [config] if isinstance(config, (str, Path)) else config
    section = settings.pop("model", {})
    return loop.quantize(*parse_run(configs, {**settings, "model": {**section, "path": str(model)}}, allow_import))


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Open what a run has written.

    Args:
        path: a run directory or an exported checkpoint.
        **options: for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: there is no checkpoint, or its weights are pickled, missing or damaged.
    """
    place = expanded(path)
    folder = place / "model" if (place / "model").is_dir() else place
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no checkpoint: give a finished run directory or an exported folder")
    return open_weights(folder, **options)
