# SPDX-License-Identifier: Apache-2.0
"""All supported families. To add one, add a file here and its name to ``FAMILIES``."""

from transformers import PretrainedConfig

from omniq.errors import NotByBlocks
from omniq.models.families.bloom import BLOOM
from omniq.models.families.experts import MIXTRAL, OLMOE, QWEN3_MOE
from omniq.models.families.falcon import FALCON
from omniq.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from omniq.models.families.gpt_neox import GPT_NEOX
from omniq.models.families.llama import LLAMA
from omniq.models.families.olmo import OLMO
from omniq.models.families.opt import OPT
from omniq.models.families.phi3 import PHI3
from omniq.models.families.qwen3 import QWEN3
from omniq.models.family import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN3,
    PHI3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    OLMO,
    OPT,
    BLOOM,
    FALCON,
    GPT_NEOX,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
)


def family_of_type(model_type: str | None) -> Family:
    """The family that covers a ``model_type`` of transformers.

    Raises:
        NotByBlocks: no family covers it; the message lists the supported types.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise NotByBlocks(f"model type {model_type!r} is not supported: choose a model of type {supported}")


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model.

    Raises:
        NotByBlocks: no family covers its type, or the family refuses this variant of it.
    """
    family = family_of_type(config.model_type)
    if reason := family.refuse(config):
        raise NotByBlocks(reason)
    return family


def is_declared(model_type: str | None) -> bool:
    """True if a declared family covers a ``model_type``."""
    return any(model_type in family.model_types for family in FAMILIES)


def declared_family(config: PretrainedConfig) -> Family | None:
    """The declared family of a model; None if omniq must discover its blocks.

    Raises:
        NotByBlocks: the family refuses this variant of it.
    """
    return family_of(config) if is_declared(config.model_type) else None
