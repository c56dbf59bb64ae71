# SPDX-License-Identifier: Apache-2.0
"""A causal language model on disk, opened block by block.

    source = SourceModel.open("/data/llama-7b")
    hidden, kwargs = source.embed(tokens, "cuda")
    for index in range(source.num_blocks):
        hidden = source.block(index, "cuda")(hidden, **kwargs[index])
    logits = source.logits(hidden, "cuda")

which is the model's own forward to the last bit, with one block in memory at a time. Modules are transformers' own,
built once without weights (``omniq.models.meta``); ``embed`` and ``logits`` run the model's forward around the missing
blocks (``omniq.models.embedding_and_head``).

Opening checks everything that can be checked without reading weights: family, config, files
(``omniq.models.weight_files``), and that every parameter is stored in the shape that the config asks for, and not
quantized (``omniq.models.checks``). Weights come from a ``Checkpoint``, which may be prepared
(``omniq.models.prepare``).

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

import copy
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from omniq.errors import UserError
from omniq.grid.dtypes import MODEL_DTYPES, torch_dtype
from omniq.models.checkpoint import Checkpoint, GgufCheckpoint, SafetensorsCheckpoint
from omniq.models.checks import check_checkpoint, check_generation_config, stored_dtype
from omniq.models.discover import discover_layouts, find_family
from omniq.models.embedding_and_head import EmbeddingAndHead, RepeatedArguments
from omniq.models.experts import with_split_experts
from omniq.models.family import Family
from omniq.models.gguf import reading_gguf
from omniq.models.layout import Layout
from omniq.models.locate import locate
from omniq.models.meta import fill, fill_shared_buffers, meta_model
from omniq.models.stored_names import with_model_names
from omniq.models.transformers_io import open_config, open_tokenizer
from omniq.models.weight_files import weight_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """The folder of a model, and whether the code beside the weights may run."""

    folder: Path
    remote_code: bool


class SourceModel:
    """A model that is read block by block; ``open`` makes it.

    Attributes:
        path: as the user wrote it.
        folder: holds its files.
        config: of transformers, with the dtype and attention in use.
        family: says where its blocks and linears are.
        dtype: of the parameters that the model returns.
        num_blocks: the number of blocks.
    """

    def __init__(
        self,
        path: str,
        place: _Place,
        model: PreTrainedModel,
        family: Family,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.path, self.folder, self._place, self._tokenizer = path, place.folder, place, tokenizer
        self.config: PretrainedConfig = model.config
        self.family = family
        self.dtype: torch.dtype = model.dtype
        self._model, self._checkpoint = model, checkpoint
        self._discovered: list[Layout] = []  # of an undeclared family; filled by the first call of ``layout``
        if not family.groups:
            fill_shared_buffers(model, family.blocks)
        self._blocks = list(model.get_submodule(self.family.blocks).children())
        self.num_blocks = len(self._blocks)
        if not self.num_blocks:
            raise UserError(f"{place.folder / 'config.json'}: the model has no blocks: correct the number of layers")
        self._parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._tie()
        check_checkpoint(self.folder, model, checkpoint, self._alias, self._tied)
        self._embedding_and_head = EmbeddingAndHead(model, self.family, self._read)

    @classmethod
    def open(
        cls,
        path: str | Path,
        gguf_file: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        trust_remote_code: bool = False,
    ) -> "SourceModel":
        """Find a model and check its files.

        Args:
            path: a folder, a file, ``package:name/file``, or a name on the Hub (``omniq.models.locate``).
            gguf_file: the GGUF file to take from a folder or repository.
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for that of the checkpoint (GGUF: float32).
            attention: attention implementation of transformers.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            NotByBlocks: its type is not supported, or it is quantized already.
            UserError: the model is not found, its files are missing or corrupt, or they do not fit its config.
        """
        if dtype != "auto" and dtype not in MODEL_DTYPES:
            raise UserError(f"model.dtype {dtype!r} is unknown: choose auto, {', '.join(MODEL_DTYPES)}")
        folder, named = locate(str(path), gguf_file, trust_remote_code)
        check_generation_config(folder)
        file = weight_file(folder, named)
        place = _Place(folder, trust_remote_code)
        if file.endswith(".gguf"):
            chosen = torch.float32 if dtype == "auto" else torch_dtype(dtype)
            with reading_gguf(folder / file):
                config = open_config(folder, file, trust_remote_code)
                model = meta_model(config, chosen, attention, trust_remote_code)
                family = find_family(model)
                held = with_split_experts(GgufCheckpoint(folder, file, config, chosen), model)
                tokenizer = open_tokenizer(folder, file)
            return cls(str(path), place, model, family, held, tokenizer)
        config = open_config(folder, None, trust_remote_code)
        stored = SafetensorsCheckpoint(folder, file)
        chosen = stored_dtype(config, stored) if dtype == "auto" else torch_dtype(dtype)
        model = meta_model(config, chosen, attention, trust_remote_code)
        family = find_family(model)
        return cls(str(path), place, model, family, with_split_experts(with_model_names(stored, model), model))

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Checkpoint, folder: Path) -> "SourceModel":
        """A model whose parameters come from any checkpoint, such as a prepared one.

        Args:
            model: on the meta device.
            checkpoint: holds its parameters under the names of the model.
            folder: to name in messages.
        """
        return cls(str(folder), _Place(folder, False), model, find_family(model), checkpoint)

    def in_dtype(self, dtype: torch.dtype) -> "SourceModel":
        """The same model with all parameters in another dtype."""
        config, place = copy.deepcopy(self.config), self._place
        model = meta_model(config, dtype, config._attn_implementation, place.remote_code)
        other = SourceModel(self.path, place, model, self.family, self._checkpoint, self._tokenizer)
        other._discovered = self._discovered
        return other

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights, or in the GGUF file.

        Raises:
            UserError: no tokenizer can be read.
        """
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._place.folder, None, self._place.remote_code)
        return self._tokenizer

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file that holds the model; None for a model in safetensors."""
        return next((file for file in self._checkpoint.files if file.suffix == ".gguf"), None)

    def block_name(self, index: int) -> str:
        """Dotted name of a block, such as ``model.layers.7``: the prefix of its parameters."""
        return f"{self.family.blocks}.{index}"

    def layout(self, index: int) -> Layout:
        """The layout of a block: its linears, which of them share an input, and where scales may move."""
        if self.family.groups:
            return self.family.layout(self._blocks[index], index)
        self._discovered = self._discovered or discover_layouts(self)
        return self._discovered[index]

    def structure(self, index: int) -> tuple[tuple[str, type, tuple[int, ...]], ...]:
        """Name, owner and shape of every parameter of a block; equal for blocks of the same kind."""
        parts = self._blocks[index].named_modules()
        return tuple(
            (f"{prefix}.{name}", type(module), tuple(value.shape))
            for prefix, module in parts
            for name, value in module.named_parameters(recurse=False)
        )

    def _kind(self, index: int) -> Hashable:
        """Parameters and plain attributes of the modules of a block; equal for blocks that compute alike."""
        parts = self._blocks[index].named_modules()
        plain = (bool, int, float, str)
        attributes = (
            (prefix, name, value)
            for prefix, module in parts
            for name, value in vars(module).items()
            if isinstance(value, plain) and not name.endswith(("_idx", "_index", "layer_id", "layer_number"))
        )
        return self.structure(index), tuple(attributes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter by full name."""
        return self._parameters[name]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter; tied parameters count once."""
        yield from ((name, shape) for name, shape in self._parameters.items() if name not in self._tied)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in the dtype of the model; tied ones count once."""
        shapes = (shape for name, shape in self._parameters.items() if name not in self._tied)
        return sum(map(prod, shapes)) * self.dtype.itemsize

    def block(self, index: int, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """A block with its weights: a new module on every call, frozen, in evaluation mode, with its own config.

        Args:
            index: from 0.
            device: of its parameters and buffers.
            dtype: of its parameters; that of the model by default.
        """
        block = self._filled(index, torch.device(device), dtype)
        if self.family.batched:
            block.register_forward_pre_hook(RepeatedArguments(self.family.batched), with_kwargs=True)
        return block

    def _filled(self, index: int, where: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
        block = copy.deepcopy(self._blocks[index])
        prefix = f"{self.block_name(index)}."
        names = [prefix + name for name in block.state_dict()]
        tensors = self._read(names, where, True, dtype)
        fill(self._model, block, {name.removeprefix(prefix): value for name, value in tensors.items()}, where)
        return block

    def embed(self, tokens: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering block 0, ``[n, t, h]``, and for every block the keyword arguments of its forward.

        The arguments are recorded from one sample, so that they broadcast over a batch of any size; a block repeats
        those that do not (``Family.batched``). Blocks that the model treats alike share the same tensors.

        Args:
            tokens: int64 ``[n, t]``.
            device: of both results.

        Raises:
            UserError: a token is outside the vocabulary, or a sample is longer than the model has positions.
        """
        return self._embedding_and_head.embed(tokens, torch.device(device))

    def logits(self, hidden: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """Logits ``[n, t, vocabulary]`` of the last block's output ``[n, t, h]``, differentiable: final norm and head.

        The head stays on the device until ``release``. Split long inputs: logits are large.
        """
        return self._embedding_and_head.logits(hidden, torch.device(device))

    def own_logits(self, tokens: Tensor, indices: Iterable[int], device: str | torch.device = "cpu") -> Tensor:
        """Logits ``[n, t, vocabulary]`` of the model's own forward, in which only the blocks at ``indices`` compute.

        A block is read when the forward reaches it, and freed afterwards.
        """
        where = torch.device(device)

        def call(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._filled(index, where)(*args, **kwargs)

        return self._embedding_and_head.own_logits(tokens, where, {index: call(index) for index in indices})

    def kinds(self, arguments: Sequence[Mapping[str, Any]]) -> list[int]:
        """For each block, the index of the first block that computes alike.

        Args:
            arguments: the arguments of each block, from ``embed``.
        """
        first: dict[Hashable, int] = {}
        tensors = [[id(each) for each in tree_leaves(own) if isinstance(each, Tensor)] for own in arguments]
        return [first.setdefault((self._kind(k), *tensors[k]), k) for k in range(self.num_blocks)]

    def release(self) -> None:
        """Free the embedding table and the head, which ``embed`` and ``logits`` keep; a later call reads them again."""
        self._embedding_and_head.release()

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored parameter outside the blocks, by full name, one at a time on the CPU, without a tied head."""
        for name in self._parameters:
            if not name.startswith(f"{self.family.blocks}.") and name not in self._tied:
                yield name, self._read([name], torch.device("cpu"), True)[name]

    def digest(self) -> str:
        """SHA-256 over config, tensor names, shapes, dtypes and content; reads the weight files whole."""
        return self._checkpoint.digest()

    def _read(
        self, names: Iterable[str], device: torch.device, own: bool, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Parameters by full name; ``own`` copies them out of mapped files (into memory that torch aligns)."""
        stored = {name: self._alias.get(name, name) for name in names}
        found = self._checkpoint.read(stored.values())
        tensors = {}
        for name, key in stored.items():
            value = found[key]
            value_dtype = (dtype or self.dtype) if value.is_floating_point() else value.dtype
            tensors[name] = value.to(device, value_dtype, copy=own)
        return tensors

    def _tie(self) -> None:
        """Find the parameters that take the value of another one, as transformers does when it loads a model.

        Either of two tied parameters may be the stored one. If both are stored and differ, the config is wrong, and
        they are not tied.
        """
        stored = self._checkpoint.tensors
        self._alias: dict[str, str] = {}  # parameter: the one whose stored value it takes
        self._tied: set[str] = set()  # parameters that need not be stored
        for target, origin in self._model.all_tied_weights_keys.items():
            if target in stored and origin in stored:
                first, second = self._checkpoint.read([target, origin]).values()
                if not torch.equal(first, second):
                    log.warning("%s: %s differs from %s, so they are not tied", self.path, target, origin)
                    self.config.tie_word_embeddings = False
                    continue
            self._tied.add(target)
            only_target = target in stored and origin not in stored
            self._alias |= {origin: target} if only_target else {target: origin}
