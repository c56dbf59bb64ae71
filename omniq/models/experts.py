# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: one linear for each expert and projection, in place of the merged parameters of transformers.

Checkpoints of Mixtral, Qwen-MoE, OLMoE, DeepSeek, GLM-4-MoE or MiniMax store one tensor for each expert and projection.
transformers 5 merges them on load into two parameters of its experts module,

    gate_up_proj [E, 2 f, h],   down_proj [E, h, f]

which no method can quantize linear by linear. ``split_experts`` replaces such a module by ``LinearExperts``, whose
linears have the names of the checkpoint. Its arithmetic is that of ``grouped_mm_experts_forward``, transformers'
default: for token ``t`` with experts ``e`` and routing weights ``p``

    y_t = sum_e p_te W_e^down act(W_e^gate x_t, W_e^up x_t)

summed over the chosen experts in their order of choice, in float32 for half-precision outputs. Routers are untouched.
All gate and up projections run before the first down projection.

Not replaced: experts with biases, without a gate, or transposed or interleaved (gpt_oss), and experts of types whose
checkpoints hold no single experts (granitemoe). They stay in floating point.

Shapes: ``E`` experts, ``h`` hidden size, ``f`` intermediate size, ``T`` tokens, ``k`` experts of a token.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omniq.models.checkpoint import Checkpoint, Stored
from omniq.models.prepare import PreparedCheckpoint
from omniq.models.stored_names import names_of_projections

MERGED = ("gate_up_proj", "down_proj")
_REQUIRED = {
    "has_gate": True,
    "is_concatenated": True,
    "has_bias": False,
    "is_transposed": False,
    "has_post_expert_norm": False,
}


class LinearExperts(nn.Module):
    """Experts as linears: ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj``, ...

    Args:
        merged: transformers' module with the merged parameters.
        names: names of the gate, up and down projections of one expert.
    """

    def __init__(self, merged: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(merged).items() if name not in nn.Module().__dict__}
        self.__dict__.update(plain)  # the settings that a gate of its own may read
        self.names, self._gate_of = names, type(merged)._apply_gate
        for name, module in merged.named_children():  # the activation
            self.add_module(name, module)
        (number, double, hidden), kind = merged.gate_up_proj.shape, merged.gate_up_proj
        widths = ((hidden, double // 2), (hidden, double // 2), (double // 2, hidden))
        for index in range(number):
            linears = (nn.Linear(i, o, bias=False, device=kind.device, dtype=kind.dtype) for i, o in widths)
            self.add_module(str(index), nn.ModuleDict(dict(zip(names, linears, strict=True))))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map hidden states ``[T, h]`` to ``[T, h]``.

        Args:
            hidden_states: the inputs.
            top_k_index: the experts of each token, ``[T, k]``.
            top_k_weights: their routing weights, ``[T, k]``.
        """
        chosen, order = torch.sort(top_k_index.reshape(-1))
        tokens, counts = order // top_k_index.shape[-1], torch.bincount(chosen).tolist()
        gate, up, down = self.names
        inner, experts = [], [getattr(self, str(index)) for index, count in enumerate(counts) if count]
        for expert, rows in zip(experts, tokens.split([count for count in counts if count]), strict=True):
            x = hidden_states[rows]
            inner.append(self._gate_of(self, torch.cat([expert[gate](x), expert[up](x)], -1)))
        outputs = torch.cat([expert[down](x) for expert, x in zip(experts, inner, strict=True)])
        weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        by_token = weighted[torch.argsort(order)].view(*top_k_index.shape, -1)
        return by_token.sum(1).to(hidden_states.dtype)


class SplitExperts(PreparedCheckpoint):
    """Merged parameters of experts under the names of their linears.

    Args:
        inner: the checkpoint.
        experts: every ``LinearExperts`` by full name.
    """

    def __init__(self, inner: Checkpoint, experts: dict[str, LinearExperts]) -> None:
        self._slices: dict[str, tuple[str, int, slice]] = {}
        merged = set()
        for place, module in experts.items():
            gate, up, down = module.names
            for projection in (f"{place}.{name}" for name in MERGED):
                if projection not in inner.tensors:
                    continue
                merged.add(projection)
                number, rows, _ = inner.tensors[projection].shape
                halves = {gate: slice(rows // 2), up: slice(rows // 2, rows)}
                for name, part in halves.items() if projection.endswith(MERGED[0]) else [(down, slice(rows))]:
                    for index in range(number):
                        self._slices[f"{place}.{index}.{name}.weight"] = (projection, index, part)
        tensors = {name: stored for name, stored in inner.tensors.items() if name not in merged}
        for name, (projection, _, part) in self._slices.items():
            whole = inner.tensors[projection]
            shape = (len(range(*part.indices(whole.shape[1]))), whole.shape[2])
            tensors[name] = Stored(shape, whole.dtype, whole.file)
        super().__init__(inner, tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        wanted = {self._slices[name][0] if name in self._slices else name for name in names}
        found = self._inner.read(wanted)
        tensors = {}
        for name in names:
            projection, index, rows = self._slices.get(name, (name, None, None))
            tensors[name] = found[name] if rows is None else found[projection][index, rows]
        return tensors


def split_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Replace all experts modules of a model that hold merged parameters; return the model."""
    merged = [(name, module) for name, module in model.named_modules() if _is_merged(module)]
    if merged and (names := names_of_projections(model)):
        for name, module in merged:
            model.set_submodule(name, LinearExperts(module, names))
    return model


def with_split_experts(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """The same checkpoint, in which merged parameters have the names of the linears of a model."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}
    merged = any(f"{place}.{name}" in checkpoint.tensors for place in experts for name in MERGED)
    return SplitExperts(checkpoint, experts) if merged else checkpoint


def _is_merged(module: Any) -> bool:
    flags = all(getattr(module, name, None) is value for name, value in _REQUIRED.items())
    return flags and all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in MERGED)
