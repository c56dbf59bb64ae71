# SPDX-License-Identifier: Apache-2.0
"""Stages: one file a method, named in YAML by ``class_path: omniq.stages.<Name>``."""

from omniq.stages.awq import AWQ
from omniq.stages.gptq import GPTQ
from omniq.stages.learned_rounding import LearnedRounding
from omniq.stages.omniquant import OmniQuant
from omniq.stages.outlier_suppression import OutlierSuppression
from omniq.stages.quantease import QuantEase
from omniq.stages.rtn import RTN
from omniq.stages.smoothquant import SmoothQuant
from omniq.stages.spqr import SpQR

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "LearnedRounding",
    "OmniQuant",
    "OutlierSuppression",
    "QuantEase",
    "SmoothQuant",
    "SpQR",
]
