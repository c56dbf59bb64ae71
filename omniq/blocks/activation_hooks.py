# SPDX-License-Identifier: Apache-2.0
"""Quantized activations while a block runs: hooks on its linears, and transformers' own interface for attention.

The code of the block does not change. ``attach`` adds two things to the block, and they can be removed again:

- A pre-hook on every quantized linear replaces its input by the fake-quantized input. Linears that share an input
  receive the same tensor, which is quantized once, when the first of them runs. By default each token has its own
  range. With static ranges, all tokens share one range: the fixed range in a finished block, and the range of the
  sample during calibration. The range belongs to one sample even if the block passes all tokens of a batch to a linear
  in one row, as OPT does.
- The attention of the block gets its own config, in which ``_attn_implementation`` names a function of omniq. This
  function quantizes queries, keys and values (after rotary embedding, before keys and values are repeated for the query
  heads), with one range per token and head. It then calls the implementation that the model's config names at that
  moment, because the masks are made for that implementation. The softmax output is not quantized.

Every range belongs to one token or is fixed. A full forward and token-by-token decoding with a cache therefore compute
the same numbers: each attention quantizes the content of the cache again, always to the same values.

Under autocast, inputs are first cast to the compute dtype of the products, as in the exported model, because a
LayerNorm returns float32 under autocast.
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
    """Refuse quantized queries, keys and values if the attention of the block cannot be redirected.

    Raises:
        UserError: names the model type and the remedy.
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
    """Quantize the activations of a block inside this context (see ``attach``)."""
    detach = attach(block, layout, activations, finished)
    try:
        yield
    finally:
        detach()


def attach(
    block: nn.Module, layout: Layout, activations: Activations, finished: Finished | None = None
) -> Callable[[], None]:
    """Make a block compute with quantized activations.

    Args:
        block, layout: the block and its layout.
        finished: the quantized linears of a finished block by name; they hold the static ranges of their inputs. Inputs
            of other linears are not quantized, and a block without quantized linears computes in full precision. None
            during the calibration of the block.

    Returns:
        A function that removes all hooks.

    Raises:
        UserError: the scheme quantizes queries, keys or values, and the attention of the block cannot be redirected.
    """
    check_attention(layout, activations)
    undo: list[Callable[[], None]] = []
    activations = Activations() if finished is not None and not finished else activations
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
            shared = SharedInput(activations, fixed, linears[-1], length if names[0] in layout.flat else None)
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
    """Make all blocks of a model compute with quantized activations, as ``attach`` does for one block.

    Args:
        blocks: each block with its layout and its quantized linears.
        activations: how the scheme quantizes activations.

    Returns:
        A function that removes everything again.
    """
    undo = [attach(block, layout, activations, finished) for block, layout, finished in blocks]

    def detach() -> None:
        for each in undo:
            each()

    return detach


class SampleLength:
    """A pre-hook of a block that records the number of tokens per sample."""

    tokens = 0

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0].shape[1]


class SharedInput:
    """A pre-hook of all linears that read the same tensor.

    Args:
        activations: how the tensor is quantized.
        fixed: the static range of the tensor, if it is known.
        last: the linear that runs last. After it, the quantized tensor is released.
        length: records the number of tokens per sample, for a tensor that holds the tokens of all samples in order,
            ``[n t, c]``; None for a tensor of samples or for an expert, whose tokens share one range.
    """

    def __init__(
        self, activations: Activations, fixed: StaticGrid | None, last: nn.Module, length: SampleLength | None
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
        x = x.to(_compute_dtype(x))
        if self.fixed is not None:
            return self.fixed.quantize(x, bits)
        samples = x if self.length is None else x.unflatten(0, (-1, self.length.tokens))  # [n, t, c]
        samples = samples if samples.dim() == 3 else samples.unsqueeze(0)  # [1, tokens of an expert, c]
        return quantize_samples(samples, bits, symmetric).view(x.shape)


def _quantize(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Quantize each token of ``[..., c]`` on its own range, in the compute dtype; 16 bits return the input."""
    return x if bits == 16 else quantize_tokens(x, bits, symmetric, _compute_dtype(x))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which autocast casts ``x`` before a product."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _redirect(attention: Any, activations: Activations) -> Callable[[], None]:
    """Redirect the attention of one module to omniq's function; return a function that undoes this."""
    own = attention.config
    # A copy, because the model's config selects the masks and may change its implementation later.
    attention.config, attention.plain_config = copy.copy(own), own
    attention.config._attn_implementation = _register(activations)

    def restore() -> None:
        attention.config = own
        del attention.plain_config

    return restore


def _register(activations: Activations) -> str:
    """Register omniq's attention in transformers' interface, and return its name there."""
    kind = "s" if activations.symmetric else "a"
    name = f"omniq-q{activations.queries}-kv{activations.keys_values}-{kind}"
    if name not in AttentionInterface():
        AttentionInterface.register(name, _attention(activations))
    return name


def _attention(activations: Activations) -> Callable[..., Any]:
    interface, symmetric = AttentionInterface(), activations.symmetric

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # "eager" means the function in the module of the class; the interface holds all other implementations.
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        query = _quantize(query, activations.queries, symmetric)
        key, value = (_quantize(each, activations.keys_values, symmetric) for each in (key, value))
        redirected, module.config = module.config, module.plain_config  # flash attention reads its name from the config
        try:
            plain = interface.get_interface(module.config._attn_implementation, eager)
            return plain(module, query, key, value, *args, **kwargs)
        finally:
            module.config = redirected

    return attention
