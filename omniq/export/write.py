# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint from finished blocks: check, write into a temporary folder, rename.

The container writes the files. This module ensures that a reader finds a complete checkpoint or none
(``output_folder.py``). ``mend_companions`` compares the files beside the weights of an earlier export with the files
that would be written now.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omniq.export.check import check_format, linear_shapes
from omniq.export.containers.container import Results
from omniq.export.containers.shards import writing
from omniq.export.formats.codec import Codec
from omniq.export.manifest import MANIFEST, entries, foreign_entries, recorded_digests, remove, write_manifest
from omniq.export.output_folder import check_output, check_replaceable, make_partial, replace, resolved
from omniq.export.registry import find_format
from omniq.export.restate import restated, stored_bits_per_weight
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.atomic import flush


def export_checkpoint(
    source: SourceModel,
    results: Results,
    out: str | os.PathLike[str],
    *,
    scheme: Scheme,
    card: Mapping[str, Any],
    format: str = "compressed-tensors",
    container_bits: int | None = None,
    max_shard_bytes: int = 2**30,
) -> Path:
    """Write a checkpoint that the runtime of a format can open, and return its folder.

    Args:
        source: provides all parameters outside the blocks, the config and the tokenizer.
        results: fetches a finished block by its index.
        out: the folder to create. An earlier export there is replaced when the new one is complete.
        scheme: the number formats of the finished blocks; parameters are exported in the dtype of the scales.
        card: facts for the model card (``omniq.export.containers.card``); ``recipe`` also goes to ``recipe.yaml``.
        format: a name in ``FORMATS``.
        container_bits: bits of stored codes for narrower grids; None to store every grid in its own bits.
        max_shard_bytes: largest size of a weight file, and of the tensors held in memory beside one block.

    Raises:
        UserError: the format is unknown, the format or the model cannot hold the scheme or a parameter, the disk is
            full or cannot be written, ``out`` is not an export, or it holds a file of the user.
    """
    chosen, out = find_format(format), resolved(out)
    stored = check_format(format, scheme, source=source, container_bits=container_bits)
    codec, container = chosen.codec(stored), chosen.container
    if stored != scheme:
        results = restated(source, results, stored)
    check_output(out)
    check_replaceable(out)
    source.tokenizer()  # raises if it is missing, before the weights are written
    with _partial(out) as partial:
        facts = container.write(
            source, results, codec, partial, format=format, scheme=stored, max_shard_bytes=max_shard_bytes
        )
        about = _about(out, format, codec, source, scheme, stored)
        container.write_companions(source, facts | about | dict(card), partial)
        replace(partial, out)
    return out


def mend_companions(
    source: SourceModel,
    out: str | os.PathLike[str],
    *,
    scheme: Scheme,
    card: Mapping[str, Any],
    format: str,
    container_bits: int | None = None,
) -> list[str]:
    """Compare the files beside the weights of an export with those that would be written now; replace differing ones.

    Generation config, tokenizer, recipe and card are compared byte by byte, because a damaged file is as unusable as a
    missing one. Other files in the folder are not changed.

    Args:
        source, scheme, format, container_bits: as for ``export_checkpoint``.
        out: the folder of the export.
        card: all facts for the model card except the size.

    Returns:
        names of the replaced files.

    Raises:
        UserError: the disk cannot be written or is full.
        CorruptFile: a weight file is damaged.
    """
    chosen, out = find_format(format), resolved(out)
    stored = check_format(format, scheme, source=source, container_bits=container_bits)
    codec, container = chosen.codec(stored), chosen.container
    check_output(out)
    with container.read(out, codec) as weights:
        about = {"bytes": weights.size} | _about(out, format, codec, source, scheme, stored)
    with _partial(out) as partial:
        container.write_companions(source, about | dict(card), partial)
        with writing(out):
            wanted = sorted(Path(name) for name in entries(partial) if name != MANIFEST)
            differing = [name for name in wanted if not _same_bytes(partial / name, out / name)]
            if differing:  # first the record: a file that is there is always in it
                own = set(entries(out)) - set(foreign_entries(out))
                names = (own | {name.as_posix() for name in wanted}) - {MANIFEST}
                write_manifest(out, names, recorded_digests(out))
            for name in differing:
                flush(partial / name)
                (out / name).parent.mkdir(exist_ok=True)
                (partial / name).replace(out / name)
            for folder in {out, *((out / name).parent for name in differing)}:
                flush(folder)
    return [str(name) for name in differing]


def _about(out: Path, format: str, codec: Codec, source: SourceModel, scheme: Scheme, stored: Scheme) -> dict[str, Any]:
    """Facts for the model card about the format, and about the stored scheme if it is not that of the run."""
    about: dict[str, Any] = {"name": out.name, "format": format, "requires": codec.requires}
    if stored == scheme:
        return about
    bits = stored_bits_per_weight(stored, linear_shapes(source, scheme))
    return about | {"stored_scheme": str(stored), "stored_bits_per_weight": bits}


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """Create an empty folder beside ``out``; it is removed at the end unless it was renamed."""
    partial = make_partial(out)
    try:
        yield partial
    finally:
        with suppress(OSError):  # it was renamed, or the disk has become read-only
            remove(partial)


def _same_bytes(left: Path, right: Path) -> bool:
    return right.is_file() and left.read_bytes() == right.read_bytes()
