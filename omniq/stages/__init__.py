# SPDX-License-Identifier: Apache-2.0
"""Stages: one file per method, named in YAML by ``class_path: omniq.stages.<Name>``.

The file of a stage holds its equations and its settings, and does not import torch, so that errors in settings appear
at once. ``omniq/stages/modules`` holds the LightningModule of each stage.
"""

from typing import TYPE_CHECKING

from omniq.lazy import lazy_names

if TYPE_CHECKING:
    from omniq.stages.awq import AWQ
    from omniq.stages.end_to_end import EndToEnd
    from omniq.stages.from_checkpoint import FromCheckpoint
    from omniq.stages.gptq import GPTQ
    from omniq.stages.learned_rounding import LearnedRounding
    from omniq.stages.omniquant import OmniQuant
    from omniq.stages.outlier_suppression import OutlierSuppression
    from omniq.stages.quantease import QuantEase
    from omniq.stages.rtn import RTN
    from omniq.stages.smoothquant import SmoothQuant
    from omniq.stages.spqr import SpQR
else:  # hidden from type checkers, for which a module-level __getattr__ defines every name
    __getattr__ = lazy_names(
        __name__,
        {
            "AWQ": "omniq.stages.awq",
            "EndToEnd": "omniq.stages.end_to_end",
            "FromCheckpoint": "omniq.stages.from_checkpoint",
            "GPTQ": "omniq.stages.gptq",
            "RTN": "omniq.stages.rtn",
            "LearnedRounding": "omniq.stages.learned_rounding",
            "OmniQuant": "omniq.stages.omniquant",
            "OutlierSuppression": "omniq.stages.outlier_suppression",
            "QuantEase": "omniq.stages.quantease",
            "SmoothQuant": "omniq.stages.smoothquant",
            "SpQR": "omniq.stages.spqr",
        },
    )

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "EndToEnd",
    "FromCheckpoint",
    "LearnedRounding",
    "OmniQuant",
    "OutlierSuppression",
    "QuantEase",
    "SmoothQuant",
    "SpQR",
]
