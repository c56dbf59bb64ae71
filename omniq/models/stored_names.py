# SPDX-License-Identifier: Apache-2.0
"""The names of a checkpoint turned into the names of the model's modules, as transformers does when it loads a model.

Stored names may differ from module names: a checkpoint of the inner model lacks the prefix ``model.``, GPT-NeoX stores
its head as ``embed_out``. transformers keeps the rules in a table for each model type
(``transformers.conversion_mapping``) and applies them in ``convert_and_load_state_dict_in_model``; this module follows
that function, for names only. It is the only one that imports these two modules of transformers.

The experts of a mixture stay as they are stored (``omniq.models.experts``), where the table would merge them. Where it
merges or transposes other tensors, the model is refused by name.
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from omniq.errors import NotByBlocks, UserError
from omniq.models.checkpoint import Checkpoint
from omniq.models.prepare import Renamed


def with_model_names(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """The same checkpoint under the names of a model; tensors that the model lacks keep their stored names.

    Args:
        checkpoint: as it lies in its files.
        model: on the meta device.

    Raises:
        NotByBlocks: transformers computes a parameter from several stored tensors, or changes its layout.
        UserError: two stored tensors belong to the same parameter.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, wanted = model.base_model_prefix, model.state_dict()
    stored_name: dict[str, str] = {}
    for stored in sorted(checkpoint.tensors, key=dot_natural_key):  # some rules depend on the names seen before
        name, converted_by = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and converted_by is not None:  # a projection of one expert, which the model has, too
            name, converted_by = rename_source_key(stored, renamings, [], prefix, wanted)
        if name not in wanted and stored in wanted:
            name, converted_by = stored, None
        if name in wanted and converted_by is not None:
            raise NotByBlocks(
                f"model type {model.config.model_type!r} stores {name} in another layout, in tensors such as {stored}, "
                "which omniq cannot convert block by block: choose a model of another type"
            )
        name = name if name in wanted else stored
        if name in stored_name:
            raise UserError(
                f"{checkpoint.tensors[stored].file}: {stored_name[name]} and {stored} both hold the parameter {name}: "
                "remove one of them"
            )
        stored_name[name] = stored
    if all(name == stored for name, stored in stored_name.items()):
        return checkpoint
    return Renamed(checkpoint, stored_name)


def names_of_projections(model: PreTrainedModel) -> tuple[str, str, str] | None:
    """Names of the gate, up and down projections of one expert in the checkpoints of a model type.

    Returns:
        the names; None if transformers does not read single experts of this type.
    """
    names: dict[str, list[str]] = {}
    for each in get_model_conversion_mapping(model):
        if isinstance(each, WeightConverter) and ".experts.*." in f".{each.source_patterns[0]}":
            stored = [source.removesuffix(".weight").rpartition(".")[2] for source in each.source_patterns]
            names[each.target_patterns[0].rpartition(".")[2]] = stored
    if {key: len(stored) for key, stored in names.items()} != {"gate_up_proj": 2, "down_proj": 1}:
        return None
    return names["gate_up_proj"][0], names["gate_up_proj"][1], names["down_proj"][0]
