# SPDX-License-Identifier: Apache-2.0
"""The protocol of containers: write a whole model to disk, with each linear in the form of a codec, and read it back.

Codecs and containers are separate because runtimes share them. Both current codecs use the same Hugging Face folder,
and other runtimes store the same codes in other kinds of files. omniq alone can read every container back. The runtime
is needed only to compare logits, and ``lacks`` tells which requirement this machine lacks for that.

A container also decides how to store the parameters outside the blocks (``SourceModel.outside``). If a runtime requires
codes for embedding and head, they must be created before ``write`` and given as results like those of the blocks,
because a writer never rounds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from omniq.errors import UserError
from omniq.export.containers.target_model import TargetModel
from omniq.export.formats.codec import Codec, WrittenLinear
from omniq.grid.dtypes import dtype_name
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.storage.block_result import BlockResult, QuantizedLinear

Results = Callable[[int], BlockResult]
"""Fetches a finished block by its index; called once per block, in order, so that only one block is in memory."""

C = TypeVar("C", bound=Codec, contravariant=True)


class Reader(Protocol):
    """An exported model, read without its runtime; a context manager that keeps its files open.

    Attributes:
        model: the stock model that the recorded config describes.
        names: names of all stored tensors.
        linears: full names of the quantized linears.
        size: size of all tensors in bytes.
    """

    @property
    def model(self) -> TargetModel: ...

    @property
    def names(self) -> set[str]: ...

    @property
    def linears(self) -> set[str]: ...

    @property
    def size(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __getitem__(self, name: str) -> Tensor:
        """A parameter that is not quantized, by full name."""

    def read(self, name: str) -> QuantizedLinear:
        """A quantized linear by full name, on the grid that the container records for it.

        Raises:
            CorruptFile: the record of grids is damaged.
            KeyError: a tensor is missing.
            ValueError: a tensor has an impossible shape, dtype or padding.
        """

    def as_stored(self, linear: QuantizedLinear) -> QuantizedLinear:
        """The linear that ``read`` must return for a linear of the run: the same weights, on the grid of the file.

        A container whose file has no zero points stores codes on a wider symmetric grid.
        """

    def check_description(self, linears: Mapping[str, WrittenLinear]) -> None:
        """Make sure that the stored description, by which a runtime reads the tensors, matches these linears.

        Args:
            linears: all quantized linears by full name.

        Raises:
            CorruptFile: the description does not match.
        """

    def names_of(self, name: str) -> set[str]:
        """Names of the stored tensors of a quantized linear, given its full name."""


class Container(Protocol[C]):
    """The layout of a model on disk."""

    def check_source(self, source: SourceModel) -> None:
        """Refuse a model that the runtime of this container does not know; called before any long work.

        Raises:
            UserError: names the part of the model, and another format.
        """

    def write(
        self,
        source: SourceModel,
        results: Results,
        codec: C,
        folder: Path,
        *,
        format: str,
        scheme: Scheme,
        max_shard_bytes: int,
    ) -> dict[str, Any]:
        """Write all parameters and the description that a runtime needs to read them.

        Args:
            source: provides the config and the parameters outside the blocks.
            results: fetches a finished block by its index.
            codec: the codec of the linears.
            folder: an empty folder.
            format: the format name that users type, to be recorded for ``format_of``.
            scheme: the number formats of the model.
            max_shard_bytes: largest size of a file, and of the tensors held in memory beside one block.

        Returns:
            facts for the model card.

        Raises:
            UserError: codec or runtime cannot hold a parameter, or the disk cannot be written.
        """

    def write_companions(self, source: SourceModel, facts: Mapping[str, Any], folder: Path) -> None:
        """Write the files beside the parameters: tokenizer, recipe, model card."""

    def read(self, path: Path, codec: C) -> Reader:
        """Open a model that ``write`` has written.

        Raises:
            CorruptFile: a file is missing or damaged.
        """

    def is_ours(self, path: Path) -> bool:
        """True if omniq has written this folder with this container."""

    def format_of(self, path: Path) -> str:
        """The format name of an exported folder, as users type it.

        Raises:
            CorruptFile: the file that records it is damaged.
        """

    def lacks(self, codec: C, path: Path | None = None) -> str | None:
        """The requirement of the runtime that this machine lacks, with the remedy; None if it lacks no requirement.

        Args:
            codec: the codec of the linears.
            path: a written model; if given, the memory that it needs is checked too.
        """

    def open(self, path: Path) -> PreTrainedModel:
        """Open the model in its runtime."""


def cast_for_export(name: str, tensor: Tensor, scheme: Scheme, keep: bool = False) -> Tensor:
    """Cast a parameter that is not quantized to the export dtype, or to float32 if ``keep`` is true.

    Raises:
        UserError: a value is not finite, or exceeds the range of the dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(torch.float32 if keep else scheme.export_dtype)
    if not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise UserError(f"{name} contains NaN or infinity: download the model's weights again")
        dtype = dtype_name(cast.dtype)
        raise UserError(f"{name} contains values beyond the range of {dtype}: set scheme.dtype to bfloat16")
    return cast
