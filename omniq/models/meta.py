# SPDX-License-Identifier: Apache-2.0
"""Modules without weights, and how they get their weights.

The whole model is built once on torch's meta device: every module, shape and dtype, without memory. ``fill`` makes a
part of it real. Parameters and saved buffers come from the checkpoint. Buffers that are never saved (rotary
frequencies) come from the model's own initialisation, as when transformers loads a model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from omniq.errors import NotByBlocks, UserError, one_line
from omniq.models.experts import split_experts


def meta_model(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that a config describes, on the meta device, frozen and in evaluation mode.

    Experts are linears (``omniq.models.experts``). Models that have no ``sdpa`` attention get ``eager`` instead.

    Raises:
        UserError: the attention implementation is unknown, not installed, or not available for this model; or the
            config holds a value that transformers does not know.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=_available(attention, config),
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"transformers cannot build this model with model.attention {attention!r} ({one_line(error)}): "
            "use sdpa or eager"
        ) from error
    except Exception as error:  # an unknown hidden_act or rope_type is a KeyError, other values fail in other ways
        raise UserError(
            "transformers cannot build the model that config.json describes "
            f"({type(error).__name__}: {one_line(error)}): correct this value, or get the file again"
        ) from error
    return split_experts(model).eval().requires_grad_(False)


def _available(attention: str, config: PretrainedConfig) -> str:
    """The implementation of attention; eager instead of sdpa for models that have no sdpa, such as BLOOM."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    lacks = attention == "sdpa" and type(config) in mapping and not mapping[type(config)]._supports_sdpa
    return "eager" if lacks else attention


def fill(model: PreTrainedModel, part: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a part of a meta model its values.

    Args:
        model: the model whose code initialises the buffers.
        part: the model itself, one of its modules, or a copy of one.
        tensors: parameters and saved buffers by name inside ``part``, on ``device``; others stay as they are.
        device: of the unsaved buffers.
    """
    for module in part.modules():
        _fill_buffers(model, module, device)
    part.load_state_dict(tensors, strict=False, assign=True)
    part.requires_grad_(False)


def _fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Initialise the unsaved buffers of one module twice, from different memory, to see that every entry is written."""
    names, given = _unsaved(module), dict(module.named_buffers(recurse=False))
    attempts: list[dict[str, Tensor]] = []
    for garbage in (0, 1) if names else ():
        for name in names:
            setattr(module, name, torch.full_like(module.get_buffer(name), garbage, device=device))
        model._init_weights(module)
        attempts.append({name: module.get_buffer(name) for name in names})
    for name in names:
        if torch.equal(attempts[0][name], attempts[1][name]):
            continue
        if given[name].is_meta:
            raise NotByBlocks(
                f"the code of {type(model).__name__} does not initialise {type(module).__name__}.{name}: "
                "this model cannot be opened block by block; choose a model of another type"
            )
        setattr(module, name, given[name].to(device))


def fill_shared_buffers(model: PreTrainedModel, blocks: str) -> None:
    """Compute the unsaved buffers of blocks that the code of the whole model initialises (``mup_vector`` of Falcon-H1).

    They stay in the meta model, on the CPU; ``fill`` takes them from there.

    Args:
        model: on the meta device.
        blocks: dotted name of the list of blocks.
    """
    unsaved = [
        (module, name, module.get_buffer(name))
        for module in model.get_submodule(blocks).modules()
        for name in _unsaved(module)
        if module.get_buffer(name).is_floating_point()
    ]
    for module, name, buffer in unsaved:
        setattr(module, name, torch.full_like(buffer, torch.nan, device="cpu"))
    model._init_weights(model.base_model)
    for module, name, buffer in unsaved:
        if module.get_buffer(name).isnan().any():
            setattr(module, name, buffer)


def _unsaved(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False) if name in module._non_persistent_buffers_set]
