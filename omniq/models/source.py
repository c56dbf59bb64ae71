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

Opening checks everything that can be checked without reading weights: family, config, files, and that every parameter
is stored in the shape the config says.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from omniq.errors import UserError
from omniq.models.checkpoint import Checkpoint, GgufCheckpoint, SafetensorsCheckpoint, weights_in
from omniq.models.embedding_and_head import EmbeddingAndHead
from omniq.models.families import family_of
from omniq.models.family import Family
from omniq.models.gguf import reading_gguf
from omniq.models.layout import Layout
from omniq.models.locate import locate
from omniq.models.meta import fill, meta_model
from omniq.models.transformers_io import open_config, open_tokenizer

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Place:
    """Folder, weight file if one is named, and whether the code beside it may run."""

    folder: Path
    file: str | None
    remote_code: bool

    @property
    def gguf(self) -> str | None:
        return self.file if self.file is not None and self.file.endswith(".gguf") else None


class SourceModel:
    """A model to be read block by block; made by ``open``.

    Attributes:
        path: as the user wrote it.
        folder: where its files are.
        config: of transformers, with the dtype and attention in use.
        family: where its blocks and linears are.
        dtype: of the parameters as they are handed out.
        num_blocks: how many blocks there are.
        vocab_size: entries of the embedding table.
    """

    def __init__(
        self,
        path: str,
        place: _Place,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.path, self.folder, self._place, self._tokenizer = path, place.folder, place, tokenizer
        self.config: PretrainedConfig = model.config
        self.family: Family = family_of(model.config)
        self.dtype: torch.dtype = model.dtype
        self._model, self._checkpoint = model, checkpoint
        self._blocks = list(model.get_submodule(self.family.blocks).children())
        self.num_blocks = len(self._blocks)
        self.vocab_size = int(model.config.vocab_size)
        self._parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._tie()
        self._check()
        self._outer = EmbeddingAndHead(model, self.family.blocks, self._read)

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
            dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for the checkpoint's own (GGUF: float32).
            attention: attention implementation of transformers.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            NotByBlocks: its type is not supported, or it is quantized already.
            UserError: the model is not found, or its files are missing, corrupt or at odds.
        """
        if dtype != "auto" and dtype not in DTYPES:
            raise UserError(f"model.dtype {dtype!r} is unknown: choose auto, {', '.join(DTYPES)}")
        folder, file = locate(str(path), gguf_file, trust_remote_code)
        place = _Place(folder, file or weights_in(folder), trust_remote_code)
        tokenizer = None
        with nullcontext() if place.gguf is None else reading_gguf(folder / place.gguf):
            config = open_config(folder, place.gguf, trust_remote_code)
            family_of(config)
            if place.gguf is not None:
                chosen = DTYPES.get(dtype, torch.float32)
                checkpoint: Checkpoint = GgufCheckpoint(folder, place.gguf, config, chosen)
                tokenizer = open_tokenizer(folder, place.gguf)
            else:
                checkpoint = SafetensorsCheckpoint(folder, place.file)
                chosen = DTYPES.get(dtype) or _dtype_of(config, checkpoint)
        return cls(str(path), place, meta_model(config, chosen, attention, trust_remote_code), checkpoint, tokenizer)

    @classmethod
    def of(cls, model: PreTrainedModel, checkpoint: Checkpoint, folder: Path) -> "SourceModel":
        """A model whose parameters come from somewhere else than from files.

        Args:
            model: on the meta device.
            checkpoint: gives its parameters.
            folder: to name in messages.
        """
        return cls(str(folder), _Place(folder, None, False), model, checkpoint)

    def in_dtype(self, dtype: torch.dtype) -> "SourceModel":
        """The same model, all of it handed out in another dtype."""
        config, place = copy.deepcopy(self.config), self._place
        model = meta_model(config, dtype, config._attn_implementation, place.remote_code)
        return SourceModel(self.path, place, model, self._checkpoint, self._tokenizer)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights, or in the GGUF file.

        Raises:
            UserError: there is none.
        """
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._place.folder, None, self._place.remote_code)
        return self._tokenizer

    def block_name(self, index: int) -> str:
        """Dotted name of a block, such as ``model.layers.7``: the prefix of its parameters."""
        return f"{self.family.blocks}.{index}"

    def layout(self, index: int) -> Layout:
        """The layout of a block: its linears, which of them share an input, and where scales may move."""
        return self.family.layout(self._blocks[index], index)

    def structure(self, index: int) -> tuple[tuple[str, type, tuple[int, ...]], ...]:
        """Name, owner and shape of every parameter of a block; equal for blocks of the same kind."""
        parts = self._blocks[index].named_modules()
        return tuple(
            (f"{prefix}.{name}", type(module), tuple(value.shape))
            for prefix, module in parts
            for name, value in module.named_parameters(recurse=False)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter by full name."""
        return self._parameters[name]

    def block(self, index: int, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """A block with its weights: a new module on every call, frozen, in evaluation mode, with its own config.

        Args:
            index: from 0.
            device: where it comes to lie.
            dtype: of its parameters; the model's if not given.
        """
        block = copy.deepcopy(self._blocks[index])
        prefix, where = f"{self.block_name(index)}.", torch.device(device)
        names = [prefix + name for name in block.state_dict()]
        tensors = self._read(names, where, True, dtype)
        fill(self._model, block, {name.removeprefix(prefix): value for name, value in tensors.items()}, where)
        return block

    def embed(self, tokens: Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering block 0, ``[n, t, h]``, and for every block the keyword arguments of its forward.

        The arguments are recorded from one sample, so that they broadcast over a batch of any size. Blocks that the
        model treats alike share the same tensors.

        Args:
            tokens: int64 ``[n, t]``.
            device: where both come to lie.

        Raises:
            UserError: a token is outside the vocabulary, or a sample is longer than the model has positions.
        """
        return self._outer.embed(tokens, torch.device(device))

    def logits(self, hidden: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """Logits ``[n, t, vocabulary]`` of the last block's output ``[n, t, h]``: final norm and head.

        The head stays on the device until ``release``. Split long inputs: logits are large.
        """
        return self._outer.logits(hidden, torch.device(device))

    def release(self) -> None:
        """Let go of the embedding table and the head, which ``embed`` and ``logits`` keep; they are read again."""
        self._outer.release()

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Every stored parameter that is in no block, by full name, one at a time on the CPU; no tied head."""
        for name in self._parameters:
            if not name.startswith(f"{self.family.blocks}.") and name not in self._tied:
                yield name, self._read([name], torch.device("cpu"), True)[name]

    def digest(self) -> str:
        """SHA-256 over config, tensor names, shapes, dtypes and content; reads the weight files whole."""
        return self._checkpoint.digest()

    def _read(
        self, names: Iterable[str], device: torch.device, own: bool, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Parameters by full name; ``own`` copies them out of mapped files (and to where torch aligns memory)."""
        stored = {name: self._stored_name(name) for name in names}
        found = self._checkpoint.read(stored.values())
        tensors = {}
        for name, key in stored.items():
            value = found[key]
            value_dtype = (dtype or self.dtype) if value.is_floating_point() else value.dtype
            tensors[name] = value.to(device, value_dtype, copy=own)
        return tensors

    def _stored_name(self, name: str) -> str:
        """How the checkpoint calls a parameter: as it is, or without the outer prefix, or as the one it is tied to."""
        name = self._alias.get(name, name)
        inner = name.removeprefix(f"{self._model.base_model_prefix}.")
        return inner if name not in self._checkpoint.tensors and inner in self._checkpoint.tensors else name

    def _tie(self) -> None:
        """Find the parameters that are another's value, as transformers does when it loads a model.

        Either of two tied parameters may be the one that is stored. If both are, and differ, the config is wrong and
        they are not tied.
        """
        self._alias: dict[str, str] = {}  # parameter: the one whose stored value it takes
        self._tied: set[str] = set()  # parameters that need not be stored
        for target, origin in self._model.all_tied_weights_keys.items():
            names = [self._stored_name(target), self._stored_name(origin)]
            if all(name in self._checkpoint.tensors for name in names):
                first, second = self._checkpoint.read(names).values()
                if not torch.equal(first, second):
                    log.warning("%s: %s differs from %s, so they are not tied", self.path, target, origin)
                    self.config.tie_word_embeddings = False
                    continue
            self._tied.add(target)
            only_target = names[0] in self._checkpoint.tensors and names[1] not in self._checkpoint.tensors
            self._alias |= {origin: target} if only_target else {target: origin}

    def _check(self) -> None:
        """Refuse a checkpoint that does not fit the config; say what it stores beyond it."""
        stored = self._checkpoint.tensors
        wanted = {self._stored_name(name): shape for name, shape in self._parameters.items()}
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} parameters that its config asks for, such as {missing[0]}: "
                "get config.json and weights from the same place"
            )
        for name, shape in wanted.items():
            if stored[name].shape != shape:
                raise UserError(
                    f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, but the config asks for "
                    f"{list(shape)}: get config.json and weights from the same place"
                )
        known = {*wanted, *self._tied}
        unused = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
        if unused:
            log.warning("%s stores %d tensors the model does not use, such as %s", self.folder, len(unused), unused[0])


def _dtype_of(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """What the config says, or else what most of the weights are stored in."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds = [stored.dtype for stored in checkpoint.tensors.values()]
    return names.get(max(kinds, key=kinds.count), torch.float32)
