# SPDX-License-Identifier: Apache-2.0
"""Algorithms on one layer, as functions of tensors: coordinate descent, GPTQ, SpQR, outliers, scale refit.

May import quantizers, kernels and grid. Read ``coordinate_descent.py`` first.
"""
