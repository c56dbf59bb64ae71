# SPDX-License-Identifier: Apache-2.0
"""From finished blocks to a checkpoint folder that any runtime opens.

Weights are written first, one block in memory at a time, then all the rest: config, tokenizer, generation config,
recipe and model card. The same inputs give the same bytes, so that what lies beside the weights of an earlier export is
held against what would be written now (``mend_companions``).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from omniq.blocks.grids import scheme_layout
from omniq.errors import UserError
from omniq.export.containers.card import model_card
from omniq.export.containers.output_folder import check_output, partial_of, replace
from omniq.export.containers.shards import ShardReader, ShardWriter, writing
from omniq.export.containers.target_model import TargetModel, target_model
from omniq.export.formats.format import Format, Written, scheme_of
from omniq.export.formats.registry import find_format
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.atomic import flush
from omniq.storage.block_result import BlockResult

Results = Callable[[int], BlockResult] | Iterable[BlockResult]


def each_result(source: SourceModel, results: Results) -> Iterator[tuple[str, BlockResult]]:
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
    source: SourceModel,
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
        source: gives everything outside the blocks, the config and the tokenizer. results: finished blocks in order, or
        a function that fetches one by its index. out: the folder to make; an earlier export there is replaced once the
        new one is complete. format: a name in ``FORMATS``. card: facts for the model card (see
        ``omniq.export.containers.card``); ``card["recipe"]`` also goes to ``recipe.yaml``. scheme: what the model asks
        of a runtime; by default the weight-only scheme of the first block. The model is
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
        layout.check(scheme, [scheme_layout(source, scheme, index) for index in range(source.num_blocks)])
    check_output(out)
    tokenizer = source.tokenizer()
    partial = partial_of(out)
    try:
        with writing(partial):
            partial.mkdir()
        facts = _write_weights(source, results, partial, layout, scheme, max_shard_bytes)
        _write_companions(source, tokenizer, facts | _named(out, layout) | dict(card), partial)
        replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def mend_companions(
    source: SourceModel, out: str | os.PathLike[str], *, format: str, card: Mapping[str, Any]
) -> list[str]:
    """Hold what lies beside the weights of an export against what would be written now, and write anew what differs.

    Generation config, tokenizer, recipe and card are compared byte by byte: a damaged one is as unusable as a missing
    one. Other files in the folder are left alone.

    Args:
        source, format: as given to ``export_checkpoint``.
        out: the folder of the export.
        card: facts for the model card, all that it should say but the size.

    Returns:
        what was written anew.

    Raises:
        UserError: the disk cannot be written or is full.
        CorruptFile: a file of the weights is damaged.
    """
    layout, out = find_format(format), Path(out).resolve()
    check_output(out)
    partial = partial_of(out)
    with ShardReader(out) as weights:
        size = weights.size
    try:
        with writing(partial):
            partial.mkdir()
        _write_companions(source, source.tokenizer(), {"bytes": size} | _named(out, layout) | dict(card), partial)
        with writing(out):
            wanted = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            differing = [name for name in wanted if not _same_bytes(partial / name, out / name)]
            for name in differing:
                flush(partial / name)
                (out / name).parent.mkdir(exist_ok=True)
                (partial / name).replace(out / name)
            for folder in {out, *((out / name).parent for name in differing)}:
                flush(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [str(name) for name in differing]


def _named(out: Path, layout: Format) -> dict[str, Any]:
    """What the card says of the folder."""
    return {"name": out.name, "format": layout.name, "requires": layout.requires}


def _same_bytes(left: Path, right: Path) -> bool:
    return right.is_file() and left.read_bytes() == right.read_bytes()


def _write_weights(
    source: SourceModel, results: Results, folder: Path, layout: Format, scheme: Scheme | None, max_shard_bytes: int
) -> dict[str, Any]:
    """Write all tensors and ``config.json``; return what the card says of them."""
    writer = ShardWriter(folder, max_shard_bytes)
    linears: dict[str, Written] = {}  # by full name
    plain: set[str] = set()  # full names of all other parameters
    summaries = []
    for block, result in each_result(source, results):
        if scheme is None:
            scheme = scheme_of(result)
            layout.check(scheme, [scheme_layout(source, scheme, index) for index in range(source.num_blocks)])
        for name, linear in result.linears.items():
            linears[f"{block}.{name}"] = Written.of(linear)
            for key, tensor in layout.tensors(f"{block}.{name}", linear, scheme).items():
                writer.add(key, tensor)
        for name, tensor in result.tensors.items():
            plain.add(f"{block}.{name}")
            writer.add(f"{block}.{name}", cast_for_export(f"{block}.{name}", tensor, scheme))
        summaries.append(dict(result.summary))
    if scheme is None:
        raise UserError("there are no blocks to export")
    if not linears:
        raise UserError("no linear of any block is quantized: quantize at least one block before exporting")
    for name, tensor in source.outside():
        plain.add(name)
        writer.add(name, cast_for_export(name, tensor, scheme))
    names = plain | {f"{name}.weight" for name in linears}
    model = target_model(source.config, names)
    for name, shape in model.biases_without_value(names).items():
        writer.add(name, torch.zeros(shape, dtype=scheme.grid.scale_dtype))
    size = writer.close()
    unquantized = [name for name in model.linears if name not in linears]
    _write_config(model, layout.quantization_config(scheme, unquantized, linears), scheme, folder)
    weights = sum(linear.weights for linear in linears.values())
    mean_bits = sum(linear.bits_per_weight * linear.weights for linear in linears.values()) / weights
    return {"scheme": str(scheme), "bits_per_weight": mean_bits, "bytes": size, "blocks": summaries}


def cast_for_export(name: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """A parameter that is not quantized, in the dtype of deployment.

    Raises:
        UserError: that dtype cannot hold one of its values, or one is no number.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(scheme.grid.scale_dtype)
    if not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity: get the model's weights again")
        dtype = str(cast.dtype).removeprefix("torch.")
        raise UserError(f"{name} holds values beyond scheme.dtype {dtype}: set scheme.dtype to bfloat16")
    return cast


def _write_config(model: TargetModel, quantization: dict[str, Any], scheme: Scheme, folder: Path) -> None:
    config = model.config
    config.dtype = scheme.grid.scale_dtype
    config.architectures = [model.architecture]
    config.quantization_config = quantization
    file = folder / "config.json"
    with writing(file):
        config.to_json_file(file)
        content = json.loads(file.read_text())
        content.pop("auto_map", None)  # names code that lies beside the source: what is written is the stock model
        file.write_text(json.dumps(content | _older_names(content), indent=2, sort_keys=True) + "\n")


def _older_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` as transformers 4 calls them.

    It does not know the new name, and neither does a vLLM that runs on it: without the old ones both would take the
    base 10000, and say nothing. transformers 5 reads both names to the same values.
    """
    rope = content.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if scaled else {})


def _write_companions(source: SourceModel, tokenizer: Any, facts: Mapping[str, Any], folder: Path) -> None:
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
