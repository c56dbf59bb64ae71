# SPDX-License-Identifier: Apache-2.0
"""The model without its blocks: tokens to the first hidden states, and the last hidden states to logits.

Both run the model's own forward. In place of each block stands a ``Tap`` that passes the hidden states on and notes the
keyword arguments it was called with: masks, position embeddings and whatever else the family passes. For logits the
last tap returns the given hidden states instead, and the final norm, projections, head and any scaling or capping of
logits follow as the model's code has them.

Memory. The embedding table stays on the host, mapped from its file where the dtype allows: a lookup touches only its
rows. The head comes to the device with the first call of ``logits`` and stays until ``release``. The rest is small.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omniq.errors import UserError
from omniq.models.meta import fill

_TOKENS_AT_ONCE = 16384  # embedded in one forward: bounds the memory of the final norm, whose output is not used

Read = Callable[[Iterable[str], torch.device, bool], dict[str, Tensor]]


class Tap(nn.Module):
    """Stands where a block stands.

    Args:
        block: that block, on the meta device. Whatever the model reads of a block besides calling it is its answer.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple: not a submodule
        self._names = list(inspect.signature(type(block).forward).parameters)[2:]  # after self and hidden_states
        self.seen: Tensor | None = None
        self.kwargs: dict[str, Any] = {}
        self.replay: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states as they come, ``[n, t, h]``, or those to replay."""
        self.kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.seen = hidden_states
        return hidden_states if self.replay is None else self.replay

    def forget(self) -> None:
        """Let go of all tensors."""
        self.seen, self.kwargs, self.replay = None, {}, None


class EmbeddingAndHead:
    """Embedding, head and everything else outside the blocks of a meta model.

    Args:
        model: the meta model; its blocks are replaced by taps here.
        blocks: dotted name of the list of blocks.
        read: reads parameters by full name to a device; the flag asks for a copy that does not lean on a mapped file.
    """

    def __init__(self, model: PreTrainedModel, blocks: str, read: Read) -> None:
        names = [name for name in model.state_dict() if not name.startswith(f"{blocks}.")]
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Module):
            raise UserError(
                f"{type(model).__name__} has no plain embedding table and head: it cannot be opened by blocks"
            )
        self._model, self._read, self._table, self._head = model, read, table, head
        self._table_names, self._head_names = _names_of(model, self._table), _names_of(model, self._head)
        self._rest = [name for name in names if name not in (*self._table_names, *self._head_names)]
        self._taps = [Tap(block) for block in model.get_submodule(blocks).children()]
        model.set_submodule(blocks, nn.ModuleList(self._taps))
        self._device = self._head_device = self._table_device = torch.device("meta")
        self._table.register_forward_hook(lambda module, args, output: output.to(self._device))

    @torch.no_grad()
    def embed(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering the first block, ``[n, t, h]``, and each block's keyword arguments for one sample.

        Args:
            tokens: int64 ``[n, t]``.
            device: where both come to lie.

        Raises:
            UserError: a token is outside the vocabulary, or a sample is longer than the model has positions.
        """
        self._check(tokens)
        self._come_to(device)
        if self._table_device.type == "meta":
            host = torch.device("cpu")
            fill(self._model, self._table, self._local(self._table_names, host, False), host)
            self._table_device = host
        tokens = tokens.to(self._table_device)
        self._run(input_ids=tokens[:1])
        kwargs = [tap.kwargs for tap in self._taps]
        if self._model.config._attn_implementation == "flash_attention_2":
            # With them it asks the GPU in every call whether a row holds several samples, which no CUDA graph allows.
            kwargs = [{key: value for key, value in each.items() if key != "position_ids"} for each in kwargs]
        hidden = self._seen().new_empty(*tokens.shape, self._seen().shape[-1])
        rows = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        for part, out in zip(tokens.split(rows), hidden.split(rows), strict=True):
            self._run(input_ids=part)
            out.copy_(self._seen())
        self._forget()
        return hidden, kwargs

    @torch.no_grad()
    def logits(self, hidden: Tensor, device: torch.device) -> Tensor:
        """Logits ``[n, t, vocabulary]`` of what the last block returned, ``[n, t, h]``."""
        self._come_to(device)
        if self._head_device != self._device:
            fill(self._model, self._head, self._local(self._head_names, self._device, True), self._device)
            self._head_device = self._device
        # Only the size of this input counts: the last tap answers with the hidden states.
        nothing = torch.zeros(1, 1, self._table.embedding_dim, dtype=self._model.dtype, device=device)
        self._taps[-1].replay = hidden.to(device, self._model.dtype)
        logits: Tensor = self._model(
            inputs_embeds=nothing.expand(*hidden.shape[:2], -1), use_cache=False, return_dict=True
        ).logits
        self._forget()
        return logits

    def release(self) -> None:
        """Let go of the embedding table and the head; the next call reads them again."""
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
                f"token {largest} is outside the model's vocabulary of {vocabulary}: take the model's own tokenizer"
            )

    def _come_to(self, device: torch.device) -> None:
        """Bring what is neither table nor head to a device; those two are read again when they are needed."""
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        if self._device != device:
            fill(self._model, self._model, self._read(self._rest, device, True), device)
            self._device = device
            self._head_device = self._table_device = torch.device("meta")

    def _local(self, names: Sequence[str], device: torch.device, copy: bool) -> dict[str, Tensor]:
        """Parameters of one module, by their last names."""
        return {name.rpartition(".")[2]: value for name, value in self._read(names, device, copy).items()}

    def _run(self, **inputs: Tensor) -> None:
        self._model.base_model(**inputs, use_cache=False, return_dict=True)

    def _seen(self) -> Tensor:
        seen = self._taps[0].seen
        if seen is None:
            raise RuntimeError("the model's forward did not reach its first block")
        return seen

    def _forget(self) -> None:
        for tap in self._taps:
            tap.forget()


def _names_of(model: PreTrainedModel, module: nn.Module) -> list[str]:
    prefix = next(name for name, candidate in model.named_modules() if candidate is module)
    return [f"{prefix}.{name}" for name in module.state_dict()]
