# SPDX-License-Identifier: Apache-2.0
"""Everything that is checked, opened and counted before the first block: a run that cannot work stops here."""

import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor

from omniq import processes
from omniq.config import Run, check_trainer, compute_dtype, trainer_arguments
from omniq.data import digest
from omniq.data.text import one_line
from omniq.errors import UserError
from omniq.export import check_free, deployed, find_format
from omniq.launch import join, launch_arguments, started
from omniq.models.source import SourceModel
from omniq.ownership import check_writable
from omniq.quantizers.hooks import check_family
from omniq.streams import Home, Precision

# Sections and keys that may change between start and resume: they do not touch the calibration's result, or a digest of
# what was read stands for the place it was read from.
FREE_KEYS = (
    *("out", "export", "evaluation", "callbacks", "config"),
    *("model.path", "model.gguf_file", "data.source.init_args.path"),
    *("streams", "save_streams_every"),
)
BINDING_TRAINER_KEYS = ("precision",)
LATER_KEYS = {"compile": False}  # settings that runs of earlier versions have not, and what those did
VERSIONS = ("torch", "lightning", "transformers", "datasets", "compressed-tensors", "safetensors", "numpy")


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Args:
        run: the configuration.
        source: the opened model.
        tokens: calibration windows, then held-out ones, int64 ``[n, t]``; of several processes, this one's share.
        held_out: how many of them are held out.
        evaluation: windows for the perplexity, int64 ``[m, t]``, or None.
        device: where blocks compute.
        home: where the streams live.
        precision: enters the autocast context of the Trainer.
        block_arguments: of each block's forward.
        fingerprint: what must not change between start and resume.
        environment: versions and machine.
    """

    run: Run
    source: SourceModel
    tokens: Tensor
    held_out: int
    evaluation: Tensor | None
    device: torch.device
    home: Home
    precision: Precision
    block_arguments: list[dict[str, Any]]
    fingerprint: Mapping[str, Any]
    environment: Mapping[str, Any]

    def embed(self) -> Tensor:
        """Hidden states that enter block 0, ``[n, t, h]``, where the streams live."""
        parts = self.tokens.split(self.run.batch)
        first, _ = self.source.embed(parts[0], self.device)
        hidden = self.home.empty((len(self.tokens), *first.shape[1:]), first.dtype)
        for part, out in zip(parts, hidden.split(self.run.batch), strict=True):
            out.copy_(self.source.embed(part, self.device)[0])
        return hidden


def open_model(run: Run) -> SourceModel:
    """The model of a run, in the dtype of its computations.

    Raises:
        UserError: the model cannot be opened, or another dtype was asked for than the precision computes in.
    """
    model, dtype = run.model, str(compute_dtype(run.trainer)).removeprefix("torch.")
    if model.dtype not in ("auto", dtype):
        raise UserError(
            f"model.dtype {model.dtype!r} does not go with trainer.precision, which computes in {dtype}: "
            "leave model.dtype at auto, or change trainer.precision"
        )
    return SourceModel.open(
        model.path,
        gguf_file=model.gguf_file,
        dtype=dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )


def prepare(run: Run, settings: str) -> Plan:
    """Check a run from end to end, open its model and draw its windows.

    Raises:
        UserError: the first thing that cannot work, in one line.
    """
    run.check()
    check_trainer(run.trainer)
    check_writable(run.out)
    if run.export.format != "none":
        sparse = any(stage.sparse for stage in run.stages)
        find_format(run.export.format).check(run.scheme, outliers=sparse)
        check_free(run.out / "model")
    source = open_model(run)
    check_model(run, source)
    tokenizer = source.tokenizer()
    windows = run.data.windows(tokenizer, run.seed)
    tokens = torch.cat([windows.calibration, windows.held_out])
    trainer = open_trainer(run)
    check_shares(len(windows.calibration), len(windows.held_out))
    device = trainer.strategy.root_device
    if run.compile:
        check_compiler(device)
    sample, block_arguments = source.embed(tokens[:1], device)
    share = processes.mine(tokens)
    return Plan(
        run=run,
        source=source,
        tokens=share,
        held_out=len(windows.held_out) // processes.count(),
        evaluation=run.evaluation.windows(tokenizer) if run.evaluation else None,
        device=device,
        home=Home.choose(
            run.streams,
            device,
            run.out,
            len(share) * sample.nbytes,
            neighbours=started()[1],
            saved=2 * len(tokens) * sample.nbytes if run.save_streams_every else 0,
        ),
        precision=trainer.precision_plugin.forward_context,
        block_arguments=block_arguments,
        fingerprint=processes.first(
            lambda: fingerprint(settings) | {"data digest": digest(tokens), "model digest": source.digest()}
        ),
        environment=environment(device),
    )


def check_model(run: Run, source: SourceModel) -> None:
    """Refuse a model that scheme, stages, format or disk cannot serve.

    Raises:
        UserError: names what does not fit, and a remedy.
    """
    check_family(source.family, run.scheme.activations)
    for stage in run.stages:
        stage.check_family(source.family)
    if run.export.format != "none":
        find_format(run.export.format).check(run.scheme, source.family)
    widths = linear_widths(source)
    for name, width in widths.items():
        run.scheme.grid.check_width(width, name, widths.values())
    check_lengths(run, getattr(source.config, "max_position_embeddings", None))
    check_room(run, source, widths)


def open_trainer(run: Run) -> L.Trainer:
    """A Trainer as every block will get one, for its device and precision; several processes meet here.

    Raises:
        UserError: Lightning refuses its arguments, or it means another number of processes than there are.
    """
    given = trainer_arguments(run.trainer)
    try:
        trainer = run.trainer(**launch_arguments(given))
    except UserError:
        raise
    except Exception as error:  # Lightning and torch refuse in many ways
        raise UserError(f"trainer: {one_line(error)}; change or leave out that argument of the Trainer") from error
    join(trainer, given)
    return trainer


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch.compile has not what it needs.

    Raises:
        UserError: says what is missing.
    """
    try:
        torch.compile(torch.nn.functional.relu)(torch.zeros(8, device=device))
    except Exception as error:  # every backend has its own
        raise processes.told_once(
            f"compile true: torch.compile does not work here ({one_line(error)}): mend that, or set compile to false"
        ) from error


def check_shares(samples: int, held_out: int) -> None:
    """Refuse samples that several processes cannot share evenly.

    Raises:
        UserError: names the number that is not divisible.
    """
    number = processes.count()
    for name, value in (("data.samples", samples), ("data.held_out", held_out)):
        if value % number:
            nearest = value - value % number or number
            raise UserError(f"{name} {value} is not divisible by the {number} processes: give {nearest}")


def check_lengths(run: Run, positions: int | None) -> None:
    """Refuse windows that are longer than the model's positions.

    Raises:
        UserError: names the field and both numbers.
    """
    wanted = {"data": run.data.length} | ({"evaluation": run.evaluation.length} if run.evaluation else {})
    for section, length in wanted.items():
        if positions is not None and length > positions:
            raise UserError(f"{section}.length: {length} tokens exceed the model's {positions} positions: give fewer")


def check_room(run: Run, source: SourceModel, linears: Iterable[str]) -> None:
    """Refuse a checkpoint that cannot be written: values beyond its dtype, or a disk without room for it.

    Room is what is left to write at least: a byte for each code that is in no finished block yet, and the checkpoint
    if there is none, without its scales.

    Args:
        linears: full names of those that get codes.

    Raises:
        UserError: names the parameter, or what is needed and what is free.
    """
    codes = sum(prod(source.shape(f"{name}.weight")) for name in linears)
    written = sum(path.stat().st_size for path in (run.out / "blocks").glob("*.safetensors"))
    needed = max(0, codes - written)
    if run.export.format != "none":
        checkpoint = codes * find_format(run.export.format).code_bits(run.scheme) // 8
        checkpoint += sum(deployed(name, tensor, run.scheme).nbytes for name, tensor in source.outside())
        needed += 0 if (run.out / "model").exists() else checkpoint
    free = shutil.disk_usage(next(place for place in (run.out, *run.out.absolute().parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"out {run.out}: the run has {needed:,} bytes to write at least and the disk has {free:,}: free some or "
            "choose another folder"
        )


def linear_widths(source: SourceModel) -> dict[str, int]:
    """Input width of every quantized linear of the model, by full name."""
    names = [f"{source.block_name(i)}.{name}" for i in range(source.num_blocks) for name in source.family.linears]
    return {name: source.shape(f"{name}.weight")[1] for name in names}


def fingerprint(settings: str) -> dict[str, Any]:
    """The settings that determine the result, flattened to dotted keys."""
    flat = _flatten(yaml.safe_load(settings))
    named = {key.replace("trainer.init_args.", "trainer.", 1): value for key, value in flat.items()}  # as users write
    return {key: value for key, value in named.items() if not _free(key) and (key, value) not in LATER_KEYS.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """What the run happens on."""
    from omniq import __version__

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "omniq": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": gpu or "cpu",
        "processes": processes.count(),
    }


def _free(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "trainer":
        return rest not in BINDING_TRAINER_KEYS
    return any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {k: v for key, child in node.items() for k, v in _flatten(child, f"{prefix}{key}.").items()}
    if isinstance(node, list) and node:
        return {k: v for i, child in enumerate(node) for k, v in _flatten(child, f"{prefix}{i}.").items()}
    return {prefix.removesuffix("."): node}
