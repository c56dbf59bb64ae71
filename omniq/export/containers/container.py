# SPDX-License-Identifier: Apache-2.0
"""What a container is: it lays out a whole model on disk, each linear as a codec gives it, and reads it back.

Codecs and containers are separate, because runtimes share them: two codecs of today lie in the same folder of Hugging
Face, and other runtimes put the same codes into a file of another kind. A container can always be read back by omniq
alone. Its runtime is needed only to compare logits, and ``lacks`` says what this machine lacks for that.

A container also decides how the parameters outside the blocks are stored (``SourceModel.outside``). A runtime that
wants embedding and head as codes gets them there: as results beside those of the blocks, made before ``write``,
because a writer never rounds.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
"""Fetches a finished block by its index; called once for each block, in order, so that one is in memory at a time."""

C = TypeVar("C", bound=Codec, contravariant=True)


class Reader(Protocol):
    """An exported model, read without its runtime; a context manager that keeps its files open.

    Attributes:
        model: the stock model that the recorded config describes.
        names: of all stored tensors.
        size: bytes of all tensors.
    """

    @property
    def model(self) -> TargetModel: ...

    @property
    def names(self) -> set[str]: ...

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

    def check_description(self, linears: Mapping[str, WrittenLinear]) -> None:
        """Make sure that the description, which tells a runtime how to read the tensors, is that of these linears.

        Args:
            linears: all quantized linears by full name.

        Raises:
            CorruptFile: the description is another one.
        """

    def names_of(self, name: str) -> set[str]:
        """The stored tensors of a quantized linear, by its full name."""


class Container(Protocol[C]):
    """The layout of a model on disk."""

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
        """Write all parameters and what a runtime needs to read them.

        Args:
            source: gives config and parameters outside the blocks.
            codec: lays out each linear.
            folder: an empty folder.
            format: the user's name of codec and container, to be recorded for ``format_of``.
            scheme: what the model asks of a runtime.
            max_shard_bytes: size of a file, and of what is held in memory beside one block.

        Returns:
            facts for the model card.

        Raises:
            UserError: a parameter that codec or runtime cannot hold, or a disk that cannot be written.
        """

    def write_companions(self, source: SourceModel, facts: Mapping[str, Any], folder: Path) -> None:
        """Write what lies beside the parameters: tokenizer, recipe, model card."""

    def read(self, path: Path, codec: C) -> Reader:
        """Open what ``write`` has written.

        Raises:
            CorruptFile: a file is missing or damaged.
        """

    def is_ours(self, path: Path) -> bool:
        """Whether omniq has filled this folder with this container."""

    def format_of(self, path: Path) -> str:
        """The user's name of the format that a folder holds.

        Raises:
            CorruptFile: the file that records it is damaged.
        """

    def lacks(self, codec: C, path: Path | None = None) -> str | None:
        """What the runtime needs and this machine lacks, with the remedy; None if it lacks nothing.

        Args:
            path: a written model, to compare the memory that it needs too.
        """

    def open(self, path: Path) -> PreTrainedModel:
        """The model as its runtime opens it."""


def cast_for_export(name: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """A parameter that is not quantized, in the dtype of deployment.

    Raises:
        UserError: that dtype cannot hold one of its values, or one is no number.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(scheme.export_dtype)
    if not cast.isfinite().all():
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds NaN or infinity: get the model's weights again")
        dtype = dtype_name(cast.dtype)
        raise UserError(f"{name} holds values beyond scheme.dtype {dtype}: set scheme.dtype to bfloat16")
    return cast
