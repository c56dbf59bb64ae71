# SPDX-License-Identifier: Apache-2.0
"""Families that omniq does not declare: their blocks are found in the model, and their layouts by running a block.

1. ``discovered_family`` finds the line of blocks on the meta device, without weights: the list of modules with the most
   parameters. It refuses models that cannot be quantized block by block.
2. ``discover_layouts`` runs the real first block of each kind once (``omniq.models.trace``). Linears that read the same
   tensor form a group, and groups are ordered as the block runs them.
3. It proposes equivalences (``omniq.models.propose``) and keeps those that leave the output of the block unchanged
   (``omniq.models.verify_equivalences``).

Linears that stay in floating point, with the reason: routers and gates of experts, linears with fewer than 8 outputs
(compressed-tensors cannot unpack their zero points), inputs that no common group size divides, and linears whose weight
the block uses without calling them.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from omniq.errors import NotByBlocks
from omniq.models.families import declared_family
from omniq.models.family import Family
from omniq.models.layout import Layout
from omniq.models.probe import probe
from omniq.models.propose import expert_number, expert_of, pattern, proposals
from omniq.models.trace import Trace, trace
from omniq.models.verify_equivalences import TOLERANCE, VerifiedBlock
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads

if TYPE_CHECKING:
    from omniq.models.source import SourceModel

SMALLEST_GROUP = 32  # of the group sizes in use: 32 (GGUF, MLX, MXFP4), 64, 128
_ROUTERS = frozenset({"router", "gate", "router_gate", "shared_expert_gate"})
_FEWEST_OUTPUTS = 8
_TOKENS = 24  # of a forward that is only compared with others


def find_family(model: PreTrainedModel) -> Family:
    """The declared family of a model, or else a discovered one.

    Args:
        model: on the meta device.

    Raises:
        NotByBlocks: the model cannot be quantized block by block.
    """
    return declared_family(model.config) or discovered_family(model)


def discovered_family(model: PreTrainedModel) -> Family:
    """The family of a model that no declaration covers: where its blocks are, and how the model calls them.

    Args:
        model: on the meta device.

    Raises:
        NotByBlocks: the model has no line of blocks with linears, or its blocks cannot be called one by one.
    """
    kind, blocks = model.config.model_type, find_blocks(model)
    modules = list(model.get_submodule(blocks).modules())
    why = None
    if not any(isinstance(module, nn.Linear) for module in modules):
        why = "its blocks have no linear layers"
        if any(isinstance(module, Conv1D) for module in modules):
            why = "its blocks compute with Conv1D, whose transposed weights no export format holds"
    elif replaced := {type(module).__name__ for module in modules} & MODULES_TO_PATCH_FOR_QUANTIZATION.keys():
        why = f"transformers replaces its {min(replaced)} by other modules when it loads a quantized checkpoint"
    if why is not None:
        raise NotByBlocks(f"model type {kind!r} cannot be quantized: {why}; choose a model of another type")
    calls = probe(model, blocks)
    return Family((kind,), blocks, (), returns_tuple=calls.returns_tuple, batched=calls.batched)


def find_blocks(model: PreTrainedModel) -> str:
    """Dotted name of the list of modules with the most parameters and buffers that is inside no other list.

    Args:
        model: on any device, possibly quantized.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    sizes = {name: sum(value.numel() for value in lists[name].state_dict().values()) for name in outermost}
    if not sizes or not max(sizes.values()):
        raise NotByBlocks(
            f"model type {model.config.model_type!r} cannot be quantized block by block: it has no list of blocks; "
            "choose a model of another type"
        )
    return max(sizes, key=sizes.__getitem__)


def random_tokens(source: "SourceModel", samples: int) -> Tensor:
    """A few random tokens of the vocabulary, int64 ``[samples, t]``."""
    vocabulary = source.config.get_text_config().vocab_size
    length = min(_TOKENS, getattr(source.config, "max_position_embeddings", None) or _TOKENS)
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def discover_layouts(source: "SourceModel") -> list[Layout]:
    """The layouts of all blocks of a model; blocks of the same kind share one.

    Args:
        source: a model of a family that ``discovered_family`` returned.
    """
    hidden, arguments = source.embed(random_tokens(source, 1))
    source.release()
    kinds = source.kinds(arguments)
    layouts = {index: _layout_of_kind(source, index, hidden, arguments[index]) for index in set(kinds)}
    return [layouts[index] for index in kinds]


def _layout_of_kind(source: "SourceModel", index: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Layout:
    """The layout of a block, measured in float64, or in float32 if its code does not run in float64."""
    try:
        return layout_of(source.config, source.block(index, "cpu", torch.float64), hidden, arguments)
    except RuntimeError:  # an operator without float64, such as the grouped product of experts
        return layout_of(source.config, source.block(index, "cpu", torch.float32), hidden, arguments)


def layout_of(config: PretrainedConfig, block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Layout:
    """The layout of one block with its weights, from a traced forward.

    Args:
        config: of the model.
        block: the block, in float64 or float32.
        hidden: its input, ``[1, t, h]``.
        arguments: the other arguments of its forward.
    """
    heads, dtype = _heads(config, arguments), next(block.parameters()).dtype
    verified = VerifiedBlock(block, Layout(config.model_type, (), heads), hidden, arguments, dtype)
    traced = trace(block, lambda: verified.run(verified.tensors), hidden.shape[0] * hidden.shape[1])
    kept = dict(_kept(block, traced))
    groups = [tuple(name for name in group if name not in kept) for group in groups_of(block, traced)]
    equivalences: list[Equivalence] = []
    rejected: dict[str, float] = {}
    for alternatives in proposals(block, traced, heads, [name for name in traced.inputs if _is_router(name)]):
        errors = {}
        for equivalence in alternatives:
            errors[equivalence] = verified.error(equivalence)
            if 0 < errors[equivalence] <= TOLERANCE[dtype]:  # 0: it changes no tensor that the block uses
                equivalences.append(equivalence)
                break
        else:
            nearest = min(errors, key=errors.__getitem__)
            rejected[str(nearest)] = errors[nearest]
    return Layout(
        model_type=config.model_type,
        groups=tuple(group for group in groups if group),
        heads=heads,
        equivalences=tuple(equivalences),
        attention=traced.attention,
        flat=tuple(name for group in groups for name in group if name in traced.flat and not expert_of(name)),
        kept=kept,
        rejected=rejected,
    )


def _heads(config: PretrainedConfig, arguments: Mapping[str, Any]) -> Heads:
    """The attention heads of a block; one head for a model without attention.

    The tables of rotary embedding have one column for each channel that they turn.
    """
    query = getattr(config, "num_attention_heads", None)
    if not isinstance(query, int):
        return Heads(1, 1)
    key = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    if not isinstance(key, int) or query % key:
        key = 1 if getattr(config, "multi_query", False) else query
    turned = getattr(config, "rotary_dim", None)
    if isinstance(tables := arguments.get("position_embeddings"), tuple):
        turned = tables[0].shape[-1]
    return Heads(query, key, turned if isinstance(turned, int) else None)


def _is_router(name: str) -> bool:
    """True for a linear that chooses or weights experts."""
    return bool(_ROUTERS & set(name.split(".")))


def _kept(block: nn.Module, traced: Trace) -> Iterator[tuple[str, str]]:
    """The matrices that stay in floating point, with the reason."""
    called = {pattern(name) for name in traced.inputs}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            for own, value in module.named_parameters(name, recurse=False):
                if value.dim() > 1:
                    yield own, f"a parameter of {type(module).__name__}, not a linear layer"
            continue
        if _is_router(name):
            yield name, "router or gate of experts"
        elif pattern(name) not in called:
            yield name, "the block does not call this linear"
        elif module.in_features % SMALLEST_GROUP:
            yield name, f"no group size divides its {module.in_features} inputs"
        elif module.out_features < _FEWEST_OUTPUTS:
            yield name, f"only {module.out_features} outputs"


def groups_of(block: nn.Module, traced: Trace) -> list[tuple[str, ...]]:
    """The linears that share an input, in the order in which the block runs them.

    An expert that no traced token reached has the groups of an expert that was reached. All experts run their first
    group before any of them runs its second (``omniq.models.experts``).
    """
    by_input: dict[Any, list[str]] = {}
    for name, key in traced.inputs.items():
        # all experts may read one tensor, but each is observed on its own tokens
        by_input.setdefault((key, expert_of(name)), []).append(name)
    groups = [tuple(group) for group in by_input.values()]
    places = {group: (position, 0, 0) for position, group in enumerate(groups)}
    templates: dict[str, list[tuple[str, ...]]] = {}  # the groups of one reached expert of each kind
    first: dict[str, int] = {}  # position of the first group of all experts of a kind
    for group in groups:
        if expert := expert_of(group[0]):
            first.setdefault(pattern(expert), places[group][0])
            templates.setdefault(expert, []).append(group)
    like = {pattern(expert): expert for expert in templates}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and (expert := expert_of(name)) and pattern(expert) in like:
            model = like[pattern(expert)]
            for within, group in enumerate(templates.get(expert, templates[model])):
                own = tuple(expert + linear.removeprefix(expert_of(linear) or "") for linear in group)
                places[own] = (first[pattern(expert)], within, expert_number(expert))
    return sorted(places, key=places.__getitem__)
