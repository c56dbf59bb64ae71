# SPDX-License-Identifier: Apache-2.0
"""From finished blocks to a checkpoint folder that any runtime opens.

    <out>.partial/   everything is written here, one block in memory at a time, flushed to the disk
    <out>            appears by a rename when all of it is there

An ``out`` that holds an earlier export is moved to ``.<out>.previous`` for the instant between two renames and removed
after. A process killed at any moment leaves the old export or the new one, never a mixture; what it leaves beside them
is put right by the next export to the same place. The same inputs give the same bytes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from omniq.errors import UserError
from omniq.export.card import model_card
from omniq.export.deployment import Deployment, deployment
from omniq.export.format import Format, Written, scheme_of
from omniq.export.registry import find_format
from omniq.export.shards import ShardWriter, writing
from omniq.files import CorruptFile
from omniq.models.family import Family
from omniq.quantizers.scheme import Scheme
from omniq.result import BlockResult

Results = Callable[[int], BlockResult] | Iterable[BlockResult]


class Source(Protocol):
    """What an export asks of the source model; ``omniq.models.source.SourceModel`` is one."""

    config: PretrainedConfig
    family: Family
    folder: Path
    num_blocks: int

    def block_name(self, index: int) -> str:
        """``model.layers.7``."""

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored parameter that is not in a block, by full name."""

    def tokenizer(self) -> Any:
        """The tokenizer, with ``save_pretrained``."""


def each_result(source: Source, results: Results) -> Iterator[tuple[str, BlockResult]]:
    """Finished blocks in order, each with its full name; holds one at a time.

    Raises:
        UserError: there are fewer results than blocks, or more.
    """
    count = 0
    for result in map(results, range(source.num_blocks)) if callable(results) else results:
        if count < source.num_blocks:
            yield source.block_name(count), result
        count += 1
    if count != source.num_blocks:
        raise UserError(f"{count} blocks are finished of {source.num_blocks}: finish the run before exporting it")


def export_checkpoint(
    source: Source,
    results: Results,
    out: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    card: Mapping[str, Any],
    scheme: Scheme | None = None,
    max_shard_bytes: int = 2**30,
) -> Path:
    """Write a checkpoint that ``AutoModelForCausalLM.from_pretrained`` opens.

    Args:
        source: gives everything outside the blocks, the config and the tokenizer.
        results: finished blocks in order, or a function that fetches one by its index.
        out: the folder to make; an earlier export there is replaced once the new one is complete.
        format: a name in ``FORMATS``.
        card: facts for the model card (see ``omniq.export.card``); ``card["recipe"]`` also goes to ``recipe.yaml``.
        scheme: what the model asks of a runtime; by default the weight-only scheme of the first block. The model is
            deployed in the dtype of its scales.
        max_shard_bytes: size of a safetensors file, and of what is held in memory beside one block.

    Returns:
        the folder.

    Raises:
        UserError: unknown format; scheme or parameter that format or model cannot hold; too few blocks; a disk that
            cannot be written or is full; an ``out`` that holds something else.
    """
    layout, out = find_format(format), Path(out).resolve()
    if scheme is not None:
        layout.check(scheme, source.family)
    check_output(out)
    tokenizer = source.tokenizer()
    partial = _partial(out)
    try:
        with writing(partial):
            partial.mkdir()
        facts = _write_weights(source, results, partial, layout, scheme, max_shard_bytes)
        facts |= {"name": out.name, "format": layout.name, "requires": layout.requires, **card}
        _write_companions(source, tokenizer, facts, partial)
        _replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def check_output(out: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Make sure that a checkpoint can be written to ``out``; worth calling before any long work.

    Also puts right what a killed export left beside it.

    Args:
        needed_bytes: expected size of the checkpoint, if known.

    Raises:
        UserError: ``out`` is a file or holds something other than an export, its folder cannot be written, or the
            disk has no room.
    """
    out = Path(out).resolve()
    partial, previous = _partial(out), _previous(out)
    if in_the_way := next((parent for parent in out.parents if parent.is_file()), None):
        raise UserError(f"cannot write {out}: {in_the_way} is a file; choose another folder")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not out.exists():
            previous.rename(out)  # killed between the two renames: the old export is the last complete one
        for leftover in (partial, previous):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()  # a probe: the folder can be written
        partial.rmdir()
        free = shutil.disk_usage(out.parent).free
    if out.exists() and not _is_export(out):
        raise UserError(f"export to {out}: it holds something that omniq did not export; choose an empty or new folder")
    if free < needed_bytes:
        raise UserError(f"cannot write {out}: it needs {needed_bytes:,} bytes and the disk has {free:,}; free some")


def earlier_export(out: str | os.PathLike[str]) -> str | None:
    """The format of the export that a folder holds, by its ``config.json``; None if it holds none.

    Raises:
        CorruptFile: the file does not tell.
    """
    out = Path(out)
    if not _is_export(out) or not any(out.iterdir()):
        return None
    try:
        return str(json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{out / 'config.json'} does not tell the format") from error


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _is_export(out: Path) -> bool:
    """An empty folder, or one that an export has filled."""
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or all((out / name).exists() for name in ("config.json", "recipe.yaml"))


def _write_weights(
    source: Source, results: Results, folder: Path, layout: Format, scheme: Scheme | None, max_shard_bytes: int
) -> dict[str, Any]:
    """Write all tensors and ``config.json``; return what the card says of them."""
    writer = ShardWriter(folder, max_shard_bytes)
    linears: dict[str, Written] = {}  # by full name
    plain: set[str] = set()  # full names of all other parameters
    summaries = []
    for block, result in each_result(source, results):
        if scheme is None:
            scheme = scheme_of(result)
            layout.check(scheme, source.family)
        for name, linear in result.linears.items():
            linears[f"{block}.{name}"] = Written.of(linear)
            for key, tensor in layout.tensors(f"{block}.{name}", linear, scheme).items():
                writer.add(key, tensor)
        for name, tensor in result.tensors.items():
            plain.add(f"{block}.{name}")
            writer.add(f"{block}.{name}", deployed(f"{block}.{name}", tensor, scheme))
        summaries.append(dict(result.summary))
    if scheme is None:
        raise UserError("there are no blocks to export")
    if not linears:
        raise UserError("no linear of any block is quantized: quantize at least one block before exporting")
    for name, tensor in source.outside():
        plain.add(name)
        writer.add(name, deployed(name, tensor, scheme))
    names = plain | {f"{name}.weight" for name in linears}
    model = deployment(source.config, names)
    for name, shape in model.biases_without_value(names).items():
        writer.add(name, torch.zeros(shape, dtype=scheme.grid.scale_dtype))
    size = writer.close()
    unquantized = [name for name in model.linears if name not in linears]
    _write_config(model, layout.quantization_config(scheme, unquantized, linears), scheme, folder)
    weights = sum(linear.weights for linear in linears.values())
    mean_bits = sum(linear.bits_per_weight * linear.weights for linear in linears.values()) / weights
    return {"scheme": scheme.name, "bits_per_weight": mean_bits, "bytes": size, "blocks": summaries}


def deployed(name: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """A parameter that is not quantized, in the dtype of deployment.

    Raises:
        UserError: that dtype cannot hold one of its values.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(scheme.grid.scale_dtype)
    if not cast.isfinite().all():
        raise UserError(f"{name} holds values beyond {cast.dtype}: use bfloat16 as the dtype of scales")
    return cast


def _write_config(model: Deployment, quantization: dict[str, Any], scheme: Scheme, folder: Path) -> None:
    config = model.config
    config.dtype = scheme.grid.scale_dtype
    config.architectures = [model.architecture]
    config.quantization_config = quantization
    with writing(folder / "config.json"):
        config.to_json_file(folder / "config.json")


def _write_companions(source: Source, tokenizer: Any, facts: Mapping[str, Any], folder: Path) -> None:
    """Generation config, tokenizer, recipe and model card."""
    given = source.folder / "generation_config.json"
    with writing(folder):
        if given.is_file():  # copied as it is: transformers refuses to save some that it loads
            shutil.copyfile(given, folder / given.name)
        else:
            GenerationConfig.from_model_config(source.config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(str(facts.get("recipe", "")))
        (folder / "README.md").write_text(model_card(facts))


def _replace(partial: Path, out: Path) -> None:
    """Flush everything, then put ``partial`` in the place of ``out``."""
    previous = _previous(out)
    with writing(out):
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if out.exists():
            out.rename(previous)
        partial.rename(out)
        _flush(out.parent)
        if previous.exists():
            shutil.rmtree(previous)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
