# SPDX-License-Identifier: Apache-2.0
"""The stock model that an export must fit into: its parameters, its linears, and its config.

A transform may create biases that the source model does not have (a shift moved out of a norm, for instance). Stock
code can hold them only if its config declares them, and then it declares them for whole groups of linears: LLaMA's
``attention_bias`` for q, k, v and o at once, ``mlp_bias`` for gate, up and down. So the switches that are needed are
turned on, the siblings without a bias get zeros, and a bias that no switch declares is refused.

The model is built on the meta device: no memory, milliseconds.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from omniq.errors import UserError

_BIAS_SWITCHES = {"attention_bias": "self_attn", "mlp_bias": "mlp"}  # config key -> the part of a block it governs


@dataclass(frozen=True)
class Deployment:
    """A stock model without its weights.

    Args:
        config: under which transformers builds it.
        architecture: its class.
        parameters: shape of everything a checkpoint of it stores, by full name; tied copies are left out.
        linears: full names of its linear layers.
    """

    config: PretrainedConfig
    architecture: str
    parameters: dict[str, torch.Size]
    linears: tuple[str, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Deployment":
        """Build the model of a config on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        stored = dict(model.named_parameters())  # without the second name of a tied parameter
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - stored.keys()
        parameters = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
        linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return cls(config, type(model).__name__, parameters, linears)


def deployment(config: PretrainedConfig, names: Iterable[str]) -> Deployment:
    """The stock model that can hold these parameters.

    Args:
        config: of the source model; left as it is.
        names: full names of the parameters as a plain model has them (``….q_proj.weight``, ``….q_proj.bias``).

    Returns:
        the model, with bias switches turned on where the names need them.

    Raises:
        UserError: a parameter has no place in it.
    """
    names, config = set(names), deepcopy(config)
    model = Deployment.of(config)
    homeless = names - model.parameters.keys()
    for switch, part in _BIAS_SWITCHES.items():
        if getattr(config, switch, None) is False and any(_is_bias_of(name, part) for name in homeless):
            setattr(config, switch, True)
            model = Deployment.of(config)
    if homeless := sorted(names - model.parameters.keys()):
        raise UserError(
            f"{homeless[0]} has no place in {model.architecture}, which any runtime would build for this checkpoint: "
            "use a method that creates no such parameter (for biases: turn its shift off)"
        )
    return model


def _is_bias_of(name: str, part: str) -> bool:
    return name.endswith(".bias") and f".{part}." in name
