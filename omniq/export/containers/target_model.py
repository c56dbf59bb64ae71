# SPDX-License-Identifier: Apache-2.0
"""The stock model that holds an export: its parameters, its linears, and its config.

A transform may create biases that the source model lacks (a shift moved out of a norm, for instance). Stock code
supports them only if its config declares them, and then for whole groups of linears: LLaMA's ``attention_bias`` for q,
k, v and o together, ``mlp_bias`` for gate, up and down. Therefore the required switches are turned on, siblings without
a bias get zeros, and a bias that no switch declares is refused.

The model is built on the meta device, which takes no memory and only milliseconds.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from omniq.errors import UserError
from omniq.models.experts import split_experts
from omniq.models.family import BIAS_SWITCHES


@dataclass(frozen=True)
class TargetModel:
    """A stock model without its weights.

    Args:
        config: the config from which transformers builds the model.
        architecture: name of its class.
        parameters: shapes of all tensors in its checkpoints, by full name; tied parameters have only one name here.
        tied: maps the other names of tied parameters to their names in ``parameters``.
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
            model = split_experts(AutoModelForCausalLM.from_config(config))
        first = {id(tensor): name for name, tensor in model.named_parameters()}  # lists a tied parameter once
        every = model.named_parameters(remove_duplicate=False)
        tied = {name: first[id(tensor)] for name, tensor in every if name != first[id(tensor)]}
        parameters = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
        linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        return cls(config, type(model).__name__, parameters, tied, linears)

    def untied(self, names: Iterable[str]) -> set[str]:
        """Replace the names of tied parameters by their names in ``parameters``."""
        return {self.tied.get(name, name) for name in names}

    def biases_without_value(self, names: Iterable[str]) -> dict[str, torch.Size]:
        """Shapes of the parameters that are not in ``names``; these are biases to be filled with zeros.

        Raises:
            UserError: a missing parameter is not a bias.
        """
        missing = sorted(self.parameters.keys() - self.untied(names))
        for name in missing:
            if not name.endswith(".bias"):
                raise UserError(
                    f"the source model lacks {name}, which {self.architecture} needs: use a complete checkpoint"
                )
        return {name: self.parameters[name] for name in missing}


def target_model(config: PretrainedConfig, names: Iterable[str]) -> TargetModel:
    """Build the stock model that can hold these parameters.

    Args:
        config: the config of the source model; not modified.
        names: full names of the parameters in the unquantized model (``….q_proj.weight``, ``….q_proj.bias``).

    Returns:
        the model, with the bias switches that the names require.

    Raises:
        UserError: the model cannot hold a parameter.
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
            f"{model.architecture} cannot hold {min(homeless)}, so no runtime could load the checkpoint: use a method "
            "that creates no such parameter (for biases: turn its shift off)"
        )
    return model


def _is_bias_of(name: str, part: str) -> bool:
    return name.endswith(".bias") and f".{part}" in name
