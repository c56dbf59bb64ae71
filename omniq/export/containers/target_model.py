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
from omniq.models.family import BIAS_SWITCHES


@dataclass(frozen=True)
class TargetModel:
    """A stock model without its weights.

    Args:
        config: under which transformers builds it.
        architecture: its class.
        parameters: shape of everything a checkpoint of it stores, by full name; tied parameters under one name only.
        tied: their other names, each with that one.
        linears: full names of its linear layers.
    """

    config: PretrainedConfig
    architecture: str
    parameters: dict[str, torch.Size]
    tied: dict[str, str]
    linears: tuple[str, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "TargetModel":
        """Build the model of a config on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        first = {id(tensor): name for name, tensor in model.named_parameters()}  # a tied parameter comes once here
        every = model.named_parameters(remove_duplicate=False)
        tied = {name: first[id(tensor)] for name, tensor in every if name != first[id(tensor)]}
        parameters = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
        linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return cls(config, type(model).__name__, parameters, tied, linears)

    def untied(self, names: Iterable[str]) -> set[str]:
        """The same parameters, tied ones by their name in ``parameters``."""
        return {self.tied.get(name, name) for name in names}

    def biases_without_value(self, names: Iterable[str]) -> dict[str, torch.Size]:
        """Shapes of the parameters that are not among ``names``: they are biases, and zero.

        Raises:
            UserError: the source lacks a parameter that is not a bias.
        """
        missing = sorted(self.parameters.keys() - self.untied(names))
        for name in missing:
            if not name.endswith(".bias"):
                raise UserError(
                    f"the source model lacks {name}, which {self.architecture} needs: get a complete checkpoint"
                )
        return {name: self.parameters[name] for name in missing}


def target_model(config: PretrainedConfig, names: Iterable[str]) -> TargetModel:
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
    model = TargetModel.of(config)
    homeless = model.untied(names) - model.parameters.keys()
    for switch, part in BIAS_SWITCHES.items():
        if getattr(config, switch, None) is False and any(_is_bias_of(name, part) for name in homeless):
            setattr(config, switch, True)
            model = TargetModel.of(config)
    if homeless := model.untied(names) - model.parameters.keys():
        raise UserError(
            f"{min(homeless)} has no place in {model.architecture}, which any runtime would build for this checkpoint: "
            "use a method that creates no such parameter (for biases: turn its shift off)"
        )
    return model


def _is_bias_of(name: str, part: str) -> bool:
    return name.endswith(".bias") and f".{part}" in name
