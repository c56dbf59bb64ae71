# SPDX-License-Identifier: Apache-2.0
"""The Trainer's arguments: which of them omniq decides, and which precisions it calibrates in."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch

from omniq.errors import UserError

TrainerFactory = Callable[[], L.Trainer]

# What omniq decides for each block's fit, and what to use instead.
OWNED_TRAINER_ARGUMENTS = {
    "callbacks": "the callbacks section",
    "max_epochs": "a stage's epochs",
    "min_epochs": "a stage's epochs",
    "max_steps": "a stage's epochs and data.samples",
    "min_steps": "a stage's epochs and data.samples",
    "max_time": "nothing: a run may be killed at any moment and continued",
    "limit_train_batches": "data.samples",
    "overfit_batches": "data.samples",
    "accumulate_grad_batches": "a stage's batch_size",
    "gradient_clip_val": "nothing: a step that is not finite is taken back",
    "fast_dev_run": "data.samples and a stage's epochs",
    "barebones": "nothing: the fit of a block is bare enough",
    "default_root_dir": "out",
    "enable_checkpointing": "nothing: the end of each pass over the samples is saved",
    "enable_progress_bar": "nothing: the run has a display of its own",
    "enable_model_summary": "nothing: every block has the same parts",
    "plugins": "nothing: checkpoints are always atomic",
}
COMPUTE_DTYPES = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_ROUNDING = ("16-true", "bf16-true")
_PRECISION_ALIASES = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's own


def trainer_arguments(factory: TrainerFactory) -> Mapping[str, Any]:
    """What the user set for the Trainer."""
    return getattr(factory, "keywords", {})


def check_trainer(factory: TrainerFactory) -> None:
    """Refuse Trainer arguments that omniq decides, an absent GPU, and precisions that no block is calibrated in.

    Raises:
        UserError: names the argument, its value and what to use instead.
    """
    given, defaults = trainer_arguments(factory), inspect.signature(L.Trainer).parameters
    for name, instead in OWNED_TRAINER_ARGUMENTS.items():
        value, default = given.get(name), defaults[name].default
        same = type(value) is type(default) and value == default  # NOTE: 0 == False, and 0 steps are no training
        if not (value is None or value is False or same):
            raise UserError(f"trainer.{name} {value!r} is decided for each block: use {instead}")
    if given.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator {given['accelerator']!r}: no GPU is present; use cpu or auto")
    precision = _precision(factory)
    if precision not in COMPUTE_DTYPES:
        reason = "would round what is learned" if precision in _ROUNDING else "is not one that omniq calibrates in"
        raise UserError(f"trainer.precision {precision!r} {reason}: use one of {', '.join(COMPUTE_DTYPES)}")
    if precision == "16-mixed" and (given.get("accelerator") == "cpu" or not torch.cuda.is_available()):
        raise UserError(f"trainer.precision {precision!r} needs a GPU: use bf16-mixed or 32-true")


def compute_dtype(factory: TrainerFactory) -> torch.dtype:
    """The dtype of frozen weights and activations during calibration."""
    return COMPUTE_DTYPES[_precision(factory)]


def _precision(factory: TrainerFactory) -> str:
    given = str(trainer_arguments(factory).get("precision"))
    return _PRECISION_ALIASES.get(given, given)
