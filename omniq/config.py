# SPDX-License-Identifier: Apache-2.0
"""What a run may say: the sections of a YAML file as typed classes, checked before any long work."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from omniq.data import Calibration, Evaluation
from omniq.errors import UserError
from omniq.files import expanded
from omniq.quantizers.scheme import Scheme
from omniq.stages.base import Stage

TrainerFactory = Callable[[], L.Trainer]
CallbackFactory = Callable[[], Callback]

_SEEDS = 10**9  # with block and pass multiplied in (``omniq.stages``), a generator's seed stays within 64 bits

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


@dataclass(frozen=True)
class Model:
    """The model to read.

    Args:
        path: a folder, a GGUF file, a name on the hub, or ``package:name/file.gguf`` inside an installed package.
        gguf_file: the GGUF file to take when ``path`` is a folder or a hub name that has several.
        dtype: of the weights; ``auto`` takes what the checkpoint says (float32 for GGUF).
        attention: attention implementation of transformers.
        trust_remote_code: run code that comes with the checkpoint.
    """

    path: str
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Export:
    """The checkpoint to write.

    Args:
        format: how codes are packed; ``none`` writes no checkpoint.
        max_shard_size: gigabytes of one safetensors file.
        verify: reopen the checkpoint, compare every code, and compare logits through transformers.
        prompt: a sentence for the reopened checkpoint to go on with, as a user would see it; nothing if not given.
    """

    format: str = "compressed-tensors"
    max_shard_size: float = 5.0
    verify: bool = True
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not 1e-9 <= self.max_shard_size < inf:  # NaN must not pass
            raise UserError(
                f"export.max_shard_size {self.max_shard_size} is not usable: give gigabytes above 0, such as 5"
            )


@dataclass
class Run:
    """One quantization run.

    Args:
        model: what to quantize.
        data: calibration text.
        stages: the methods, in order; each block goes through all of them.
        scheme: the deployed model's bits.
        trainer: arguments of Lightning's Trainer (accelerator, devices, precision, logger, …).
        callbacks: further Lightning callbacks, made anew for every block.
        evaluation: text for the perplexity before and after; none if not given.
        export: the checkpoint to write when all blocks are done.
        out: the run directory; the same command continues what it finds there.
        seed: of the calibration windows and of everything random.
        streams: where activation streams live: ``device`` memory, (pinned) ``host`` memory, memory-mapped files on
            ``disk``, or the first of them with room.
        save_streams_every: blocks between two saves of the activation streams (resuming recomputes from the last
            save); 0 never saves them.
        batch: samples at once where no gradients are needed.
        blocks: how many blocks are quantized, from the first; the others stay as they are. All if not given.
        matmul: how float32 is multiplied. ``tf32``: a GPU rounds the factors to 10 bits, a CPU does not; ``ieee``:
            neither does; ``bf16``: a CPU with AMX rounds them to 7 bits, one with AVX-512 alone uses oneDNN without
            rounding (twice as fast on AMD's), and a GPU does as with ``tf32``.
        compile: let torch.compile fuse loss and gradient of the stages that learn by them: quicker steps, after seconds
            (a CPU, which needs a C++ compiler) to a minute of compiling; losses differ in their last bits.
    """

    model: Model
    data: Calibration
    stages: list[Stage]
    scheme: Scheme = field(default_factory=Scheme)
    trainer: TrainerFactory = L.Trainer
    callbacks: list[CallbackFactory] = field(default_factory=list)
    evaluation: Evaluation | None = None
    export: Export = field(default_factory=Export)
    out: Path = Path("checkpoints/run")
    seed: int = 2
    streams: Literal["auto", "device", "host", "disk"] = "auto"
    save_streams_every: int = 1
    batch: int = 4
    blocks: int | None = None
    matmul: Literal["tf32", "ieee", "bf16"] = "tf32"
    compile: bool = False

    def __post_init__(self) -> None:
        self.out = expanded(self.out)  # a shell leaves ~ alone in --out=~/run, and YAML does always

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            UserError: names the field, the value and the remedy.
        """
        if not self.stages:
            raise UserError("stages is empty: name at least one, such as omniq.stages.OmniQuant")
        for position, stage in enumerate(self.stages):
            before = self.stages[:position]
            name, lost = type(stage).__name__, type(before[-1]).__name__ if before else ""
            if before and stage.refines and before[-1].sparse:
                raise UserError(
                    f"stages: {name} would refine the codes of {lost} without the outliers or scales that belong to "
                    f"them: give {lost} neither, or leave one of the two out"
                )
            stage.check(before)
            if before and not (stage.refines or before[-1].moves):
                raise UserError(
                    f"stages: {name} starts from the weights and would lose what {lost} before it has found: leave one "
                    "of the two out"
                )
        for name, seed in (("seed", self.seed), ("data.seed", self.data.seed)):
            if seed is not None and not 0 <= seed < _SEEDS:
                raise UserError(f"{name} {seed} is out of range: give a number from 0 to {_SEEDS - 1}")
        if self.batch < 1:
            raise UserError(f"batch {self.batch} is too small: give 1 or more")
        if self.blocks is not None and self.blocks < 1:
            raise UserError(f"blocks {self.blocks} leaves nothing to quantize: give 1 or more, or leave it out for all")
        if self.save_streams_every < 0:
            raise UserError(f"save_streams_every {self.save_streams_every} is negative: give 0 to never save them")


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
