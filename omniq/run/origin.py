# SPDX-License-Identifier: Apache-2.0
"""The finished blocks that a run starts from (``omniq.stages.FromCheckpoint``).

They come from a run directory of omniq, or from a folder with a quantized model: an export of omniq in any format, or a
checkpoint of another program in a format that omniq reads. Codes and scales are taken as they are.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omniq.blocks.grids import scheme_grids
from omniq.config.run import Run
from omniq.config.saved import open_run
from omniq.errors import CorruptFile, UserError, one_line
from omniq.export import FORMATS, Format, cast_for_export, find_format
from omniq.export.containers.folder_reader import read_config
from omniq.export.registry import container_of
from omniq.grid.affine import Grid
from omniq.grid.dtypes import torch_dtype
from omniq.grid.scheme import Scheme
from omniq.models.checkpoint import file_digest
from omniq.models.source import SourceModel
from omniq.stages import FromCheckpoint
from omniq.storage.atomic import expand_home
from omniq.storage.block_result import BlockResult
from omniq.storage.claim import read_fingerprint
from omniq.storage.ownership import MODEL_STAGES, is_run
from omniq.storage.records import finished_blocks, header_digest, load_record
from omniq.storage.run_dir import RunDir


@dataclass(frozen=True)
class Origin:
    """Finished blocks.

    Args:
        read: reads a block by its index.
        digest: identifies their content.
    """

    read: Callable[[int], BlockResult]
    digest: str


def open_origin(run: Run, source: SourceModel) -> Origin | None:
    """Open the finished blocks that the first stage of a run names; None if it calibrates its blocks itself.

    Raises:
        UserError: the path holds no finished blocks, they belong to another model, or they do not fit the scheme.
    """
    first = run.stages[0]
    if not isinstance(first, FromCheckpoint):
        return None
    path = expand_home(first.path)
    origin = _of_run(path, source) if is_run(path) else _of_checkpoint(path, run.scheme, source)
    try:
        block = origin.read(0)
    except CorruptFile as error:
        raise UserError(f"stages: FromCheckpoint.path {path}: {error}") from error
    for name, linear in block.linears.items():
        full = f"{source.block_name(0)}.{name}"
        if linear.grid.second is not None:
            raise UserError(
                f"stages: FromCheckpoint.path {path}: the scales of {full} are stored as codes, so they cannot be "
                "tuned: make the run without scale_bits"
            )
        if linear.grid != run.scheme.grid_of(full):
            raise UserError(
                f"stages: FromCheckpoint.path {path}: {full} has {_words(linear.grid)}, and the scheme asks for "
                f"{_words(run.scheme.grid_of(full))}: set scheme as the checkpoint has it, or use `omniq tune`"
            )
    return origin


def _words(grid: Grid | None) -> str:
    if grid is None:
        return "floating point"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"{grid.bits} bits, group size {grid.group_size}, {kind}, scales in {grid.scale_dtype}"


def _of_run(path: Path, source: SourceModel) -> Origin:
    """Read the blocks of a finished run, with what its own stages of the whole model changed."""
    run, _ = open_run(path)
    recorded = read_fingerprint(path)
    if recorded.get("model digest") != source.digest():
        raise UserError(
            f"stages: FromCheckpoint.path {path}: the run was made from another model: give the model of that run as "
            "model.path"
        )
    done, stages = finished_blocks(path), list(run.model_stages)
    if len(done) != source.num_blocks or not _are_finished(path, stages):
        raise UserError(
            f"stages: FromCheckpoint.path {path}: the run is not finished ({len(done)} of {source.num_blocks} blocks): "
            "continue it first, by its own command"
        )
    folder = RunDir(path)
    content: list[Any] = [recorded]
    for index in range(source.num_blocks):
        for part in ("safetensors", *(f"{stage}.safetensors" for stage in stages)):
            content.append(header_digest(folder.block_path(index, part)))
    return Origin(lambda index: folder.final_block(index, stages), _digest(content))


def _are_finished(path: Path, stages: list[int]) -> bool:
    """Return whether a run has finished its stages of the whole model."""
    record = path / MODEL_STAGES
    finished = load_record(record).keys() if record.exists() else set()
    return {str(stage) for stage in stages} <= finished


def _of_checkpoint(path: Path, scheme: Scheme, source: SourceModel) -> Origin:
    """Read the blocks of a quantized checkpoint in a Hugging Face folder."""
    chosen = format_of(path)
    reader = chosen.container.read(path, chosen.codec(scheme))
    for name, tensor in source.outside():
        ours = cast_for_export(name, tensor, scheme, source.keeps_float32(name))
        if name in reader.names and not torch.equal(reader[name], ours.to(reader[name].dtype)):
            raise UserError(
                f"stages: FromCheckpoint.path {path}: {name} differs from the model in model.path, which must be the "
                "model that the checkpoint was made from"
            )

    def read(index: int) -> BlockResult:
        block = source.block_name(index)
        linears = {name: reader.read(f"{block}.{name}") for name in scheme_grids(source, scheme, index)}
        parameters = (name.removeprefix(".") for name, _, _ in source.structure(index))
        names = [name for name in parameters if name.removesuffix(".weight") not in linears]
        biases = [f"{name}.bias" for name in linears if f"{block}.{name}.bias" in reader.names]
        tensors = {name: reader[f"{block}.{name}"] for name in dict.fromkeys([*names, *biases])}
        return BlockResult(linears, tensors)

    files = sorted(path.glob("*.safetensors"))
    return Origin(read, _digest({"files": [file_digest(file).hex() for file in files], "config": read_config(path)}))


def format_of(path: Path) -> Format:
    """Find the format of a folder with a quantized model.

    Raises:
        UserError: the folder holds no quantized model, or its format is not one that omniq reads.
    """
    container = container_of(path)
    try:
        if container is not None:
            return find_format(container.format_of(path))
        method = read_config(path)["quantization_config"].get("quant_method")
    except CorruptFile as error:
        raise UserError(
            f"checkpoint {path}: {error}: give a run directory, or a folder with a quantized model"
        ) from error
    if method not in FORMATS:
        raise UserError(
            f"checkpoint {path}: quant_method {method!r} is not a format that omniq reads: give one of "
            f"{', '.join(sorted(FORMATS))}"
        )
    return find_format(str(method))


def scheme_of(path: Path) -> dict[str, Any]:
    """Describe the number formats of a quantized checkpoint as the section ``scheme`` of a configuration.

    Raises:
        UserError: the checkpoint stores other numbers than integers on one uniform grid.
    """
    chosen, config = format_of(path), read_config(path)
    quantization = config["quantization_config"]
    codec = chosen.codec(Scheme(dtype=config["dtype"]))
    grids: dict[str, Grid | None] = {}
    try:
        for group in quantization.get("config_groups", {}).values():
            kind = group["weights"]["type"]
            if kind != "int" or group["weights"].get("actorder") not in (None, False, "static", "weight"):
                raise KeyError(f"weights of type {kind}, actorder {group['weights'].get('actorder')}")
            if group.get("input_activations"):
                raise KeyError("quantized activations; tune its run directory instead")
        with chosen.container.read(path, codec) as reader:
            for name in reader.model.linears:
                quantized = reader.names_of(name) - {f"{name}.weight"}
                grids[name] = codec.grid_of(name, quantization, torch_dtype(config["dtype"])) if quantized else None
    except (KeyError, TypeError, AttributeError, CorruptFile, UserError) as error:
        raise UserError(
            f"checkpoint {path}: its weights are not integers on a uniform grid ({one_line(error)}): give a checkpoint "
            "whose linears have integer codes, scales and zero points"
        ) from error
    found = {grid for grid in grids.values() if grid is not None}
    if len(found) != 1:
        raise UserError(f"checkpoint {path}: it has {len(found)} grids, and omniq tune takes checkpoints with one")
    (grid,) = found
    size = "" if grid.group_size == -1 else f"g{grid.group_size}"
    rules = [{"layers": name, "name": "none"} for name, each in grids.items() if each is None and ".layers." in name]
    return {"name": f"W{grid.bits}A16{size}", "symmetric": grid.symmetric, "dtype": config["dtype"], "rules": rules}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
