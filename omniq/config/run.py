# SPDX-License-Identifier: Apache-2.0
"""What a run may say: the sections of a YAML file as typed classes, checked before any long work.

Importing this module imports neither torch nor Lightning, so that ``--help`` and a mistake in a configuration take less
than a second.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omniq.calibration.stage import Part, Stage, check_stages
from omniq.data import Calibration, Evaluation
from omniq.errors import UserError
from omniq.grid.scheme import Scheme
from omniq.storage.atomic import expand_home

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from omniq.config.trainer import TrainerFactory

_SEEDS = 10**9  # with block and pass multiplied in (``omniq.stages``), a generator's seed stays within 64 bits


@dataclass(frozen=True)
class Model:
    """The model to read.

    Args:
        path: a folder, a GGUF file, a name on the hub, or ``package:name/file.gguf`` inside an installed package.
        gguf_file: the GGUF file to take when ``path`` is a folder or a hub name that has several.
        attention: attention implementation of transformers.
        trust_remote_code: run code that comes with the checkpoint.
    """

    path: str
    gguf_file: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EvaluatedModel(Model):
    """The model to evaluate.

    Args:
        path: a folder, a GGUF file, a name on the hub, or ``package:name/file.gguf`` inside an installed package.
        gguf_file: the GGUF file to take when ``path`` is a folder or a hub name that has several.
        attention: attention implementation of transformers.
        trust_remote_code: run code that comes with the checkpoint.
        dtype: of weights and computations; ``auto`` takes the dtype of the checkpoint (float32 for GGUF, and on a CPU).
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


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


def _lightning_trainer() -> "TrainerFactory":
    import lightning as L

    return L.Trainer


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
    trainer: "TrainerFactory" = field(default_factory=_lightning_trainer)
    callbacks: "list[Callable[[], Callback]]" = field(default_factory=list)
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
        self.out = expand_home(self.out)  # a shell leaves ~ alone in --out=~/run, and YAML does always

    @property
    def stored_beside_codes(self) -> frozenset[Part]:
        """What the last stage leaves that not every export format can store: outliers and scale codes."""
        return self.stages[-1].leaves & {"outliers", "scale codes"}

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            UserError: names the field, the value and the remedy.
        """
        if not self.stages:
            raise UserError("stages is empty: name at least one, such as omniq.stages.OmniQuant")
        check_stages(self.stages)
        self.check_values()

    def check_values(self) -> None:
        """Refuse numbers that no run can have. Needs neither stages nor Trainer.

        Raises:
            UserError: names the field, the value and the remedy.
        """
        for name, seed in (("seed", self.seed), ("data.seed", self.data.seed)):
            if seed is not None and not 0 <= seed < _SEEDS:
                raise UserError(f"{name} {seed} is out of range: give a number from 0 to {_SEEDS - 1}")
        if self.batch < 1:
            raise UserError(f"batch {self.batch} is too small: give 1 or more")
        if self.blocks is not None and self.blocks < 1:
            raise UserError(f"blocks {self.blocks} leaves nothing to quantize: give 1 or more, or leave it out for all")
        if self.save_streams_every < 0:
            raise UserError(f"save_streams_every {self.save_streams_every} is negative: give 0 to never save them")
