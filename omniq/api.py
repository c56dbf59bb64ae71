# SPDX-License-Identifier: Apache-2.0
"""The Python API: quantize a model, and load the checkpoint of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from omniq.cli.quiet import quiet, quiet_transformers
from omniq.config.parse import parse_run
from omniq.errors import UserError
from omniq.models.transformers_io import open_weights
from omniq.storage.atomic import expand_home


def quantize(
    model: str | Path,
    *,
    config: str | Path | Sequence[str | Path] = (),
    preset: str | None = None,
    allow_import: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Quantize a model and write a checkpoint, as ``omniq quantize`` does. The same call continues an interrupted run.

        omniq.quantize("meta-llama/Llama-2-7b-hf", config="configs/w3a16g128.yaml", out="checkpoints/llama-w3")
        omniq.quantize("my-model", preset="best", out="checkpoints/mine")
        omniq.quantize("my-model", scheme={"name": "W4A16"}, stages=[{"class_path": "omniq.stages.RTN"}], data=…)

    Args:
        model: a folder, a GGUF file, a model name on the Hugging Face Hub, or ``package:name/file.gguf`` for a file
            inside an installed package.
        config: YAML files with settings. A later file replaces a list or a class as a whole.
        preset: ``fast``, ``balanced`` or ``best``: the stages, on which files and settings build. ``balanced`` is the
            default if neither the files nor the settings give stages.
        allow_import: packages whose classes the settings may name, in addition to omniq and Lightning.
        **settings: sections as in YAML. They override the files.

    Returns:
        The run directory. The checkpoint is in its folder ``model``.

    Raises:
        UserError: the run is not possible with these settings; the message is one line.
    """
    from omniq.run import loop

    quiet()
    quiet_transformers()
    configs = [config] if isinstance(config, (str, Path)) else config
    section = settings.pop("model", {})
    everything = {**settings, "model": {**section, "path": str(model)}}
    return loop.quantize(*parse_run(configs, everything, allow_import, preset))


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Open the checkpoint of a run.

    Args:
        path: a run directory or an exported checkpoint.
        **options: keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: the path holds no checkpoint, or the weights are pickled, missing or damaged.
    """
    given = expand_home(path)
    folder = given / "model" if (given / "model").is_dir() else given
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no checkpoint: give a finished run directory or an exported folder")
    return open_weights(folder, **options)
