# SPDX-License-Identifier: Apache-2.0
"""Preparation before the first block: check the run, open the model, draw the samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import lightning as L
import torch
from torch import Tensor

from omniq.blocks.forward import Precision
from omniq.blocks.placement import ActivationPlacement
from omniq.config.run import Run
from omniq.config.trainer import check_trainer, compute_dtype, trainer_arguments
from omniq.data import SelfGenerated, Windows, digest
from omniq.distributed import collectives
from omniq.distributed.launch import check_launcher, launch_arguments, launched_processes, set_up_processes
from omniq.errors import UserError, one_line
from omniq.export import check_format, check_free
from omniq.export.check import linear_shapes
from omniq.grid.dtypes import dtype_name
from omniq.models.self_test import check_streaming
from omniq.models.source import SourceModel
from omniq.run.checks import (
    check_callbacks,
    check_compiler,
    check_divisible,
    check_model,
    check_reader,
    check_text,
)
from omniq.run.environment import environment
from omniq.run.equivalences import verify_equivalences
from omniq.run.fingerprint import fingerprint
from omniq.run.generated import generated_windows
from omniq.run.origin import Origin, open_origin
from omniq.storage.ownership import check_writable


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Args:
        run: the configuration.
        source: the opened model.
        tokens: this process's shard of the calibration samples, followed by held-out samples, int64 ``[n, t]``.
        held_out: number of held-out samples in ``tokens``.
        generated: the windows of all processes, if the model wrote them.
        evaluation: sequences for the perplexity, int64 ``[m, t]``, or None.
        device: device of the computations.
        placement: where the streams live.
        precision: enters the autocast context of the Trainer.
        block_arguments: for each block, the arguments of its forward besides the hidden states.
        fingerprint: settings and digests that must not change between start and resume.
        environment: versions and machine.
        origin: finished blocks from which the run starts, or None.
    """

    run: Run
    source: SourceModel
    tokens: Tensor
    held_out: int
    generated: Windows | None
    evaluation: Tensor | None
    device: torch.device
    placement: ActivationPlacement
    precision: Precision
    block_arguments: list[dict[str, Any]]
    fingerprint: Mapping[str, Any]
    environment: Mapping[str, Any]
    origin: Origin | None = None

    def embed(self) -> Tensor:
        """Compute the hidden states that enter block 0, ``[n, t, h]``, in the memory of the streams."""
        parts = self.tokens.split(self.run.batch)
        first, _ = self.source.embed(parts[0], self.device)
        hidden = self.placement.empty((len(self.tokens), *first.shape[1:]), first.dtype)
        for part, out in zip(parts, hidden.split(self.run.batch), strict=True):
            out.copy_(self.source.embed(part, self.device)[0])
        return hidden


def open_model(run: Run) -> SourceModel:
    """Open the model of a run, in the dtype of its computations.

    Raises:
        UserError: the model cannot be opened.
    """
    model, dtype = run.model, dtype_name(compute_dtype(run.trainer))
    return SourceModel.open(
        model.path,
        gguf_file=model.gguf_file,
        dtype=dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )


def _check_settings(run: Run) -> None:
    """Check everything that does not depend on the model."""
    run.check()
    check_launcher()
    check_trainer(run.trainer)
    check_callbacks(run)
    check_writable(run.out)
    for export in run.exports:
        outliers = bool(run.stored_beside_codes)
        check_format(export.format, run.scheme, container_bits=export.container_bits, outliers=outliers)
        check_free(run.folder_of(export))


def prepare(run: Run, settings: str) -> Plan:
    """Check all settings of a run, open its model and draw its samples.

    Raises:
        UserError: a setting cannot work.
    """
    _check_settings(run)
    source = open_model(run)
    check_model(run, source)
    origin = open_origin(run, source)
    generated = isinstance(run.data.source, SelfGenerated)
    windows = None if generated else run.data.windows(source.tokenizer(), run.seed, source.config.model_type)
    trainer = open_trainer(run)
    # through the first process: the others may still be setting up the group when it ends with an error
    collectives.broadcast_from_rank0(lambda: check_divisible(run.data.samples, run.data.held_out))
    for stage in run.stages:
        stage.check_samples(run.data.samples // collectives.world_size())
    for model_stage in run.model_stages.values():
        codes = sum(map(prod, linear_shapes(source, run.scheme).values()))
        model_stage.check_text(run.data.samples * run.data.length, codes)
    for export in run.exports:
        check_reader(export.format, run.scheme)
    device = trainer.strategy.root_device
    if run.compile:
        check_compiler(device)
    collectives.broadcast_from_rank0(lambda: check_streaming(source, device))
    if windows is None:
        windows = generated_windows(run, source, device)
    check_text(run.data, windows.distinct)
    tokens = torch.cat([windows.calibration, windows.held_out])
    collectives.broadcast_from_rank0(lambda: verify_equivalences(run, source, tokens, device))
    sample, block_arguments = source.embed(tokens[:1], device)
    share = collectives.local_shard(tokens)
    size, saved = len(share) * sample.nbytes, 2 * len(tokens) * sample.nbytes if run.save_streams_every else 0
    return Plan(
        run=run,
        source=source,
        tokens=share,
        held_out=run.data.held_out // collectives.world_size(),
        generated=windows if generated else None,
        evaluation=run.evaluation.sequences(source.tokenizer(), source.config.model_type) if run.evaluation else None,
        device=device,
        placement=ActivationPlacement.choose(
            run.streams, device, run.out, size, processes=launched_processes()[1], saved=saved
        ),
        precision=trainer.precision_plugin.forward_context,
        block_arguments=block_arguments,
        fingerprint=collectives.broadcast_from_rank0(
            lambda: (
                fingerprint(settings)
                | {"data digest": digest(tokens), "model digest": source.digest()}
                | ({} if origin is None else {"origin digest": origin.digest})
            )
        ),
        environment=environment(device),
        origin=origin,
    )


def open_trainer(run: Run) -> L.Trainer:
    """Make a Trainer, for its device and precision. With several processes, this call sets up the process group.

    Raises:
        UserError: Lightning refuses the arguments, or they imply a different number of processes than were started.
    """
    given = trainer_arguments(run.trainer)
    try:
        trainer = run.trainer(**launch_arguments(given))
    except UserError:
        raise
    except Exception as error:  # Lightning and torch raise many types
        raise UserError(f"trainer: {one_line(error)}; change or remove that argument of the Trainer") from error
    set_up_processes(trainer, given)
    return trainer
