# SPDX-License-Identifier: Apache-2.0
"""Quantized activations while a block runs: hooks on its linears, and transformers' own interface for attention.

The block's code stays as it is. Two things are attached to it and can be taken off again:

- A pre-hook on every quantized linear replaces its input by the fake-quantized one. Linears that share an input get the
  very same tensor: it is quantized once, when the first of them asks. Each token has its own range; or, if the scheme
  says so, all tokens share one, which is fixed where the block is finished and that of the sample where it is not (of
  each sample, also where a block hands all tokens of a batch to a linear in one row, as OPT does).
- The block's attention gets a config of its own, in which ``_attn_implementation`` names a function of omniq's. That
  quantizes queries, keys and values as they come (after rotary embedding, before keys and values are repeated for the
  query heads), each token of each head on its own range, and hands them to the implementation that the model's config
  names at that moment: masks are made for that one. The softmax output is left alone.

Every range belongs to one token or is fixed, so a full forward and decoding token by token with a cache compute the
same: what the cache holds is quantized on its way into every attention, always to the same numbers.

Under autocast everything is first brought to the dtype that products are computed in, as in the deployed model: a
LayerNorm would hand over float32 there.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from omniq.errors import UserError
from omniq.grid.scheme import Activations
from omniq.models.layout import Layout
from omniq.quantizers.activations import StaticGrid, quantize_samples, quantize_tokens
from omniq.storage.block_result import QuantizedLinear

Finished = Mapping[str, QuantizedLinear]


def check_attention(layout: Layout, activations: Activations) -> None:
    """Refuse quantized queries, keys and values where the attention of the block cannot be reached.

    Raises:
        UserError: names the model type and what is possible instead.
    """
    if activations.attention and layout.attention is None:
        raise UserError(
            f"scheme: the attention of {layout.model_type} does not call transformers' attention "
            "interface, so queries, keys and values cannot be quantized: use a scheme without KV bits and with queries "
            "false"
        )


@contextmanager
def quantized_activations(
    block: nn.Module, layout: Layout, activations: Activations, finished: Finished | None = None
) -> Iterator[None]:
    """While this is entered, the block computes on quantized activations."""
    detach = attach(block, layout, activations, finished)
    try:
        yield
    finally:
        detach()


def attach(
    block: nn.Module, layout: Layout, activations: Activations, finished: Finished | None = None
) -> Callable[[], None]:
    """Let a block compute on quantized activations.

    Args:
        finished: the quantized linears of a finished block by name, which know their inputs' range where that is fixed.
            The inputs of other linears stay as they are, and a block without any quantized linear computes in full
            precision. None while the block is being calibrated.

    Returns:
        what takes everything off again.

    Raises:
        UserError: queries, keys or values of a block whose attention cannot be reached.
    """
    check_attention(layout, activations)
    undo: list[Callable[[], None]] = []
    if finished is not None and not finished:
        activations = Activations()
    if activations.inputs != 16:
        length = SampleLength()
        if activations.static and finished is None:
            undo.append(block.register_forward_pre_hook(length).remove)
        for group in layout.groups:
            names = [name for name in group if finished is None or name in finished]
            if not names:
                continue
            fixed = None if finished is None else finished[names[0]].input
            linears = [block.get_submodule(name) for name in names]
            shared = SharedInput(activations, fixed, linears[-1], length)
            undo += [linear.register_forward_pre_hook(shared).remove for linear in linears]
    if activations.attention and layout.attention is not None:
        undo.append(_redirect(block.get_submodule(layout.attention), activations))

    def detach() -> None:
        for each in undo:
            each()

    return detach


def attach_all(
    blocks: Iterable[tuple[nn.Module, Layout, Finished | None]], activations: Activations
) -> Callable[[], None]:
    """Let the blocks of a whole model compute on quantized activations, each as ``attach`` does.

    Args:
        blocks: each with its layout and with what is finished of it.

    Returns:
        what takes everything off again.
    """
    undo = [attach(block, layout, activations, finished) for block, layout, finished in blocks]

    def detach() -> None:
        for each in undo:
            each()

    return detach


class SampleLength:
    """A pre-hook of a block that notes how many tokens its samples have."""

    tokens = 0

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0].shape[1]


class SharedInput:
    """A pre-hook of all linears that read one tensor.

    Args:
        activations: what becomes of it.
        fixed: its range, if that is fixed and known.
        last: the linear that runs last; nothing is held after it.
        length: of the samples that the block is at.
    """

    def __init__(
        self, activations: Activations, fixed: StaticGrid | None, last: nn.Module, length: SampleLength
    ) -> None:
        self.activations, self.fixed, self.last, self.length = activations, fixed, last, length
        self._source: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        if self._source is not x or self._result is None:
            self._source, self._result = x, self._quantize(x)
        result = self._result
        if module is self.last:
            self._source = self._result = None
        return (result, *others)

    def _quantize(self, x: Tensor) -> Tensor:
        bits, symmetric = self.activations.inputs, self.activations.symmetric
        if not self.activations.static:
            return _quantize(x, bits, symmetric)
        x = x.to(_computed_in(x))
        if self.fixed is not None:
            return self.fixed.quantize(x, bits)
        samples = x if x.dim() == 3 else x.unflatten(0, (-1, self.length.tokens))  # [n, t, c]
        return quantize_samples(samples, bits, symmetric).view(x.shape)


def _quantize(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Each token of ``[..., c]`` on its own range, in the dtype of the computation; 16 bits leave it alone."""
    return x if bits == 16 else quantize_tokens(x, bits, symmetric, _computed_in(x))


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype that autocast would bring it to before the product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _redirect(attention: Any, activations: Activations) -> Callable[[], None]:
    """Send the attention of one module through ours; returns what takes it back."""
    own = attention.config
    # a copy, because the model's own decides which masks are made, and may be told of another implementation later
    attention.config, attention.plain_config = copy.copy(own), own
    attention.config._attn_implementation = _register(activations)

    def take_back() -> None:
        attention.config = own
        del attention.plain_config

    return take_back


def _register(activations: Activations) -> str:
    """Our attention, by name in transformers' interface."""
    kind = "s" if activations.symmetric else "a"
    name = f"omniq-q{activations.queries}-kv{activations.keys_values}-{kind}"
    if name not in AttentionInterface():
        AttentionInterface.register(name, _attention(activations))
    return name


def _attention(activations: Activations) -> Callable[..., Any]:
    interface, symmetric = AttentionInterface(), activations.symmetric

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # "eager" stands for the function beside the module's class; all others are in the interface.
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        query = _quantize(query, activations.queries, symmetric)
        key, value = (_quantize(each, activations.keys_values, symmetric) for each in (key, value))
        redirected, module.config = module.config, module.plain_config  # flash attention looks for its name there
        try:
            plain = interface.get_interface(module.config._attn_implementation, eager)
            return plain(module, query, key, value, *args, **kwargs)
        finally:
            module.config = redirected

    return attention
