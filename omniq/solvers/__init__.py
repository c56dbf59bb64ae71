# SPDX-License-Identifier: Apache-2.0
"""Algorithms on one layer, as functions of tensors: coordinate descent, GPTQ, SpQR, outliers, scale refit.

Each module opens with the formula, the steps, the paper's section, the deviations and a legend of shapes. A result is a
``LayerSolution``. May import quantizers, kernels and grid. Read ``coordinate_descent.py`` first.
"""
