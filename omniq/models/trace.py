# SPDX-License-Identifier: Apache-2.0
"""One traced forward of a block: which linears run, in which order, and which of them read the same tensor.

Two tensors are the same if they are views of all of the same memory and no operation has written to it in between. A
block that flattens samples and tokens before its MLP therefore shares a tensor with the norm before it.

Shapes: ``n`` samples, ``t`` tokens of a sample, ``i`` input features.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

Key = tuple[int, int, int, int]
"""Identity of a tensor: address, offset and size of its memory, and the number of writes to it."""

_IMPLEMENTATION = "omniq-trace"


@dataclass
class Trace:
    """The calls of one forward of a block.

    Args:
        inputs: the input of each linear that ran, by name, in the order of the calls.
        flat: linears whose input had no sample dimension, ``[n t, i]``.
        norms: the output of each module with a single vector of weights, by name.
        attention: name of the module that called transformers' attention interface; None if no module did.
    """

    inputs: dict[str, Key] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    norms: dict[str, Key] = field(default_factory=dict)
    attention: str | None = None

    def readers(self, key: Key) -> tuple[str, ...]:
        """The linears that read a tensor, in order."""
        return tuple(name for name, other in self.inputs.items() if other == key)


def trace(block: nn.Module, run: Callable[[], Any], tokens: int) -> Trace:
    """Run a block and record its calls.

    Args:
        block: the block.
        run: runs one forward of it.
        tokens: number of tokens of that forward, over all samples.
    """
    found, alive = Trace(), list[Tensor]()  # tensors stay alive, so that no memory is used twice

    def seen(tensor: Tensor) -> Key:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        return (storage.data_ptr(), int(tensor.storage_offset()), tensor.numel(), tensor._version)

    def before_linear(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in found.inputs:
                found.inputs[name] = seen(args[0])
                if args[0].dim() == 2 and len(args[0]) == tokens:
                    found.flat.add(name)

        return record

    def after_norm(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                found.norms[name] = seen(output)

        return record

    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(before_linear(name)))
        elif getattr(getattr(module, "weight", None), "ndim", None) == 1:
            handles.append(module.register_forward_hook(after_norm(name)))
    try:
        with _attention_calls(block) as attention:
            run()
    finally:
        for handle in handles:
            handle.remove()
    names = {id(module): name for name, module in block.named_modules()}
    found.attention = names[id(attention[0])] if attention else None
    return found


@contextmanager
def _attention_calls(block: nn.Module) -> Iterator[list[nn.Module]]:
    """Record the modules that call transformers' attention interface."""
    called: list[nn.Module] = []
    interface = AttentionInterface()
    owners: list[Any] = [module for module in block.modules() if hasattr(module, "config")]
    configs = [module.config for module in owners]

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        traced, module.config = module.config, configs[next(k for k, owner in enumerate(owners) if owner is module)]
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        try:
            return interface.get_interface(module.config._attn_implementation, eager)(module, *args, **kwargs)
        finally:
            module.config = traced

    AttentionInterface.register(_IMPLEMENTATION, attention)
    for owner, config in zip(owners, configs, strict=True):
        owner.config = copy.copy(config)
        owner.config._attn_implementation = _IMPLEMENTATION
    try:
        yield called
    finally:
        for owner, config in zip(owners, configs, strict=True):
            owner.config = config
