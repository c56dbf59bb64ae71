# SPDX-License-Identifier: Apache-2.0
"""What the inputs of a block's linears look like, gathered by one pass of the full-precision block.

Linears that share an input share its statistics: one hook on the first linear of each group. Everything accumulates
on the device, without host synchronisation: within a sample in float32, over samples in float64. There the sum of so
few numbers of like size is exact, so that it depends neither on their order nor on how processes share them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from omniq import processes
from omniq.stages.base import BlockTask

Observe = Callable[[str, Tensor], None]


@contextmanager
def observed(block: nn.Module, names: tuple[str, ...], observe: Observe) -> Iterator[None]:
    """While this is entered, ``observe(name, x)`` sees the input ``[tokens, i]`` of each named linear."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observe(name, args[0].detach().flatten(0, -2))

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_importance(task: BlockTask) -> dict[str, Tensor]:
    """Mean square of each input channel on the quantized stream: the diagonal of the Gram matrix over the tokens.

    Over the samples of all processes, if there are several.

    Returns:
        for each linear of the family, float32 ``[i]``.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        samples = x.unflatten(0, (-1, task.inputs.shape[1]))  # [batch, t, i]
        square = samples.float().square().sum(1).double().sum(0)
        sums[name] = sums[name] + square if name in sums else square

    first = tuple(group[0] for group in task.family.inputs)
    with task.quantized_activations(), observed(task.block, first, add):
        task.visit(task.inputs)
    tokens = task.inputs.shape[0] * task.inputs.shape[1] * processes.count()
    means = {name: (processes.all_reduce_sum(square) / tokens).float() for name, square in sums.items()}
    return {name: means[group[0]] for group in task.family.inputs for name in group}
