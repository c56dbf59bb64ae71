# SPDX-License-Identifier: Apache-2.0
"""The model without its blocks: from tokens to the first hidden states, and from the last hidden states to logits.

Both directions run the model's own forward. A ``BlockTap`` replaces each block. It passes the hidden states on and
records the keyword arguments of the call: masks, position embeddings and whatever else the family passes. For logits,
the last tap returns the given hidden states instead, so the final norm, the projections, the head and any scaling or
capping of logits run as in the model's code.

Memory. The embedding table stays on the host, mapped from its file if the dtype allows it: a lookup touches only its
own rows. The first call of ``logits`` moves the head to the device, where it stays until ``release``. The rest is
small.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omniq.errors import NotByBlocks, UserError
from omniq.models.family import Family
from omniq.models.meta import fill

_TOKENS_AT_ONCE = 16384  # per forward: bounds the memory of the final norm, whose output is not used

Read = Callable[[Iterable[str], torch.device, bool], dict[str, Tensor]]


class BlockTap(nn.Module):
    """Replaces a block and records its input.

    Args:
        block: the block, on the meta device. Attributes that the model reads from a block come from it.
        returns_tuple: True if the block returns a tuple.
    """

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple
        self._block = (block,)  # in a tuple: not a submodule
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]  # after self and hidden_states
        self.seen: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self.replay: Tensor | None = None
        self.call: Callable[..., Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states unchanged, ``[n, t, h]``; ``replay`` or the result of ``call`` if one is set."""
        self.kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.seen = hidden_states
        if self.call is not None:
            return self.call(hidden_states, *args, **kwargs)
        output = hidden_states if self.replay is None else self.replay
        return (output, None) if self._returns_tuple else output  # the second entry is the weights of attention

    def forget(self) -> None:
        """Drop all tensors."""
        self.seen, self.kwargs, self.replay, self.call = None, {}, None, None


class RepeatedArguments:
    """A pre-hook of a block that repeats arguments of one sample for every sample of a batch.

    Args:
        names: names of the arguments.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in self.names if kwargs.get(name) is not None}
        repeated = {name: value.repeat(len(args[0]), *[1] * (value.dim() - 1)) for name, value in given.items()}
        return args, kwargs | repeated


class EmbeddingAndHead:
    """Embedding, head and everything else outside the blocks of a meta model.

    Args:
        model: the meta model; the constructor replaces its blocks by taps.
        family: the family of the model.
        read: reads parameters by full name to a device; its flag asks for a copy that is independent of mapped files.
    """

    def __init__(self, model: PreTrainedModel, family: Family, read: Read) -> None:
        blocks = family.blocks
        names = [name for name in model.state_dict() if not name.startswith(f"{blocks}.")]
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Module):
            raise UserError(
                f"{type(model).__name__} has no plain embedding table and head, so it cannot be opened block by block: "
                "choose a model of another type"
            )
        self._model, self._read, self._table, self._head = model, read, table, head
        self._blocks = blocks
        self._table_names, self._head_names = _names_of(model, self._table), _names_of(model, self._head)
        self._rest = [name for name in names if name not in (*self._table_names, *self._head_names)]
        self._taps = [BlockTap(block, family.returns_tuple) for block in model.get_submodule(blocks).children()]
        model.set_submodule(blocks, nn.ModuleList(self._taps))
        self._device = self._head_device = self._table_device = torch.device("meta")
        self._table.register_forward_hook(lambda module, args, output: output.to(self._device))

    @torch.no_grad()
    def embed(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering the first block, ``[n, t, h]``, and each block's keyword arguments for one sample.

        Args:
            tokens: int64 ``[n, t]``.
            device: of both results.

        Raises:
            UserError: a token is outside the vocabulary, or a sample is longer than the model has positions.
        """
        self._check(tokens)
        self._come_to(device)
        self._load_table()
        tokens = tokens.to(self._table_device)
        self._run(input_ids=tokens[:1])
        kwargs = [tap.kwargs for tap in self._taps]
        if self._model.config._attn_implementation == "flash_attention_2":
            # With position_ids every call asks the GPU whether a row holds several samples, which CUDA graphs forbid.
            kwargs = [{key: value for key, value in each.items() if key != "position_ids"} for each in kwargs]
        hidden = self._seen().new_empty(*tokens.shape, self._seen().shape[-1])
        rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        for part, out in zip(tokens.split(rows), hidden.split(rows), strict=True):
            self._run(input_ids=part)
            out.copy_(self._seen())
        self._forget()
        return hidden, kwargs

    def logits(self, hidden: Tensor, device: torch.device) -> Tensor:
        """Logits ``[n, t, vocabulary]`` of the output of the last block, ``[n, t, h]``; differentiable in it."""
        self._come_to(device)
        self._load_head()
        # Only the shape of this input matters: the last tap returns the hidden states.
        nothing = torch.zeros(1, 1, self._table.embedding_dim, dtype=self._model.dtype, device=device)
        self._taps[-1].replay = hidden.to(device, self._model.dtype)
        logits: Tensor = self._model(
            inputs_embeds=nothing.expand(*hidden.shape[:2], -1), use_cache=False, return_dict=True
        ).logits
        self._forget()
        return logits

    @torch.no_grad()
    def own_logits(self, tokens: Tensor, device: torch.device, blocks: Mapping[int, Callable[..., Any]]) -> Tensor:
        """Logits ``[n, t, vocabulary]`` of the model's own forward, in which only some blocks compute.

        Args:
            tokens: int64 ``[n, t]``.
            device: of the computation.
            blocks: the forward of each block that computes, by index. All others pass the hidden states on.

        Raises:
            NotByBlocks: a block has written to a store that all blocks share.
        """
        self._come_to(device)
        self._load_table()
        self._load_head()
        for index, call in blocks.items():
            self._taps[index].call = call
        logits: Tensor = self._model(input_ids=tokens.to(self._table_device), use_cache=False, return_dict=True).logits
        shared = {key for tap in self._taps for key, each in tap.kwargs.items() if isinstance(each, Mapping) and each}
        self._forget()
        if shared:
            raise NotByBlocks(
                f"model type {self._model.config.model_type!r} cannot be quantized block by block: its blocks "
                f"read what other blocks store in {', '.join(sorted(shared))}; choose a model of another type"
            )
        return logits

    def release(self) -> None:
        """Free the embedding table and the head; the next call that needs them reads them again."""
        for part in (self._table, self._head):
            part.to_empty(device=torch.device("meta"))
        self._head_device = self._table_device = torch.device("meta")

    def _check(self, tokens: Tensor) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and tokens.shape[1] > limit:
            raise UserError(f"samples of {tokens.shape[1]} tokens exceed the model's {limit} positions: shorten them")
        largest, vocabulary = int(tokens.max()), self._table.num_embeddings
        if largest >= vocabulary:
            raise UserError(
                f"token {largest} is outside the model's vocabulary of {vocabulary}: use the model's own tokenizer"
            )

    def _come_to(self, device: torch.device) -> None:
        """Move everything except the table and the head to a device; those two are read again when needed."""
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        if self._device != device:
            fill(self._model, self._model, self._read(self._rest, device, True), device)
            self._device = device
            self._head_device = self._table_device = torch.device("meta")

    def _load_table(self) -> None:
        if self._table_device.type == "meta":
            host = torch.device("cpu")
            fill(self._model, self._table, self._local(self._table_names, host, False), host)
            self._table_device = host

    def _load_head(self) -> None:
        if self._head_device != self._device:
            fill(self._model, self._head, self._local(self._head_names, self._device, True), self._device)
            self._head_device = self._device

    def _local(self, names: Sequence[str], device: torch.device, copy: bool) -> dict[str, Tensor]:
        """Parameters of one module, by their last names."""
        return {name.rpartition(".")[2]: value for name, value in self._read(names, device, copy).items()}

    def _run(self, **inputs: Tensor) -> None:
        inner_model(self._model, self._blocks)(**inputs, use_cache=False, return_dict=True)

    def _seen(self) -> Tensor:
        seen = self._taps[0].seen
        if seen is None:
            raise RuntimeError("the model's forward did not reach its first block")
        return seen

    def _forget(self) -> None:
        for tap in self._taps:
            tap.forget()


def inner_model(model: PreTrainedModel, blocks: str) -> nn.Module:
    """The model without its head: ``base_model``, or the owner of the blocks if that is the model itself (Llama 4)."""
    return model.base_model if model.base_model is not model else model.get_submodule(blocks.rpartition(".")[0])


def _names_of(model: PreTrainedModel, module: nn.Module) -> list[str]:
    prefix = next(name for name, candidate in model.named_modules() if candidate is module)
    return [f"{prefix}.{name}" for name in module.state_dict()]
