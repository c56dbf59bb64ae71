# SPDX-License-Identifier: Apache-2.0
"""Silence the messages that other libraries print for every block."""

import logging
import os
import warnings


def quiet_transformers() -> None:
    """Hide the progress bars of transformers. The import of transformers takes seconds."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def quiet() -> None:
    """Hide the messages that a Trainer repeats for every block. omniq's own warnings remain visible."""
    chatter = ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda")
    for name in (*chatter, "fabric.utilities.rank_zero", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    log = logging.getLogger("omniq")
    if not log.hasHandlers():  # NOTE: a handler on the root logger would print other libraries' warnings as omniq's
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("omniq: %(message)s"))
        log.addHandler(handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*AccumulateGrad node's stream does not match.*")  # Lightning's DDP
    warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")  # stages without learned parameters
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
