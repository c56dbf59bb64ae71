# SPDX-License-Identifier: Apache-2.0
"""How an unknown model calls its blocks: recorded from its own forward, without weights.

The model runs on a few tokens with zeros as weights and a ``BlockTap`` in place of every block. Zeros that are never
written take no memory, and no checkpoint is read. The recorded calls answer these questions:

- Do blocks return a tensor or a tuple? The next block receives the wrong shape if the tap returns the wrong one.
- Does an argument depend on the sample? Then it cannot be recorded once for all samples (per-layer embeddings of
  Gemma 3n). A float argument depends on the sample if it depends on the output of an embedding table, which autograd
  tells. Other arguments are compared between two samples.
- Does an argument follow the batch, such as the ALiBi biases ``[n heads, 1, t]`` of BLOOM? It is repeated later
  (``RepeatedArguments``).

Shapes: ``n`` samples, ``t`` tokens of a sample, ``h`` hidden size.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path
from transformers import PreTrainedModel

from omniq.errors import NotByBlocks, one_line
from omniq.models.embedding_and_head import BlockTap, RepeatedArguments, inner_model
from omniq.models.meta import fill

_TOKENS = 8

Leaves = dict[tuple[str, str], Any]
"""Values of the arguments of a block, by the name of the argument and the position inside it."""


@dataclass(frozen=True)
class BlockCalls:
    """How a model calls its blocks.

    Args:
        returns_tuple: True if blocks return a tuple.
        batched: arguments whose first dimension is a multiple of the number of samples.
    """

    returns_tuple: bool
    batched: tuple[str, ...]


def probe(model: PreTrainedModel, blocks: str) -> BlockCalls:
    """Run a model without its weights and blocks, and record how it calls its blocks.

    Args:
        model: on the meta device; not modified.
        blocks: dotted name of the list of blocks.

    Raises:
        NotByBlocks: the blocks cannot be called one by one; the message names the reason and the remedy.
    """
    problems = []
    for returns_tuple in (False, True):
        try:
            outer = _Outer(model, blocks, returns_tuple)
            shapes = {tuple(shape) for shape in outer.run(2)}
        except Exception as error:  # the model unpacks what the tap returned, and fails in its own way
            problems.append(one_line(error))
            continue
        if len(shapes) == 1 and all(shape[:-1] == (2, _TOKENS) for shape in shapes):
            return BlockCalls(returns_tuple, _batched(model, outer, blocks))
        problems.append(f"shapes {sorted(shapes)} for 2 samples of {_TOKENS} tokens")
    raise _refusal(model, f"its hidden states cannot be recorded as [samples, tokens, channels] ({problems[0]})")


class _Outer:
    """A copy of a model with taps for its blocks, and zeros for all other parameters, on the CPU."""

    def __init__(self, model: PreTrainedModel, blocks: str, returns_tuple: bool) -> None:
        self.taps = [BlockTap(block, returns_tuple) for block in model.get_submodule(blocks).children()]
        instead = {id(model.get_submodule(blocks)): nn.ModuleList(self.taps)}  # in the copy
        self.model, self.blocks = copy.deepcopy(model, instead), blocks
        if self.model.config._attn_implementation not in ("sdpa", "eager"):  # others may need a GPU
            self.model.config._attn_implementation = "eager"
        zeros = {name: torch.zeros_like(value, device="cpu") for name, value in self.model.state_dict().items()}
        fill(self.model, self.model, zeros, torch.device("cpu"))
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())

    def run(self, samples: int, token: int = 0) -> list[torch.Size]:
        """Run the model; return the shape of the input of every block, and that of the output of the last one."""
        tokens = torch.full((samples, _TOKENS), token)
        with torch.enable_grad():
            output = inner_model(self.model, self.blocks)(input_ids=tokens, use_cache=False, return_dict=True)
        seen = [tap.seen for tap in self.taps]
        return [value.shape for value in seen if value is not None] + [output.last_hidden_state.shape]

    def hidden(self) -> Tensor:
        """The input of the first block in the last run, ``[n, t, h]``."""
        seen = self.taps[0].seen
        assert seen is not None
        return seen

    def arguments(self) -> Iterator[Leaves]:
        """The arguments of every block in the last run."""
        for tap in self.taps:
            yield {
                (name, str(path)): value
                for name, argument in tap.kwargs.items()
                for path, value in tree_flatten_with_path(argument)[0]
            }


def _batched(model: PreTrainedModel, outer: _Outer, blocks: str) -> tuple[str, ...]:
    """Names of the arguments to repeat for every sample of a batch.

    Raises:
        NotByBlocks: an argument depends on the sample, or cannot be repeated.
    """
    follow: dict[str, None] = {}
    broadcast: dict[str, None] = {}
    runs = []
    for samples, token in ((1, 0), (1, 1), (2, 0)):
        outer.run(samples, token)
        runs.append(list(outer.arguments()))
    for one, other, two in zip(*runs, strict=True):
        for (name, path), value in one.items():
            if not isinstance(value, Tensor):
                continue
            if value.requires_grad or not torch.equal(value, other[name, path]):
                raise _refusal(model, f"its blocks take the argument {name}, which depends on the sample")
            if value.shape == two[name, path].shape:
                continue
            if value.shape[0] != 1 and path != "()":
                raise _refusal(model, f"its blocks take the argument {name}, whose parts follow the batch")
            (broadcast if value.shape[0] == 1 else follow)[name] = None
    if broadcast and not _runs(model, outer, blocks, tuple(follow)):
        return (*follow, *broadcast)
    return tuple(follow)


def _runs(model: PreTrainedModel, outer: _Outer, blocks: str, batched: tuple[str, ...]) -> bool:
    """True if the first block accepts the arguments of one sample with two samples (XGLM compares sizes of masks)."""
    outer.run(1)
    tap, block = outer.taps[0], copy.deepcopy(next(model.get_submodule(blocks).children()))
    zeros = {name: torch.zeros_like(value, device="cpu") for name, value in block.state_dict().items()}
    try:
        fill(model, block, zeros, torch.device("cpu"))
        block.register_forward_pre_hook(RepeatedArguments(batched), with_kwargs=True)
        with torch.no_grad():
            block(outer.hidden().detach().repeat(2, 1, 1), **tap.kwargs)
    except Exception:  # blocks check shapes in their own way
        return False
    return True


def _refusal(model: PreTrainedModel, reason: str) -> NotByBlocks:
    return NotByBlocks(
        f"model type {model.config.model_type!r} cannot be quantized block by block: {reason}; choose a model of "
        "another type"
    )
