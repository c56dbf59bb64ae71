# SPDX-License-Identifier: Apache-2.0
"""Arguments of the Trainer: the arguments that omniq sets itself, and the supported precisions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch

from omniq.errors import UserError

TrainerFactory = Callable[[], L.Trainer]

# Arguments that omniq sets for each block's fit, and what the user sets instead.
OWNED_TRAINER_ARGUMENTS = {
    "callbacks": "use the callbacks section",
    "max_epochs": "use a stage's epochs",
    "min_epochs": "use a stage's epochs",
    "max_steps": "use a stage's epochs and data.samples",
    "min_steps": "use a stage's epochs and data.samples",
    "max_time": "remove it (a run may be killed at any moment and continued)",
    "limit_train_batches": "use data.samples",
    "overfit_batches": "use data.samples",
    "accumulate_grad_batches": "use a stage's batch_size",
    "gradient_clip_val": "remove it (omniq undoes a pass with a non-finite loss)",
    "fast_dev_run": "use data.samples and a stage's epochs",
    "barebones": "remove it (omniq disables the features that a block does not need)",
    "default_root_dir": "use out",
    "enable_checkpointing": "remove it (omniq saves a checkpoint after each pass over the samples)",
    "enable_progress_bar": "remove it (omniq displays its own progress)",
    "enable_model_summary": "remove it (omniq prints one line per block)",
    "plugins": "remove it (omniq always writes checkpoints atomically)",
}
COMPUTE_DTYPES = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_ROUNDING = ("16-true", "bf16-true")
_PRECISION_ALIASES = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's own


def trainer_arguments(factory: TrainerFactory) -> Mapping[str, Any]:
    """Return the Trainer arguments that the user set."""
    return getattr(factory, "keywords", {})


def check_trainer(factory: TrainerFactory) -> None:
    """Refuse Trainer arguments that omniq sets itself, an absent GPU, and unsupported precisions.

    Raises:
        UserError: names the argument, its value and what to use instead.
    """
    given, defaults = trainer_arguments(factory), inspect.signature(L.Trainer).parameters
    for name, instead in OWNED_TRAINER_ARGUMENTS.items():
        value, default = given.get(name), defaults[name].default
        same = type(value) is type(default) and value == default  # NOTE: 0 == False, but 0 steps disable training
        if not (value is None or value is False or same):
            raise UserError(f"trainer.{name} {value!r} is set by omniq for each block: {instead}")
    if given.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator {given['accelerator']!r}: no GPU is present; use cpu or auto")
    precision = _precision(factory)
    if precision not in COMPUTE_DTYPES:
        reason = "would round the learned parameters" if precision in _ROUNDING else "is not supported"
        raise UserError(f"trainer.precision {precision!r} {reason}: use one of {', '.join(COMPUTE_DTYPES)}")
    if precision == "16-mixed" and (given.get("accelerator") == "cpu" or not torch.cuda.is_available()):
        raise UserError(f"trainer.precision {precision!r} needs a GPU: use bf16-mixed or 32-true")


def compute_dtype(factory: TrainerFactory) -> torch.dtype:
    """Return the dtype of frozen weights and activations during calibration."""
    return COMPUTE_DTYPES[_precision(factory)]


def _precision(factory: TrainerFactory) -> str:
    given = str(trainer_arguments(factory).get("precision"))
    return _PRECISION_ALIASES.get(given, given)
