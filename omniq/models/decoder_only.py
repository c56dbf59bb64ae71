# SPDX-License-Identifier: Apache-2.0
"""Refuse models that are not decoder-only language models, from the config alone."""

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from omniq.errors import NotByBlocks


def check_type(model_type: str | None, remote_code: bool) -> None:
    """Refuse a type that transformers does not know.

    Args:
        model_type: ``model_type`` of config.json.
        remote_code: the code that comes with the model may define its type.

    Raises:
        NotByBlocks: names the type and the remedy.
    """
    if model_type not in CONFIG_MAPPING and not remote_code:
        raise NotByBlocks(
            f"model type {model_type!r} is not supported, because transformers {transformers.__version__} does not "
            "know it: update transformers, or set model.trust_remote_code if its code lies beside the weights"
        )


def check_decoder_only(config: PretrainedConfig) -> None:
    """Refuse encoder-decoders and models that are not causal language models.

    Raises:
        NotByBlocks: names the type and the remedy.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise NotByBlocks(
            f"model type {kind!r} is not supported, because it is an encoder-decoder, whose blocks also read the "
            "output of the encoder: choose a decoder-only model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise NotByBlocks(
            f"model type {kind!r} is not supported, because transformers has no causal language model of this type: "
            "choose a decoder-only model"
        )
